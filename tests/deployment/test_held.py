"""Clients that go at their own pace and train the blocks above them together: real roles over gRPC."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from splitllm.deployment.held import Held
from splitllm.deployment.journal import Journal
from splitllm.errors import CheckpointError
from splitllm.metrics import read_records
from splitllm.model.common import Buffer, Common, Gift
from splitllm.model.trainable import Trainable
from splitllm.recipe import OptimizerRecipe, Recipe
from splitllm.train import train
from splitllm.wire.message import Message
from tests.deployment.lanes import adapter, adapters, deployed, kept, with_ports
from tests.tiny import write_recipe
from tests.wire.serving import run

WORDS = (
    "train.log_every=1",
    "model.dtype=float64",
    "model.dropout=0",
    "split.tiers={client: 3, edge: 1, cloud: 1}",
    "split.client_cuts={client-2: 2}",
    "lora.adapters=common",
    "train.clip_norm=1e6",
    "server.wait=0.03",
    "train.schedule={name: constant}",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def recipe_of(path: Path, *words: str) -> Recipe:
    return with_ports(path, *WORDS, "server.batching=continuous", *words)


def deploy(recipe: Recipe, folder: Path) -> None:
    async def test() -> None:
        async with deployed(recipe, folder) as tasks:
            for task in tasks.values():
                await task

    run(test, 60)


def errors(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Of every tensor, as a share of its largest value."""
    pairs = {(name, key): (found[name][key], tensor) for name in expected for key, tensor in expected[name].items()}
    return {
        f"{n}: {k}": float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for (n, k), (a, b) in pairs.items()
    }


@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_one_step_of_all_is_that_of_the_mean_of_them(path: Path, tmp_path: Path, labels: str) -> None:
    words = ("train.steps=1", f"split.labels={labels}", "train.loss_weights=tenant")
    train(with_ports(path, *WORDS, *words), tmp_path / "alike" / "cloud")
    deploy(recipe_of(path, *words), tmp_path)
    found = errors(adapters(tmp_path), adapters(tmp_path / "alike"))
    assert not {key: error for key, error in found.items() if error > 1e-9}


def test_one_client_alone_learns_what_it_learns_in_train(path: Path, tmp_path: Path) -> None:
    words = ("split.tiers={client: 1, edge: 1, cloud: 1}", "split.client_cuts={}", "train.steps=4")
    words = (*words, "train.clip_norm=0.1", "train.eval_every=1")
    train(with_ports(path, *WORDS, *words), tmp_path / "alike")
    deploy(recipe_of(path, *words), tmp_path)
    runs = tmp_path / "cloud", tmp_path / "alike"
    found, expected = (adapter(run / "adapter" / "client") for run in runs)
    told, losses = ([r["loss"] for r in read_records(run / "metrics.jsonl") if r["event"] == "eval"] for run in runs)
    assert told == pytest.approx(losses, rel=1e-9) and len(losses) > 2
    assert not {key: error for key, error in errors({"": found}, {"": expected}).items() if error > 1e-9}


@pytest.mark.parametrize(
    ("when", "optimizer_steps"),
    [
        ("step_tenants=2", 6),
        ("step_tokens=1", 12),
        pytest.param("step_tenants=1", 12, marks=pytest.mark.system),
        pytest.param("step_tenants=5", 3, marks=pytest.mark.system),
    ],
)
def test_every_step_of_every_client_is_in_it_once(path: Path, tmp_path: Path, when: str, optimizer_steps: int) -> None:
    deploy(recipe_of(path, "train.steps=4", f"server.{when}"), tmp_path)
    for server in ("edge", "cloud"):
        values = kept(tmp_path / server)
        assert values["given"] == {"0": 4, "1": 4, "2": 4} and values["steps"] == optimizer_steps
        assert values["changes"] == 12 + optimizer_steps and values["pending"][:3] == [0, 0, 0.0]
    losses = [r["loss"] for r in read_records(tmp_path / "cloud" / "metrics.jsonl") if r["event"] == "eval"]
    assert sum(losses[-3:]) < sum(losses[:3])
    summary = json.loads((tmp_path / "cloud" / "summary.json").read_text())
    assert summary["common_steps"] == {"edge": optimizer_steps, "cloud": optimizer_steps}
    told = [client["eval_loss_after"] for client in summary["clients"].values()]
    assert list(summary["clients"]) == ["client-0", "client-1", "client-2"] and sorted(told) == sorted(losses[-3:])
    first, *others = adapters(tmp_path).values()
    for key, tensor in first.items():
        together = ".h.2." in key or ".h.3." in key
        assert all(torch.equal(other[key], tensor) == together for other in others) or "lora_A" in key


