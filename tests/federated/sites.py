"""Two sites whose tops another engine averages, and the one tree that they are equal to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save

from splitllm.federated.parcels import give, take
from splitllm.federated.pooling import Arrays, Offer, Pooling
from tests.tiny import LAYERS, WORDS, write_recipe

PATIENCE, ROWS, CLIENTS, SITES = 5.0, 6, 4, 2
EVERY = ["rounds.edge_every=1", "rounds.cloud_every=2"]
ALIKE = [
    *(
        "model.dtype=float64",
        "model.dropout=0",
        "lora.dropout=0.0",
        "rounds.replicas=local",
        "data.partition={by: file}",
    ),
    *(f"train.batch_size={ROWS}", "train.accumulate=1", "train.in_flight=1", "train.steps=5"),
]
"""Dropout and batches are keyed by the number of a client, which another tree gives it: here is none, and one batch."""


def rows_of(folder: Path) -> list[Path]:
    """A file of rows for every client, unlike the others'; and one to evaluate on."""
    files = []
    for client in range(CLIENTS + 1):
        files.append(folder / f"rows-{client}.jsonl")
        texts = [[f"w{(client * 7 + row * 3 + place) % WORDS}" for place in range(3 + (row + client) % 6)]
                 for row in range(ROWS)]  # fmt: skip
        lines = [json.dumps({"prompt": " ".join(words[:-2]), "completion": " ".join(words[-2:])}) for words in texts]
        files[-1].write_text("\n".join(lines) + "\n")
    return files


def written(folder: Path) -> Path:
    """Base, rows and recipe in a folder; the recipe."""
    path = write_recipe(folder)
    rows_of(folder)
    return path


def _data(folder: Path, clients: Sequence[int]) -> list[str]:
    sources = [str(folder / f"rows-{client}.jsonl") for client in clients]
    return [f"data.source={json.dumps(sources)}", f"data.eval={json.dumps(str(folder / f'rows-{CLIENTS}.jsonl'))}"]


def one_tree(folder: Path) -> list[str]:
    """Overrides of the tree with a cloud that only holds norm, head and loss."""
    tree = [f"split.tiers={{client: {CLIENTS}, edge: {SITES}, cloud: 1}}", f"split.cuts=[2, {LAYERS}]"]
    return [*tree, *ALIKE, *EVERY, *_data(folder, range(CLIENTS))]


def site(folder: Path, index: int, address: str) -> list[str]:
    """Overrides of a site: one edge of that tree with its clients."""
    each = CLIENTS // SITES
    tree = [f"split.tiers={{client: {each}, edge: 1}}", "split.cuts=[2]", f"rounds.exchange={address}"]
    return [*tree, *ALIKE, *EVERY, *_data(folder, range(index * each, (index + 1) * each))]


def apart(one: Path, other: Path) -> float:
    """The largest difference of two adapter folders."""
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
    assert tensors[0].keys() == tensors[1].keys() and tensors[0]
    return max(float((tensors[0][name] - tensors[1][name]).abs().max()) for name in tensors[0])


def _offer(values: Mapping[str, Any], blob: bytes) -> Offer:
    arrays: Arrays = {name: tensor.numpy() for name, tensor in load(blob).items()}
    return Offer(values["step"], values["weight"], values["last"], values["rules"], arrays, values["bfloat16"])


async def pooled(addresses: Mapping[str, str]) -> list[int]:
    """An engine in one loop: all rounds of the sites at these addresses, by name; the steps of its rounds."""
    pooling, steps = Pooling(), list[int]()
    while True:
        parcels = await asyncio.gather(*(asyncio.to_thread(take, at, PATIENCE) for at in addresses.values()))
        offers = {name: _offer(p.values, p.tensors) for name, p in zip(addresses, parcels, strict=True)}
        outcomes, _ = pooling.outcomes(offers)
        (step,) = {offer.step for offer in offers.values()}
        steps.append(step)
        for name, (arrays, bfloat16) in outcomes.items():
            blob = save({key: torch.from_numpy(array) for key, array in arrays.items()})
            await asyncio.to_thread(give, addresses[name], step, bfloat16, blob, PATIENCE)
        if all(offer.last for offer in offers.values()):
            return steps
