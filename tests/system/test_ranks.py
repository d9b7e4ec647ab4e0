"""A server in several processes: they learn what one learns; who is killed stops all, and they go on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from splitllm.metrics import read_records
from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.faults.deployment import deployed
from tests.faults.ranks import Launched, Ranked, seconds_of
from tests.marks import soaked
from tests.processes import ROOT
from tests.tiny import write_recipe

pytestmark = pytest.mark.system

WORDS = (
    "split.tiers={client: 3, edge: 1, cloud: 1}",
    "model.dropout=0",
    "lora.dropout=0",
    "model.dtype=float64",
    "train.steps=8",
    "train.eval_every=4",
    "wire.keepalive=0.25",
)
MODES = {
    "one by one": (),
    "together": ("server.batching=synchronous",),
    "labels at the cloud": ("server.batching=synchronous", "split.labels=cloud"),
    "each its own": ("server.batching=synchronous", "lora.adapters=per_client"),
    "at their own pace": ("server.batching=continuous", "lora.adapters=per_client"),
    "checkpointed": ("train.activation_checkpointing=true", "lora.rank=2"),
    "dropout": ("server.batching=synchronous", "lora.dropout=0.2"),
    "in full": ("server.batching=synchronous", "train.full_tiers=[edge, cloud]"),
}
CLOSE = 1e-9
ENGINES = {  # overrides of the edge, and how far sums in fp32 may be off
    "fsdp2": ("server.fsdp=true",),
    "zero-1": ("server.zero={stage: 1}",),
    "zero-2, state in host memory": ("server.zero={stage: 2, offload_optimizer: cpu}",),
    "zero-3": ("server.zero={stage: 3}",),
    "zero-3 in host memory": ("server.zero={stage: 3, offload_param: cpu}",),
    "zero-3 in files": ("server.zero={{stage: 3, offload_param: nvme, nvme_path: {folder}}}",),
}
ENGINES_CLOSE = 1e-3
OF_STATE = ("zero-1", "zero-2, state in host memory")
"""They spread the optimiser's state, which is too little here to be seen in MiB: tests/engines/test_optimizer.py."""


def off(found: Path, expected: Path) -> float:
    """The largest difference of two adapters, as a part of the largest value of its tensor."""
    worst = 0.0
    for file in sorted(expected.rglob("adapter_model.safetensors")):
        ours, theirs = load_file(found / file.relative_to(expected)), load_file(file)
        assert ours.keys() == theirs.keys()
        worst = max([worst, *(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in ours)])
    return worst


def held_alone(folder: Path) -> dict[str, float]:
    """MiB of each part of the edge in one process."""
    found: dict[str, float] = json.loads((folder / "summary.json").read_text())["held_mib"]["edge"]
    return found


@pytest.mark.parametrize(
    ("server", "mode"),
    [
        *(("edge", mode) for mode in ("together", "in full")),
        *(soaked(server, mode) for server in ("edge", "cloud") for mode in sorted(MODES)),
    ],
)
def test_two_ranks_learn_what_one_process_learns(server: str, mode: str, tmp_path: Path) -> None:
    recipe, words = write_recipe(tmp_path), (*WORDS, *MODES[mode])
    train(load_recipe(recipe, words), tmp_path / "one")
    with deployed(recipe, tmp_path / "run", *words) as deployment:
        ranked = Ranked(deployment, server)
        ranked.start(2)
        deployment.start(*(name for name in deployment.names if name != server))
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        deployment.until(lambda: ranked.statuses() == [0, 0], "rank 1 to end")
        assert off(deployment.folder / "cloud" / "adapter", tmp_path / "one" / "adapter") < CLOSE


