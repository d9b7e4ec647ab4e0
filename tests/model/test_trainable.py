"""Sums whose order is fixed, clipping as torch does it, and an optimiser that can be put down and taken up."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitllm.model.randomness import MicroBatchId
from splitllm.model.trainable import OrderedSum, Tensors, Trainable, clip_factor, squared_norms
from splitllm.recipe import OptimizerRecipe

RECIPE = OptimizerRecipe(lr=0.1, weight_decay=0.05, betas=(0.8, 0.95))
IDS = [MicroBatchId(3, client, number) for client in range(3) for number in range(3)]


def gradients_of(micro_batch: MicroBatchId) -> Tensors:
    """Of very different sizes, so that another order of summation gives other bits."""
    generator = torch.Generator().manual_seed(hash(micro_batch) % 2**31)
    scale = 10.0 ** (micro_batch.client * 3 + micro_batch.number)
    return {name: torch.randn(50, generator=generator) * scale for name in ("a", "b")}


def summed(order: list[MicroBatchId]) -> Tensors:
    total = OrderedSum(IDS)
    for micro_batch in order:
        total.add([micro_batch], gradients_of(micro_batch))
    return total.total()


@given(st.permutations(IDS))
def test_any_order_of_arrival_gives_the_bits_of_the_order_of_ids(order: list[MicroBatchId]) -> None:
    found = summed(order)
    for name, tensor in found.items():
        expected = gradients_of(IDS[0])[name]
        for micro_batch in IDS[1:]:
            expected = expected + gradients_of(micro_batch)[name]
        assert torch.equal(tensor, expected)


def test_the_order_of_summation_matters_here() -> None:
    backwards = sum(gradients_of(micro_batch)["a"] for micro_batch in reversed(IDS))
    assert not torch.equal(summed(IDS)["a"], backwards)


def test_a_sum_is_complete_or_not_given() -> None:
    total = OrderedSum(IDS)
    for micro_batch in IDS[1:]:
        total.add([micro_batch], gradients_of(micro_batch))
    with pytest.raises(AssertionError, match="has no gradient yet"):
        total.total()
    with pytest.raises(AssertionError):
        total.add([IDS[1]], gradients_of(IDS[1]))
    with pytest.raises(AssertionError):
        total.add([MicroBatchId(4, 0, 0)], gradients_of(IDS[0]))
    total.add([IDS[0]], gradients_of(IDS[0]))
    assert set(total.total()) == {"a", "b"}


@pytest.mark.parametrize("early", [True, False])
def test_micro_batches_that_ran_together_count_where_the_lowest_of_them_does(early: bool) -> None:
    together, rest = [IDS[2], IDS[0]], [each for each in IDS if each not in (IDS[0], IDS[2])]
    expected = sum(gradients_of(each)["a"] for each in (IDS[0], IDS[2], *rest))
    both = {name: gradients_of(IDS[0])[name] + gradients_of(IDS[2])[name] for name in ("a", "b")}
    total = OrderedSum(IDS)
    if early:
        total.add(together, both)
    for each in reversed(rest):
        total.add([each], gradients_of(each))
    if not early:
        total.add(together, both)
    assert torch.equal(total.total()["a"], expected)


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    torch.manual_seed(seed)
    return {name: nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for name in ("a", "b", "c")}


def random_gradients(seed: int, scale: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 3, generator=generator, dtype=torch.float64) * scale for name in ("a", "b", "c")}


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("limit", [0.5, 1.0, 7.0, None])
def test_clipping_is_that_of_torch(limit: float | None, scale: float) -> None:
    gradients, held = random_gradients(1, scale), parameters()
    norm = sum(squared_norms(gradients).values()) ** 0.5
    for name, parameter in held.items():
        parameter.grad = gradients[name].clone()
    theirs = torch.nn.utils.clip_grad_norm_(held.values(), torch.inf if limit is None else limit)
    factor = clip_factor(norm, limit)
    assert norm == pytest.approx(float(theirs), rel=1e-14)
    for name, parameter in held.items():
        torch.testing.assert_close(gradients[name] * factor, parameter.grad, rtol=1e-14, atol=0)
    assert (factor < 1) == (limit is not None and norm > limit)


def test_norms_are_taken_in_fp64() -> None:
    assert squared_norms({"a": torch.full((3,), 1e30)})["a"] == pytest.approx(3e60, rel=1e-6)
    assert squared_norms({}) == {}


def test_steps_are_those_of_adamw() -> None:
    ours, theirs = parameters(), parameters()
    trainable = Trainable(ours, RECIPE)
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=0.05, betas=(0.8, 0.95))
    for step, rate in enumerate([0.0, 0.5, 1.0]):
        trainable.apply(random_gradients(step), 0.25, rate)
        for name, parameter in theirs.items():
            parameter.grad = random_gradients(step)[name] * 0.25
        optimizer.param_groups[0]["lr"] = 0.1 * rate
        optimizer.step()
    assert all(torch.equal(ours[name], parameter) for name, parameter in theirs.items())


def test_gradients_are_collected_from_the_parameters_and_cleared() -> None:
    held = parameters()
    trainable = Trainable(held, RECIPE)
    trainable.expect([MicroBatchId(0, 0, 0), MicroBatchId(0, 0, 1)])
    for number in (1, 0):
        (held["a"].sum() * (number + 1)).backward()
        trainable.collect([MicroBatchId(0, 0, number)])
        assert all(parameter.grad is None for parameter in held.values())
    found = trainable.gradients()
    assert torch.equal(found["a"], torch.full_like(held["a"], 3.0))
    assert found["b"].count_nonzero() == 0  # nothing reached it


def test_a_role_that_trains_nothing_does_nothing() -> None:
    trainable = Trainable({}, RECIPE)
    trainable.expect([MicroBatchId(0, 0, 0)])
    trainable.collect([MicroBatchId(0, 0, 0)])
    assert trainable.gradients() == {}
    trainable.apply({}, 1.0, 1.0)
    assert trainable.state() == {}


def test_a_state_goes_on_bit_for_bit() -> None:
    straight = Trainable(parameters(), RECIPE)
    resumed = Trainable(parameters(seed=9), RECIPE)
    for step in range(2):
        straight.apply(random_gradients(step), 1.0, 1.0)
    resumed.apply(random_gradients(5), 1.0, 1.0)
    state = {name: tensor.clone() for name, tensor in straight.state().items()}
    assert {name.split("/")[0] for name in state} == {"adapter", "exp_avg", "exp_avg_sq", "step"}
    resumed.load({**state, "adapter/others": torch.zeros(1)})
    for step in range(2, 5):
        for trainable in (straight, resumed):
            trainable.apply(random_gradients(step), 0.5, 0.9)
    ours, theirs = straight.state(), resumed.state()
    assert set(ours) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert torch.equal(state["step/a"], torch.tensor(2.0))  # loading copies: the state stays as it was


class Looked(dict[str, torch.Tensor]):
    """Counts how often somebody goes through all of it."""

    times = 0

    def __iter__(self) -> Iterator[str]:
        self.times += 1
        return super().__iter__()

    def items(self) -> ItemsView[str, torch.Tensor]:
        self.times += 1
        return super().items()


def test_a_state_is_gone_through_once_however_many_parameters_there_are() -> None:
    trainable = Trainable({f"x{number}": nn.Parameter(torch.zeros(1)) for number in range(20)}, RECIPE)
    state = Looked(trainable.state())
    trainable.load(state)
    assert state.times == 1
    trainable.renew(state, reset=False)
    assert state.times == 2
