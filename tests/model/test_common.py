"""What is common steps by the weighted mean of what was given, each step of each client once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitllm.model.common import Buffer, Common, Gift
from splitllm.model.trainable import Tensors, Trainable
from splitllm.recipe import OptimizerRecipe

SHAPE = (2, 3)
OPTIMIZER = OptimizerRecipe(lr=0.1, weight_decay=0.01)


def trainable() -> Trainable:
    return Trainable({"a": nn.Parameter(torch.ones(SHAPE, dtype=torch.float64))}, OPTIMIZER)


def gradient(seed: int) -> Tensors:
    return {"a": torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def give(common: Common, client: int, step: int, labels: int = 1, tokens: int = 1, factor: float = 1.0) -> Tensors:
    found = gradient(100 * client + step)
    common.give(Gift(client, step, labels, tokens), found, factor, rate=1.0)
    return found


@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(0.1, 1.0)), min_size=1, max_size=9),
    st.integers(1, 4),
    st.booleans(),
)
def test_it_steps_by_the_weighted_mean(gifts: list[tuple[int, float]], tenants: int, by_labels: bool) -> None:
    common, alone = Common(trainable(), Buffer(tenants, None, by_labels)), trainable()
    steps = 0
    for first in range(0, len(gifts), tenants):
        batch = gifts[first : first + tenants]
        found = [
            (give(common, index, 0, labels, factor=factor)["a"] * factor, labels if by_labels else min(1, labels))
            for index, (labels, factor) in enumerate(batch, start=first)
        ]
        total = sum(weight for _, weight in found)
        if len(batch) == tenants and total:
            alone.apply({"a": sum(g * weight for g, weight in found) / total}, 1.0, 1.0)
            steps += 1
        torch.testing.assert_close(common.adapter()["a"], alone.parameters["a"].detach(), rtol=1e-12, atol=1e-12)
    assert common.steps == steps


def test_a_step_that_is_run_again_does_not_count_again() -> None:
    once, twice = Common(trainable(), Buffer(2)), Common(trainable(), Buffer(2))
    for client, step in [(0, 0), (0, 1), (1, 0), (0, 2)]:
        give(once, client, step)
    for client, step in [(0, 0), (0, 0), (0, 1), (1, 0), (0, 1), (0, 2)]:
        give(twice, client, step)
    assert torch.equal(once.adapter()["a"], twice.adapter()["a"]) and once.given == twice.given == {0: 3, 1: 1}
    assert once.changes == twice.changes == 6


def test_tokens_fill_it_too() -> None:
    common = Common(trainable(), Buffer(tokens=10))
    for step, (tokens, steps) in enumerate([(4, 0), (5, 0), (1, 1), (9, 1), (30, 2)]):
        give(common, 0, step, tokens=tokens)
        assert common.steps == steps


def test_a_copy_stays_as_it_is_until_it_is_lent_again() -> None:
    common, copy = Common(trainable(), Buffer(1)), trainable()
    common.lend(copy)
    give(common, 0, 0)
    assert torch.equal(copy.parameters["a"], torch.ones(SHAPE, dtype=torch.float64))
    common.lend(copy)
    assert torch.equal(copy.parameters["a"], common.adapter()["a"])
    assert not torch.equal(copy.parameters["a"], torch.ones(SHAPE, dtype=torch.float64))


@pytest.mark.parametrize("after", range(5))
def test_it_goes_on_from_its_state(after: int) -> None:
    gifts = [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1)]
    whole, first, second = (Common(trainable(), Buffer(2)) for _ in range(3))
    for client, step in gifts:
        give(whole, client, step)
    for client, step in gifts[:after]:
        give(first, client, step)
    tensors, values = first.state()
    second.load({name: tensor.clone() for name, tensor in tensors.items()}, values)
    for client, step in gifts[after:]:
        give(second, client, step)
    whole.step()
    second.step()
    assert torch.equal(whole.adapter()["a"], second.adapter()["a"])
    assert whole.state()[1] == second.state()[1] and second.state()[1]["pending"][:3] == [0, 0, 0.0]


def test_whoever_has_no_labels_gives_nothing_and_is_counted() -> None:
    common = Common(trainable(), Buffer(2))
    give(common, 0, 0, labels=0)
    give(common, 1, 0, labels=0)
    assert common.steps == 0 and common.given == {0: 1, 1: 1}
    assert torch.equal(common.adapter()["a"], torch.ones(SHAPE, dtype=torch.float64))


def test_a_buffer_steps_at_the_mean_of_its_learning_rates() -> None:
    common, alone = Common(trainable(), Buffer(2)), trainable()
    found = [gradient(client) for client in range(2)]
    for client, rate in enumerate((0.0, 1.0)):
        common.give(Gift(client, 0, 1 + 2 * client, 1), found[client], 1.0, rate)
    alone.apply({"a": (found[0]["a"] + 3 * found[1]["a"]) / 4}, 1.0, 0.75)
    torch.testing.assert_close(common.adapter()["a"], alone.parameters["a"].detach(), rtol=1e-12, atol=1e-12)


def test_it_goes_on_from_what_a_round_made_of_it_and_keeps_what_came_meanwhile() -> None:
    common = Common(trainable(), Buffer(1))
    give(common, 0, 0)
    before = common.adapter()
    made = {"a": before["a"] + 10.0}
    common.go_on(before, made, 5)
    assert torch.equal(common.adapter()["a"], made["a"])
    sent = common.adapter()
    give(common, 1, 0)
    moved = common.adapter()["a"] - sent["a"]
    assert bool(moved.any())
    common.go_on(sent, {"a": sent["a"] - 3.0}, 10)
    torch.testing.assert_close(common.adapter()["a"], sent["a"] - 3.0 + moved, rtol=0, atol=1e-12)
    now = common.adapter()["a"].clone()
    common.go_on(sent, {"a": sent["a"] * 7.0}, 10)  # the same round again, after a restart
    assert torch.equal(common.adapter()["a"], now)


def test_after_its_last_round_nothing_more_is_added_and_a_restart_knows_so() -> None:
    common = Common(trainable(), Buffer(1))
    give(common, 0, 0)
    common.go_on(common.adapter(), common.adapter(), 8, last=True)
    end = common.adapter()["a"].clone()
    give(common, 1, 0)
    assert torch.equal(common.adapter()["a"], end) and common.given == {0: 1, 1: 1}
    other = Common(trainable(), Buffer(1))
    other.load(*common.state())
    give(other, 2, 0)
    assert torch.equal(other.adapter()["a"], end)


def test_a_round_may_make_it_forget_its_moments() -> None:
    kept, reset = Common(trainable(), Buffer(1)), Common(trainable(), Buffer(1))
    for common in (kept, reset):
        give(common, 0, 0)
    for common, forgets in ((kept, False), (reset, True)):
        common.go_on(common.adapter(), common.adapter(), 1, reset=forgets)
    assert any(key.startswith("exp_avg/") for key in kept.state()[0])
    assert not any(key.startswith("exp_avg/") for key in reset.state()[0])