@pytest.mark.parametrize(
    ("engine", "labels"),
    [
        *((engine, "client") for engine in ("fsdp2", "zero-2, state in host memory", "zero-3 in files")),
        *(soaked(engine, labels) for engine in ENGINES for labels in ("client", "cloud")),
    ],
)
def test_two_ranks_hold_one_base_between_them(engine: str, labels: str, tmp_path: Path) -> None:
    cuts = "split.client_cuts={client-1: 2}"
    words = (*WORDS, "model.dtype=float32", "server.batching=synchronous", "lora.adapters=per_client", cuts)
    words, recipe = (*words, f"split.labels={labels}"), write_recipe(tmp_path)
    train(load_recipe(recipe, words), tmp_path / "one")
    own = [word.format(folder=tmp_path) if "{{" in word else word for word in ENGINES[engine]]
    with deployed(recipe, tmp_path / "run", *words) as deployment:
        edge = Ranked(deployment, "edge", *own)
        edge.start(2)
        deployment.start(*(name for name in deployment.names if name != "edge"))
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        deployment.until(lambda: edge.statuses() == [0, 0], "rank 1 to end")
        assert off(deployment.folder / "cloud" / "adapter", tmp_path / "one" / "adapter") < ENGINES_CLOSE
        losses = [record["loss"] for record in read_records(tmp_path / "one" / "metrics.jsonl") if "loss" in record]
        found = [r["loss"] for r in read_records(deployment.folder / "cloud" / "metrics.jsonl") if "loss" in r]
        assert found == pytest.approx(losses, abs=1e-5)
        of_rank_0, whole = deployment.summary()["held_mib"]["edge"], held_alone(tmp_path / "one")
        if engine not in OF_STATE:
            assert of_rank_0["weights"] < 0.7 * whole["weights"]


@pytest.mark.parametrize("method", [soaked("nf4"), soaked("int8")])
def test_two_ranks_have_a_quantised_base_each(method: str, tmp_path: Path) -> None:
    recipe, quantised = write_recipe(tmp_path), f"quantization={{edge: {method}}}"
    words = (*WORDS, "model.dtype=float32", "server.batching=synchronous", quantised)
    train(load_recipe(recipe, words), tmp_path / "one")
    with deployed(recipe, tmp_path / "run", *words) as deployment:
        edge = Ranked(deployment, "edge")
        edge.start(2)
        deployment.start(*(name for name in deployment.names if name != "edge"))
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert off(deployment.folder / "cloud" / "adapter", tmp_path / "one" / "adapter") < ENGINES_CLOSE


@pytest.mark.parametrize(("engine", "kills"), [(None, 2), soaked(None, 10), soaked("fsdp2", 10)])
def test_a_rank_that_is_killed_stops_all_and_they_go_on(engine: str | None, kills: int, tmp_path: Path) -> None:
    recipe, drawn = write_recipe(tmp_path), random.Random(time.time_ns())
    words = (*WORDS, "server.batching=synchronous", f"train.steps={20 * kills}")
    train(load_recipe(recipe, words), tmp_path / "one")
    with deployed(recipe, tmp_path / "run", *words) as deployment:
        edge = Ranked(deployment, "edge", *(ENGINES[engine] if engine else ()))
        edge.start(2)
        deployment.start(*(name for name in deployment.names if name != "edge"))
        for kill in range(kills):
            deployment.until_step(8 + 15 * kill)
            time.sleep(drawn.random() / 4)
            rank = drawn.randrange(2)
            left = "edge" if rank else "edge-rank-1"
            before = len(deployment.complaints(left))
            assert edge.kill(rank) == [1], deployment.tails()
            said = deployment.complaints(left)[before:]
            in_step = f"rank {1 - rank} of 2 could not compute its share (RuntimeError: "  # for want of the other
            assert f"rank {rank} of 2 is gone" in said or (engine and in_step in said), said
            edge.start(2)
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert off(deployment.folder / "cloud" / "adapter", tmp_path / "one" / "adapter") < CLOSE


