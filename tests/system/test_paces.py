"""Rounds of clients at their own pace: real roles over gRPC in one event loop, and as processes that are killed."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitllm.metrics import read_records
from splitllm.recipe import Recipe, load_recipe
from splitllm.train import train
from tests.deployment.lanes import deployed as deployed_here
from tests.deployment.lanes import kept, with_edges
from tests.faults.deployment import deployed
from tests.marks import soaked
from tests.processes import ROOT
from tests.system.test_rounds import LEARNS, POISONED, SLOW, Crawl, start
from tests.tiny import write_recipe

pytestmark = pytest.mark.system

EXACT = (
    "split.tiers={client: 4, edge: 2, cloud: 1}",
    "train.steps=6",
    "train.batch_size=1",
    "train.clip_norm=1000",
    "train.optimizer={name: sgd, lr: 0.5}",
    "model.dtype=float64",
    "model.dropout=0",
    "lora.adapters=common",
    "server.batching=continuous",
    "rounds={replicas: local, edge_every: 1, cloud_every: 1}",
)
PACED = ("lora.adapters=common", "server.batching=continuous", "server.gradient_wait=0.02")


async def ended(recipe: Recipe, folder: Path) -> None:
    async with deployed_here(recipe, folder) as tasks:
        await asyncio.wait_for(asyncio.gather(*tasks.values()), 120)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(run / "metrics.jsonl") if record["event"] == "round"]


@pytest.mark.parametrize(
    "options",
    [
        (),
        soaked(("split.client_cuts={client-1: 2, client-2: 2}", "split.cuts=[1, 3]")),
        soaked(("rounds.rule=ffa", "rounds.outer={name: fedavgm, lr: 0.7}", "rounds.prox=0.1")),
        soaked(("rounds.rule=hetlora", "lora.clients={client-1: {rank: 2}}", "rounds.weights=equal")),
    ],
    ids=["one cut", "two cuts", "outer", "ranks"],
)
def test_where_all_are_in_time_it_is_the_adapter_of_one_process(tmp_path: Path, options: tuple[str, ...]) -> None:
    recipe = with_edges(write_recipe(tmp_path), *EXACT, *options)
    asyncio.run(ended(recipe, tmp_path / "run"))
    train(recipe, tmp_path / "whole")
    found, expected = adapter(tmp_path / "run" / "cloud"), adapter(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert float((found[key] - tensor).abs().max()) <= 1e-11, key
    ours, theirs = (rounds_of(run) for run in (tmp_path / "run" / "cloud", tmp_path / "whole"))
    said = [sorted((each["step"], each["role"]) for each in each_run) for each_run in (ours, theirs)]
    assert said[0] == said[1] and len(ours) == 6 * 3


def test_whichever_server_is_killed_no_round_is_lost_and_none_counts_twice(tmp_path: Path) -> None:
    recipe, drawn = write_recipe(tmp_path), random.Random(time.time_ns())
    words = (*EXACT, "train.steps=40", "wire.keepalive=0.25")
    with deployed(recipe, tmp_path / "run", *words) as deployment:

        def steps() -> int:
            path = deployment.folder / "cloud" / "metrics.jsonl"
            records = read_records(path) if path.exists() else []
            return max((each["step"] for each in records if each["event"] == "round" and each["level"] == 2), default=0)

        deployment.start()
        for name in drawn.choices(["edge-0", "edge-1", "cloud"], k=4):
            at = steps()
            deployment.until(lambda at=at: steps() > at, f"a round after step {at}")  # type: ignore[misc]
            time.sleep(drawn.random() / 3)
            assert not deployment.said("cloud", "done"), f"it is over before {name} is killed"
            deployment.kill(name)
            deployment.start(name)
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        cloud = deployment.folder / "cloud"
        said = Counter((each["step"], each["role"]) for each in rounds_of(cloud))
        assert said.keys() == {(step, role) for step in range(1, 41) for role in ("edge-0", "edge-1", "cloud")}
        assert {each["updates"] for each in rounds_of(cloud)} == {2}  # everybody, and once
        assert all(count == 1 for (_, role), count in said.items() if role != "cloud")
        assert kept(deployment.folder / "cloud", "rounds")["number"] == 40
        summary = deployment.summary()
        assert summary["eval_loss_after"] < summary["eval_loss_before"]


@pytest.mark.soak
def test_servers_that_wait_for_nobody_end_with_one_adapter(tmp_path: Path) -> None:
    words = [word for word in EXACT if not word.startswith("rounds")]
    rounds = "rounds={replicas: local, edge_every: 1, cloud_every: 2, buffer: {size: 1, oldest: 5}}"
    recipe = with_edges(write_recipe(tmp_path), *words, rounds, "train.steps=12", "train.schedule={name: constant}")
    asyncio.run(ended(recipe, tmp_path / "run"))
    cloud = tmp_path / "run" / "cloud"
    summary = json.loads((cloud / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    steps = [each["step"] for each in rounds_of(cloud) if each["level"] == 2]
    assert len(steps) > 6 and set(steps) == {2, 4, 6, 8, 10, 12}  # one at a time, and each edge's count
    assert all(bool(tensor.isfinite().all()) for tensor in adapter(cloud).values())


def test_some_away_in_every_round_one_slow_one_sending_nan_and_nobody_waits(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    recipe, drawn = ROOT / "recipes" / "quickstart.yaml", random.Random(time.time_ns())
    intervals = ("rounds.edge_every=4", "rounds.cloud_every=8", "train.steps=24", "rounds.participation.deadline=4.0")
    words = (*LEARNS, *PACED, "split.tiers={client: 6, edge: 2, cloud: 1}", *intervals)
    clean = train(load_recipe(recipe, words), tmp_path / "clean")
    with deployed(recipe, tmp_path / "run", *words) as deployment:

        def rounds() -> int:
            path = deployment.folder / "cloud" / "metrics.jsonl"
            records = read_records(path) if path.exists() else []
            return max((each["step"] for each in records if each["event"] == "round"), default=0)

        start(deployment)
        deployment.until(lambda: rounds() >= 4, "the first round")
        crawl = Crawl(deployment, SLOW)
        crawl.start()
        others, away = (
            [name for name in deployment.names if name[:6] == "client" and name not in (SLOW, POISONED)],
            None,
        )
        for step in range(4, 24, 4):
            deployment.until(lambda step=step: rounds() >= step, f"the round of step {step}")  # type: ignore[misc]
            if away is not None:
                deployment.start(away)
            away = drawn.choice(others)
            if not deployment.said("cloud", "done"):
                deployment.kill(away)
        assert away is not None
        deployment.start(away)
        deployment.until(lambda: rounds() >= 24, "the last round")
        crawl.over.set()
        crawl.join()
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        found = deployment.summary()
        told = rounds_of(deployment.folder / "cloud")
        late = [each for name in ("edge-0", "edge-1") for each in deployment.said(name, "late for a round")]
        tensors = adapter(deployment.folder / "cloud")
    before, after = clean["eval_loss_before"], clean["eval_loss_after"]
    record_property("loss", f"clean {before:.4f} -> {after:.4f}, with faults {found['eval_loss_after']:.4f}")
    assert after < 0.9 * before, "who learns nothing is more than 3 % off"
    assert found["eval_loss_after"] < 1.03 * after
    record_property("late", sorted({each["client"] for each in late}))
    assert late or any(each["updates"] < 3 for each in told if each["level"] == 1), "nobody was left behind"
    assert all(each["rejected"] == {POISONED: "not finite"} for each in told if POISONED in each["rejected"])
    assert any(POISONED in each["rejected"] for each in told)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
