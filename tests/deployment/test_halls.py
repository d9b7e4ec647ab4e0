"""Rounds at any pace, where something is wrong: real roles over gRPC in one event loop."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splitllm.deployment import server as server_module
from splitllm.deployment.station import Options, open_station
from splitllm.errors import CheckpointError
from splitllm.metrics import read_records
from splitllm.wire.message import Message
from tests.deployment.lanes import BAD, FORGED, Tamper, deployed, kept, with_edges, with_ports
from tests.tiny import write_recipe
from tests.wire.serving import run

WORDS = (
    "train.batch_size=1",
    "model.dropout=0",
    "split.tiers={client: 3, edge: 1, cloud: 1}",
    "lora.adapters=common",
    "server.batching=continuous",
    "server.gradient_wait=0.01",
)
ROUNDS = "replicas: local, edge_every: 1, cloud_every: 2"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


async def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    for _ in range(int(seconds / 0.02)):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came")


def held(folder: Path, server: str) -> int:
    """Rounds that a server has on disk."""
    there = list((folder / server / "journal" / "rounds").glob("step-*"))
    return int(kept(folder / server, "rounds").get("number", 0)) if there else 0


def again(folder: Path) -> Path:
    """The same run on another machine: the processes of the first one hold its locks."""
    other = folder.with_name("again")
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns(".lock", ".*.writing"))
    return other


def diverged(message: Message) -> Message:
    return replace(message, kind="diverged", header={"what": "enough"}, tensors={}) if message.step == 1 else message


def test_rounds_do_not_wait_for_a_client_that_diverged_before_a_restart(path: Path, tmp_path: Path) -> None:
    recipe = with_ports(path, *WORDS, f"rounds={{{ROUNDS}}}", "train.steps=20")
    first = tmp_path / "first"

    async def test() -> None:
        async with deployed(recipe, first, diverged):
            marks = [first / server / "journal" / BAD / "over.safetensors" for server in ("edge", "cloud")]
            await until(lambda: all(mark.exists() for mark in marks) and held(first, "edge") > 2)
        assert held(first, "edge") < 20, "it was over before the restart"
        async with deployed(recipe, again(first), lambda message: None) as tasks:
            ends = [task for name, task in tasks.items() if name != BAD]
            await asyncio.wait_for(asyncio.gather(*ends), 60)

    run(test, 120)
    assert held(tmp_path / "again", "edge") == 20 and (tmp_path / "again" / "cloud" / "summary.json").exists()


def furthest(journal: Path) -> int:
    """The newest step in it: older ones do not stay."""
    return max((int(place.stem.partition("-")[2]) for place in journal.glob("step-*.safetensors")), default=0)


@pytest.mark.parametrize("buffer", ["", ", buffer: {size: 1}"])
def test_a_top_that_lost_the_journal_of_its_rounds_says_so_and_goes_no_further(
    path: Path, tmp_path: Path, buffer: str
) -> None:
    words = (*WORDS, "split.tiers={client: 2, edge: 2, cloud: 1}", f"rounds={{{ROUNDS}{buffer}}}", "train.steps=40")
    recipe, first = with_edges(path, *words), tmp_path / "first"

    async def test() -> None:
        async with deployed(recipe, first):
            lanes = [first / "cloud" / "journal" / f"client-{client}" for client in (0, 1)]
            await until(lambda: all(furthest(lane) >= 4 for lane in lanes))
        shutil.rmtree(again(first) / "cloud" / "journal" / "rounds")
        station = open_station(recipe, Options("cloud", tmp_path / "again" / "cloud"), client=None)
        with pytest.raises(CheckpointError, match="its folder `rounds` holds 0 rounds, and client 0 has gone on"):
            await asyncio.wait_for(server_module._serve(station), 30)

    run(test, 120)


def in_round(change: Callable[[Message], Message | None]) -> Tamper:
    """Its third round is another."""
    return lambda message: change(message) if message.kind == "round" and message.step == 3 else message


def header(**more: Any) -> Tamper:
    return in_round(lambda message: replace(message, header={**message.header, **more}))


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Tamper:
    return in_round(lambda message: replace(message, tensors=change(dict(message.tensors))))


def renamed(value: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As if it held a block that its server trains."""
    return {name.replace(".h.0.", ".h.2."): tensor for name, tensor in value.items()}


def full(number: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda value: {name: torch.full_like(tensor, number) for name, tensor in value.items()}


def forged(message: Message) -> Message:
    return replace(message, header={**message.header, FORGED: next(iter(message.tensors))})


MATTERS: dict[str, Tamper] = {
    "countless rows": header(examples={"1": (1 << 53)}),
    "silent": in_round(lambda message: None),
}
AS_WELL: dict[str, Tamper] = {
    "another's rows": header(examples={"0": 5}),
    "spoiled": header(spoiled=True),
    "a later round": in_round(lambda message: replace(message, micro_batch=(4, 1, 0))),
    "another's round": in_round(lambda message: replace(message, micro_batch=(3, 0, 0))),
    "merge": in_round(lambda message: replace(message, kind="merge", header={"weights": {"1": 1.0}, "version": 0})),
    "another's block": tensors(renamed),
    "huge values": tensors(full(1e30)),
    "not a number": in_round(forged),
}


@pytest.mark.parametrize(
    "tamper",
    [
        *(pytest.param(tamper, id=name) for name, tamper in MATTERS.items()),
        *(pytest.param(tamper, id=name, marks=pytest.mark.system) for name, tamper in AS_WELL.items()),
    ],
)
def test_whatever_a_client_brings_to_a_round_the_others_hold_theirs(path: Path, tmp_path: Path, tamper: Tamper) -> None:
    rounds = f"rounds={{{ROUNDS}, weights: examples, participation: {{deadline: 0.5, minimum: 2}}}}"
    recipe = with_ports(path, *WORDS, rounds, "train.steps=6")

    async def test() -> None:
        async with deployed(recipe, tmp_path, tamper) as tasks:
            await until(lambda: held(tmp_path, "edge") == 6 and held(tmp_path, "cloud") == 3)
            ends = [tasks["client-0"], tasks["client-2"]]
            await asyncio.wait_for(asyncio.gather(*ends), 30)
            for server in ("edge", "cloud"):
                assert not tasks[server].done() or tasks[server].exception() is None

    run(test, 90)
    told = [record for record in read_records(tmp_path / "cloud" / "metrics.jsonl") if record["event"] == "round"]
    assert all(each["updates"] >= 2 for each in told if each["role"] == "edge")
    assert all(math.isfinite(each["error"]) for each in told)
