"""AdamW with its state spread is torch's AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from splitllm.engines.optimizer import SpreadAdamW
from splitllm.errors import CheckpointError
from splitllm.model.randomness import MicroBatchId
from splitllm.model.trainable import Trainable
from splitllm.recipe import OptimizerRecipe, ZeroRecipe
from tests.grids import each_fast

RECIPE = OptimizerRecipe(lr=1e-2, weight_decay=0.1)
SHAPES = {"a": (4, 16), "b": (33, 4), "c": (7,)}
ZEROS: list[Any] = each_fast(
    ZeroRecipe(stage=2),
    slow=[
        ZeroRecipe(stage=1),
        ZeroRecipe(stage=1, offload_optimizer="cpu"),
        ZeroRecipe(stage=2, offload_optimizer="cpu"),
    ],
)
FIRST = MicroBatchId(0, 0, 0)


def both(zero: ZeroRecipe) -> tuple[Trainable, Trainable]:
    """Plain, and with its state spread."""
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    plain, spread = ({name: nn.Parameter(t.clone()) for name, t in start.items()} for _ in range(2))
    return Trainable(plain, RECIPE), Trainable(spread, RECIPE, build=lambda ps, recipe: SpreadAdamW(ps, recipe, zero))


def step(trainables: tuple[Trainable, ...], *seeds: int) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        gradients = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for each in trainables:
            each.apply(gradients, 0.5, 1.0 + seed)


def assert_same(plain: Trainable, spread: Trainable) -> None:
    known, found = plain.state(), spread.state()
    assert known.keys() == found.keys()
    for name, tensor in known.items():
        assert torch.equal(tensor, found[name]), name
        assert tensor.dtype == found[name].dtype


@pytest.mark.parametrize("zero", ZEROS, ids=str)
def test_steps_and_states_are_those_of_torch(zero: ZeroRecipe) -> None:
    plain, spread = both(zero)
    assert_same(plain, spread)
    step((plain, spread), 1, 2, 3)
    assert_same(plain, spread)


def test_a_journal_of_one_is_read_by_the_other_before_its_first_step_and_after() -> None:
    plain, spread = both(ZeroRecipe(stage=2))
    step((plain,), 1, 2)
    spread.load(plain.state())
    assert_same(plain, spread)
    step((plain, spread), 3)
    assert_same(plain, spread)
    plain, again = both(ZeroRecipe(stage=2))
    plain.load(spread.state())
    again.load(both(ZeroRecipe(stage=2))[0].state())
    again.load(spread.state())
    step((plain, spread, again), 4)
    assert_same(plain, spread)
    assert_same(plain, again)


def test_a_new_start_forgets_the_moments() -> None:
    plain, spread = both(ZeroRecipe(stage=1))
    start = {name: tensor.clone() for name, tensor in plain.state().items()}
    step((plain, spread), 1)
    for each in (plain, spread):
        each.load(start)
    assert_same(plain, spread)
    step((plain, spread), 2)
    assert_same(plain, spread)


def test_tensors_that_took_other_numbers_of_steps_are_refused() -> None:
    plain, spread = both(ZeroRecipe(stage=1))
    step((plain,), 1)
    state = plain.state()
    state["step/a"] = torch.tensor(5.0)
    spread.load(state)
    with pytest.raises(CheckpointError, match=r"server\.zero\.stage: 1 and 2 need adapters of which all tensors"):
        step((spread,), 2)


def test_a_backward_of_ours_is_left_alone() -> None:
    _, spread = both(ZeroRecipe(stage=2))
    spread.expect([FIRST])
    sum(parameter.square().sum() for parameter in spread.parameters.values()).backward()  # type: ignore[union-attr]
    known = {name: 2 * parameter.detach() for name, parameter in spread.parameters.items()}
    spread.collect([FIRST])
    assert {name: torch.equal(known[name], gradient) for name, gradient in spread.gradients().items()} == dict.fromkeys(
        SHAPES, True
    )


def test_what_it_holds_is_counted() -> None:
    plain, spread = both(ZeroRecipe(stage=1))
    step((plain, spread), 1)
    adapter = sum(parameter.nbytes for parameter in plain.parameters.values())
    assert plain.nbytes() == 3 * adapter + 4 * len(SHAPES)
    assert 4 * adapter <= spread.nbytes() < 4 * adapter + 64, "in one process; parts are rounded up"
