"""Masks of adapters: keyed by micro-batch and module, over real tokens, whoever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.model.dropout import AdapterDropout, dropped
from splitllm.model.joined import Joined, Rows
from splitllm.model.padding import beside
from splitllm.model.randomness import DropoutKey, MicroBatchId

WIDTH = 5


def rows(client: int, *lengths: int) -> Rows:
    return Rows(MicroBatchId(3, client, 0), lengths)


def ones(member: Rows, width: int | None = None) -> torch.Tensor:
    return torch.ones(len(member.lengths), width or max(member.lengths), WIDTH)


def real(x_BSD: torch.Tensor, member: Rows) -> torch.Tensor:
    return torch.cat([x_BSD[row, :length] for row, length in enumerate(member.lengths)])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_a_mask_does_not_depend_on_padding_or_on_who_else_is_there(mine: list[int], others: list[int]) -> None:
    member, other = rows(0, *mine), rows(1, *others)
    alone = dropped(ones(member), [member], lambda _: 0.5, 7, "m")
    both = dropped(beside(ones(other), ones(member)), [other, member], lambda _: 0.5, 7, "m")
    assert torch.equal(real(both[len(others) :], member), real(alone, member))


def test_masks_differ_by_seed_client_and_module_and_rates_by_client() -> None:
    member, other = rows(0, 40), rows(1, 40)
    first = dropped(ones(member), [member], lambda _: 0.5, 7, "m")
    assert not torch.equal(first, dropped(ones(member), [member], lambda _: 0.5, 8, "m"))
    assert not torch.equal(first, dropped(ones(member), [member], lambda _: 0.5, 7, "n"))
    both = dropped(beside(ones(member), ones(other)), [member, other], {0: 0.5, 1: 0.0}.__getitem__, 7, "m")
    assert torch.equal(both[0], first[0]) and torch.equal(both[1], ones(other)[0])
    assert set(first.unique().tolist()) == {0.0, 2.0}


def test_values_are_dropped_at_the_rate() -> None:
    member = rows(0, 4000)
    kept = dropped(ones(member), [member], lambda _: 0.2, 7, "m")
    assert float((kept == 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.01)


def test_a_mask_does_not_depend_on_the_dtype_that_a_model_is_being_loaded_in_meanwhile() -> None:
    member, before = rows(0, 40), torch.get_default_dtype()
    masks = []
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)  # transformers sets it for all threads while it builds a model
            masks.append(dropped(ones(member).float(), [member], lambda _: 0.5, 7, "m"))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(*masks)


def test_in_evaluation_nothing_is_dropped_and_without_a_key_pytorch_drops() -> None:
    module = AdapterDropout(0.5, "m", 0, DropoutKey(7))
    x_BSD = torch.ones(2, 30, WIDTH)
    assert module.eval()(x_BSD) is x_BSD
    assert set(module.train()(x_BSD).unique().tolist()) == {0.0, 2.0}
    module.key.begin(Joined((rows(0, 30, 30),)))
    assert torch.equal(module(x_BSD), module(x_BSD))
