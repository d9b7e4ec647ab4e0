"""Servers that train all weights of their blocks compute what PEFT does with `modules_to_save`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from splitllm.recipe import Recipe
from tests.families import corpus, recipe, roles_of
from tests.test_exactness import adapter_of, check, compare, gradients, one_step, with_moved_b
from tests.unsplit import Unsplit

TREES: dict[str, tuple[list[int], list[str]]] = {
    "cloud": ([3], ["cloud"]),
    "edges": ([2, 4], ["edge"]),
    "edges and cloud": ([2, 4], ["edge", "cloud"]),
}


def in_full(family: str, tree: str, labels: str = "cloud", **changes: Any) -> Recipe:
    cuts, tiers = TREES[tree]
    train = {"full_tiers": tiers, **changes.pop("train", {})}
    whole = recipe(family, cuts, labels, **changes).model_dump()
    return Recipe.model_validate(whole | {"train": whole["train"] | train})


@pytest.mark.parametrize("labels", ["client", "cloud"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_loss_and_every_gradient_equal_the_unsplit_model(
    family: str, tree: str, labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(in_full(family, tree, labels), 1e-12, monkeypatch)


MODES: dict[str, dict[str, Any]] = {
    "several under way": {"train": {"in_flight": 2}},
    "recomputed": {"train": {"activation_checkpointing": True}},
    "clients together": {"server": {"batching": "synchronous"}},
    "dropout": {"lora": {"dropout": 0.3}},
    "DoRA": {"lora": {"dora": True, "rank": 4}},
}


@pytest.mark.parametrize("mode", MODES)
def test_so_they_do_in_every_mode(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, rows = in_full("gpt2", "edges and cloud", **MODES[mode]), corpus(2)
    roles = roles_of(wanted, rows)
    expected = Unsplit(wanted, rows, with_moved_b(roles)).gradients(0)
    check(gradients(roles, monkeypatch), expected, 1e-12)


@pytest.mark.parametrize("tree", TREES)
def test_steps_go_where_the_unsplit_models_go(tree: str) -> None:
    wanted, rows = in_full("gpt2", tree), corpus(2)
    roles = roles_of(wanted, rows)
    unsplit = Unsplit(wanted, rows, adapter_of(roles))
    for step in range(4):
        assert one_step(roles, step) == pytest.approx(unsplit.step(step), rel=1e-9)
    for name, tensor in adapter_of(roles).items():
        assert (unsplit.parameters[name] - tensor).abs().max() < 1e-9, name


def test_replicas_of_a_tier_stay_alike() -> None:
    roles = roles_of(in_full("gpt2", "edges"), corpus(2))
    for step in range(2):
        one_step(roles, step)
    first, second = (worker.trainable.parameters for worker in roles.workers["edge"].values())
    assert any(".lora_" not in name for name in first)
    assert all(first[name] is not second[name] and first[name].equal(second[name]) for name in first)


def test_a_state_is_all_that_a_run_goes_on_from() -> None:
    wanted, rows = in_full("gpt2", "edges and cloud"), corpus(2)
    whole, first, second = (roles_of(wanted, rows) for _ in range(3))
    for step in range(2):
        one_step(whole, step), one_step(first, step)
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    assert one_step(whole, 2) == one_step(second, 2)
    assert all(tensor.equal(adapter_of(second)[name]) for name, tensor in adapter_of(whole).items())


async def _evaluated(roles: Any) -> float:
    return sum([report.loss for report in await asyncio.gather(*(client.evaluate() for client in roles.clients))])


def test_mixed_precision_learns() -> None:
    roles = roles_of(in_full("llama", "cloud", dtype="float32", train={"mixed_precision": "bf16"}), corpus(2))
    before = asyncio.run(_evaluated(roles))
    for step in range(4):
        one_step(roles, step)
    assert asyncio.run(_evaluated(roles)) < before