@pytest.mark.parametrize("engine", ["zero-2, state in host memory", soaked("zero-3 in host memory")])
def test_a_server_goes_on_with_another_number_of_ranks(engine: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    words = (*WORDS, "model.dtype=float32", "server.batching=synchronous", "train.steps=30")
    train(load_recipe(recipe, words), tmp_path / "one")
    with deployed(recipe, tmp_path / "run", *words) as deployment:
        edge = Ranked(deployment, "edge", *ENGINES[engine])
        edge.start(2)
        deployment.start(*(name for name in deployment.names if name != "edge"))
        for step, count in ((8, 1), (16, 3)):
            deployment.until_step(step)
            edge.kill(0)
            edge.start(count)
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert off(deployment.folder / "cloud" / "adapter", tmp_path / "one" / "adapter") < ENGINES_CLOSE


def test_accelerate_launches_a_server_and_who_waits_does_not_spin(tmp_path: Path) -> None:
    recipe, words = write_recipe(tmp_path), (*WORDS, "server.batching=synchronous")
    train(load_recipe(recipe, words), tmp_path / "one")
    with deployed(recipe, tmp_path / "run", *words) as deployment:
        edge = Launched(deployment, "edge", ROOT / "recipes" / "accelerate" / "cpu.yaml")
        try:
            deployment.start("cloud")
            deployment.until(lambda: bool(deployment.said("edge", "follows")), "rank 1 to wait")
            before = [seconds_of(pid) for pid in edge.ranks()]
            time.sleep(3)
            spent = [seconds_of(pid) - then for pid, then in zip(edge.ranks(), before, strict=True)]
            assert len(spent) == 2
            assert max(spent) < 0.3, spent
            deployment.start(*(name for name in deployment.names if name not in ("edge", "cloud")))
            assert set(deployment.finish().values()) == {0}, deployment.tails()
            assert edge.wait() == 0
        finally:
            edge.end()
        assert off(deployment.folder / "cloud" / "adapter", tmp_path / "one" / "adapter") < CLOSE


@pytest.mark.parametrize("rank", [1, soaked(0)])
def test_accelerate_ends_all_when_a_rank_is_killed(rank: int, tmp_path: Path) -> None:
    recipe, words = write_recipe(tmp_path), (*WORDS, "train.steps=2000")
    with deployed(recipe, tmp_path / "run", *words) as deployment:
        edge = Launched(deployment, "edge", ROOT / "recipes" / "accelerate" / "cpu.yaml")
        try:
            deployment.start(*(name for name in deployment.names if name != "edge"))
            deployment.until_step(3)
            ranks = edge.ranks()
            os.kill(ranks[rank], signal.SIGKILL)
            assert edge.wait() == 1
            deployment.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), "all ranks to end")
            assert all(deployment.running[name].status is None for name in deployment.running)
        finally:
            edge.end()


def test_a_server_that_is_asked_to_stop_stops_with_all_its_ranks(tmp_path: Path) -> None:
    recipe, words = write_recipe(tmp_path), (*WORDS, "train.steps=2000")
    with deployed(recipe, tmp_path / "run", *words) as deployment:
        edge = Ranked(deployment, "edge")
        edge.start(2)
        deployment.start(*(name for name in deployment.names if name != "edge"))
        deployment.until_step(3)
        for rank in (1, 0):
            edge.processes[rank].signal(signal.SIGTERM)
        deployment.until(lambda: edge.statuses() == [1, 1], "all ranks to end")
        assert deployment.complaints("edge").startswith("stopped; start it again")
        assert deployment.complaints("edge-rank-1") == ""
        assert all(deployment.running[name].status is None for name in deployment.names if name != "edge")


def test_a_server_that_is_refused_ends_with_all_its_ranks(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with deployed(recipe, tmp_path / "run", *WORDS) as deployment:
        deployment.start("cloud")
        edge = Ranked(deployment, "edge", "train.steps=9")
        edge.start(2)
        deployment.until(lambda: None not in edge.statuses(), "all ranks to end")
        assert edge.statuses() == [1, 0]
        assert "has another recipe than cloud" in deployment.complaints("edge")
        assert deployment.complaints("edge-rank-1") == ""


@pytest.mark.soak
def test_ranks_of_a_server_whose_run_was_complete_end_as_it_does(tmp_path: Path) -> None:
    recipe, words = write_recipe(tmp_path), (*WORDS, "train.steps=2", "train.eval_every=null")
    with deployed(recipe, tmp_path / "run", *words) as deployment:
        deployment.start()
        assert set(deployment.finish().values()) == {0}, deployment.tails()
        edge = Ranked(deployment, "edge")
        edge.start(2)
        deployment.until(lambda: None not in edge.statuses(), "all ranks to end")
        assert edge.statuses() == [0, 0], deployment.tails()
