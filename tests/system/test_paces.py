"""Rounds of clients at their own pace: real roles over gRPC in one event loop, and as processes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from splitllm.metrics import read_records
from splitllm.recipe import Recipe
from splitllm.train import train
from tests.deployment.lanes import deployed, with_edges
from tests.tiny import write_recipe

EXACT = (
    "split.tiers={client: 4, edge: 2, cloud: 1}",
    "train.steps=6",
    "train.batch_size=1",
    "train.clip_norm=1000",
    "train.optimizer={name: sgd, lr: 0.5}",
    "model.dtype=float64",
    "model.dropout=0",
    "lora.adapters=common",
    "rounds={replicas: local, edge_every: 1, cloud_every: 1}",
)


async def ended(recipe: Recipe, folder: Path) -> None:
    async with deployed(recipe, folder) as tasks:
        await asyncio.wait_for(asyncio.gather(*tasks.values()), 120)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(run / "metrics.jsonl") if record["event"] == "round"]


def test_where_all_are_in_time_it_is_the_adapter_of_one_process(tmp_path: Path) -> None:
    recipe = with_edges(write_recipe(tmp_path), *EXACT, "server.batching=continuous")
    asyncio.run(ended(recipe, tmp_path / "run"))
    train(recipe, tmp_path / "whole")
    found, expected = adapter(tmp_path / "run" / "cloud"), adapter(tmp_path / "whole")
    assert found.keys() == expected.keys()
    worst = max(float((found[key] - tensor).abs().max()) for key, tensor in expected.items())
    assert worst <= 1e-11
