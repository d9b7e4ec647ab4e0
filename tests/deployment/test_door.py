"""A tenant that misbehaves costs its own lane: real roles over gRPC in one event loop, one of them tampered with."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from splitllm.errors import SplitLLMError
from splitllm.metrics import read_records
from splitllm.recipe import Recipe
from splitllm.train import train
from splitllm.wire.message import Message
from tests.deployment.lanes import BAD, FORGED, OTHERS, Tamper, adapters, deployed, trained, with_ports
from tests.tiny import write_recipe
from tests.wire.serving import run

STEPS = 3
WORDS = (
    f"train.steps={STEPS}",
    "train.log_every=1",
    "model.dtype=float64",
    "model.dropout=0",
    "split.tiers={client: 3, edge: 1, cloud: 1}",
    "split.client_cuts={client-2: 2}",
    "lora.adapters=per_client",
    "server.gradient_wait=0.01",
    "server.wait=0.03",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def recipe_of(path: Path, *words: str) -> Recipe:
    return with_ports(path, *WORDS, *words)


@pytest.fixture(scope="module")
def undisturbed(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Where the labels are -> adapters of `splitllm train` without any batches."""

    @cache
    def of(labels: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("undisturbed")
        train(recipe_of(path, f"split.labels={labels}"), folder / "cloud")
        return adapters(folder)

    return of


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The adapters of all but the hostile tenant."""
    for name in OTHERS:
        for key, tensor in expected[name].items():
            error = float((found[name][key] - tensor).abs().max() / tensor.abs().max())
            assert error <= 1e-9, f"{name}: {key} is off by {error:.1e}"


def values(kind: str, name: str, value: float) -> Tamper:
    """All values of a tensor of its training requests."""

    def tamper(message: Message) -> Message:
        if message.kind != kind or message.step < 0:
            return message
        return replace(message, tensors={**message.tensors, name: torch.full_like(message.tensors[name], value)})

    return tamper


def silent(*kinds: str, step: int = 0) -> Tamper:
    return lambda message: None if message.kind in kinds and message.step >= step else message


def another(message: Message) -> Message:
    """It says that it is client 0."""
    if message.kind != "forward":
        return message
    return replace(message, micro_batch=(message.micro_batch[0], 0, message.micro_batch[2]))


def without_norms(message: Message) -> Message:
    """It keeps what the edge has to hand on to itself."""
    return replace(message, header={**message.header, "own": {}}) if message.kind == "close" else message


def lost_journal(message: Message) -> Message:
    """It says that it has a state that nobody else has."""
    if message.kind != "join":
        return message
    return replace(message, header={"standings": {BAD: [BAD, [[STEPS, "1"]]]}})


def diverged(message: Message) -> Message:
    return replace(message, kind="diverged", header={"what": "enough"}, tensors={}) if message.step == 1 else message


def forged(kind: str, name: str) -> Tamper:
    """What no honest client can send: the link of this one leaves it to `Tampered` to write NaN over the bytes."""
    return lambda message: (
        replace(message, header={**message.header, FORGED: name}) if message.kind == kind else message
    )


HUGE, OVERFLOWING = 1e30, 1e308
MATTERS = {
    "forged NaN activations": ("cloud", forged("forward", "hidden_TD"), "disconnected"),
    "forged NaN gradients": ("client", forged("backward", "gradient_ND"), "disconnected"),
    "overflowing activations": ("client", values("forward", "hidden_TD", OVERFLOWING), "has diverged"),
    "silent between forward and backward": ("client", silent("backward", step=1), None),
    "no norms": ("cloud", without_norms, "norms of clients"),
}
AS_WELL = {
    "NaN activations": ("cloud", values("forward", "hidden_TD", math.nan), "has diverged"),
    "NaN gradients": ("client", values("backward", "gradient_ND", math.nan), "has diverged"),
    "huge activations": ("cloud", values("forward", "hidden_TD", HUGE), None),
    "huge activations, labels at home": ("client", values("forward", "hidden_TD", HUGE), None),
    "huge gradients": ("client", values("backward", "gradient_ND", HUGE), None),
    "overflowing activations at the cloud": ("cloud", values("forward", "hidden_TD", OVERFLOWING), "has diverged"),
    "overflowing gradients": ("client", values("backward", "gradient_ND", OVERFLOWING), "has diverged"),
    "silent from the second step on": ("cloud", silent("forward", step=1), None),
    "silent": ("cloud", silent("join"), None),
    "another's number": ("cloud", another, "client-1 sent forward for client 0"),
    "a state that nobody has": ("cloud", lost_journal, "cannot go on"),
    "diverged": ("cloud", diverged, "has diverged"),
}
CASES = [
    *(pytest.param(*case, id=name) for name, case in MATTERS.items()),
    *(pytest.param(*case, id=name, marks=pytest.mark.system) for name, case in AS_WELL.items()),
]


@pytest.mark.parametrize(("labels", "tamper", "said"), CASES)
def test_whatever_a_tenant_does_the_others_learn_what_they_learn_without_it(
    labels: str,
    tamper: Tamper,
    said: str | None,
    path: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = undisturbed(labels)
    recipe = recipe_of(path, f"split.labels={labels}", "server.batching=continuous")
    ends: dict[str, BaseException | None] = {}

    async def test() -> None:
        ends.update(await trained(recipe, tmp_path, tamper))

    with caplog.at_level(logging.INFO):
        run(test, 60)
    same(adapters(tmp_path), expected)
    assert isinstance(ends.pop(BAD, None), SplitLLMError | None)
    assert not any(ends.values()), ends
    told = [f"{record.getMessage()} {getattr(record, 'fields', '')}" for record in caplog.records]
    assert said is None or any(said in line and ("client-1" in line or "'client': 1" in line) for line in told), told


@pytest.mark.parametrize(
    ("labels", "tamper"),
    [
        pytest.param("cloud", values("forward", "hidden_TD", HUGE), id="huge activations"),
        pytest.param("client", values("backward", "gradient_ND", HUGE), id="huge gradients", marks=pytest.mark.system),
    ],
)
def test_in_a_synchronous_batch_too(
    labels: str, tamper: Tamper, path: Path, tmp_path: Path, undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    expected = undisturbed(labels)
    recipe = recipe_of(path, f"split.labels={labels}", "server.batching=synchronous")

    async def test() -> None:
        await trained(recipe, tmp_path, tamper)

    run(test, 60)
    same(adapters(tmp_path), expected)


def test_a_run_whose_tenant_has_diverged_comes_to_its_end_without_it(path: Path, tmp_path: Path) -> None:
    recipe = recipe_of(path, "server.batching=continuous")

    async def test() -> None:
        async with deployed(recipe, tmp_path, diverged) as tasks:
            ends = await asyncio.gather(*tasks.values(), return_exceptions=True)
            assert [name for name, end in zip(tasks, ends, strict=True) if end is not None] == [BAD]
            for server in ("edge", "cloud"):  # they will not wait for it when they are started again
                marks = (tmp_path / server / "journal").glob("*/over.safetensors")
                assert [mark.parent.name for mark in marks] == [BAD]

    run(test, 60)
    assert set(adapters(tmp_path)) == set(OTHERS)
    summary = json.loads((tmp_path / "cloud" / "summary.json").read_text())
    held = summary["held_mib"]
    assert held["edge"]["adapter and optimiser"] > held["client-0"]["adapter and optimiser"]
    assert held["edge"]["activations of a batch"] > 0 and held["cloud"]["activations of a batch"] > 0
    tokens = {"client-0": 0, "client-1": 0, "client-2": 0}
    for record in read_records(tmp_path / "cloud" / "metrics.jsonl"):
        if record["event"] == "train":
            tokens[record["client"]] += record["tokens"]
    assert summary["train_tokens"] == tokens["client-0"] + tokens["client-2"] > 0