def common() -> Common:
    return Common(Trainable({"a": nn.Parameter(torch.ones(3))}, OptimizerRecipe()), Buffer(2))


def held(of: Common, folder: Path, first: int = 0, second: int = 0) -> Held:
    return Held(of, Journal(folder, {"role": "edge"}), 2, {0: first, 1: second})


def give(to: Common, client: int, step: int) -> None:
    to.give(Gift(client, step, 1, 1), {"a": torch.tensor([1.0, 2.0, 3.0 + step + client])}, 1.0, 1.0)


def test_an_older_state_never_replaces_a_newer_one(tmp_path: Path) -> None:
    first = common()
    keeper = held(first, tmp_path)
    give(first, 0, 0)
    older = keeper.keeping()
    give(first, 1, 0)
    newer = keeper.keeping()
    give(first, 0, 1)
    older()
    newer()
    keeper._journal.close()
    second = common()
    held(second, tmp_path, 1, 1)
    assert second.given == {0: 1, 1: 1} and second.steps == 1
    give(second, 0, 1)
    assert torch.equal(first.adapter()["a"], second.adapter()["a"]) and first.state()[1] == second.state()[1]


def test_what_is_pending_is_stepped_by_once_nothing_more_will_come(tmp_path: Path) -> None:
    of = common()
    keeper = held(of, tmp_path)
    for client, step in ((0, 0), (0, 1), (1, 0)):
        give(of, client, step)
    before = keeper.final()["a"]
    assert of.steps == 1
    keeper.over(1)
    assert not torch.equal(keeper.final()["a"], before) and of.steps == 2
    keeper.final()
    assert of.steps == 2


@pytest.mark.parametrize("what", ["gone", "damaged"])
def test_what_lanes_have_committed_must_be_in_it(tmp_path: Path, what: str) -> None:
    of = common()
    keeper = held(of, tmp_path)
    for step in range(2):
        give(of, 0, step)
        keeper.keeping()()
    keeper._journal.close()
    newest = max(tmp_path.glob("step-*"), key=lambda place: int(place.stem.partition("-")[2]))
    newest.write_bytes(newest.read_bytes()[:-1])
    if what == "gone":
        for entry in tmp_path.glob("step-*"):
            entry.unlink()
    said = (
        rf"what all lanes train has {int(what == 'damaged')} steps of client 0, whose lane has committed 2; give a new"
    )
    with pytest.raises(CheckpointError, match=said):
        held(common(), tmp_path, 2)


def test_a_gift_weighs_what_the_server_has_seen_whatever_its_client_says(path: Path, tmp_path: Path) -> None:
    given: dict[str, list[Gift]] = {}

    def lie(message: Message) -> Message:
        if message.kind != "close":
            return message
        return replace(message, header={**message.header, "losses": {"1": [1.0, 1 << 52, 1 << 52]}})

    def note(self: Common, gift: Gift, *more: Any) -> None:
        given.setdefault(f"client-{gift.client}", []).append(gift)
        return give_really(self, gift, *more)

    give_really = Common.give
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Common, "give", note)
        recipe = recipe_of(path, "train.steps=2", "server.step_tokens=1000")

        async def test() -> None:
            async with deployed(recipe, tmp_path, lie) as tasks:
                await asyncio.gather(*tasks.values())

        run(test, 60)
    assert {name: len(gifts) for name, gifts in given.items()} == {"client-0": 4, "client-1": 4, "client-2": 4}
    assert all(0 < gift.labels <= gift.tokens < 1000 for gifts in given.values() for gift in gifts)
