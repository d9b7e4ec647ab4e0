"""Updates are vectors and come back; the weighted mean of a secret sum is that of the members."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import DivergedError, PrivacyError
from splitllm.privacy.fixedpoint import FixedPoint
from splitllm.privacy.vectors import flatten, mean, unflatten, weighted
from tests.privacy.rounds import NAMES, Played, terms

UPDATE = {
    "b": torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16),
    "a.weight": torch.tensor([0.1, 3.0], dtype=torch.float32),
    "c": torch.tensor(0.1, dtype=torch.float64),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in UPDATE.items()}


def test_any_dtype_comes_back_exactly_and_in_the_order_of_names() -> None:
    vector = flatten(UPDATE)
    assert vector.dtype == np.float64
    assert vector.tolist() == [np.float64(np.float32(0.1)), 3.0, 1.0, -2.0, 0.1]
    assert (flatten(dict(reversed(UPDATE.items()))) == vector).all()
    for name, tensor in unflatten(vector, SHAPES).items():
        assert torch.equal(tensor, UPDATE[name].double()) and tensor.shape == UPDATE[name].shape


def test_what_comes_back_is_a_copy() -> None:
    vector = flatten(UPDATE)
    unflatten(vector, SHAPES)["b"].zero_()
    assert (vector == flatten(UPDATE)).all()


def test_nothing_is_a_vector_of_nothing() -> None:
    assert flatten({}).shape == (0,) and unflatten(np.zeros(0), {}) == {}


@pytest.mark.parametrize("size", [4, 6])
def test_another_number_of_values_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="tensors of 5"):
        unflatten(np.zeros(size), SHAPES)


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(-1, 1)), min_size=2, max_size=8))
def test_the_mean_is_the_weighted_mean_within_half_a_step(members: list[tuple[int, float]]) -> None:
    fixed = FixedPoint.finest(1.0, len(members), 64)
    total = np.zeros(2, np.uint64)
    for weight, value in members:
        total += weighted(np.array([value]), weight, 1000, fixed)
    found, weight = mean(fixed.integers(total), 1000, fixed)
    assert weight == sum(weight for weight, _ in members)
    wanted = sum(weight * Fraction(value) for weight, value in members) / weight
    assert abs(wanted - Fraction(float(found[0]))) <= 1000 * len(members) * 2.0**-fixed.fraction_bits / weight


def test_a_whole_secret_mean_of_tensors() -> None:
    """10 x 1 and 30 x 3 of client-0 and client-1; client-10 is lost."""
    agreed = terms(3, 2, size=5 + 1, word_bits=64)
    updates = [torch.full((5,), value) for value in (0.1, 0.3, 0.9)]
    words = {
        name: weighted(flatten({"w": update}), weight, 100, agreed.fixed)
        for name, update, weight in zip(NAMES, updates, (10, 30, 50), strict=False)
    }
    total = Played(agreed, words, {"client-10": "masked"}).total()
    vector, weight = mean(agreed.fixed.integers(total), 100, agreed.fixed)
    assert weight == 40
    torch.testing.assert_close(unflatten(vector, {"w": (5,)})["w"], torch.full((5,), 0.25).double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("weight", "most"), [(0, 10), (-1, 10), (11, 10), (1, 17), (17, 17)])
def test_weights_that_cannot_be_summed_are_refused(weight: int, most: int) -> None:
    with pytest.raises(PrivacyError, match="weight"):
        weighted(np.zeros(1), weight, most, FixedPoint(1.0, 4, 3))


def test_an_update_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DivergedError):
        weighted(np.array([np.nan]), 1, 1, FixedPoint(1.0, 4, 3))


def test_weights_that_add_up_to_nothing_are_refused() -> None:
    with pytest.raises(PrivacyError, match="add up to 0"):
        mean(np.zeros(3, np.int64), 1, FixedPoint(1.0, 4, 3))
