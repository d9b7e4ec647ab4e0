"""Updates are vectors and come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splitllm.privacy.vectors import flatten, unflatten

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
