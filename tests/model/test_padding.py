"""Padding never travels: real tokens out, real tokens in, and so do gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.model.padding import pad, real_positions, unpad

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def tokens(lengths: list[int], width: int = 3) -> torch.Tensor:
    return torch.arange(1.0, sum(lengths) * width + 1).reshape(-1, width)


@given(LENGTHS)
def test_unpad_undoes_pad(lengths: list[int]) -> None:
    hidden_TD = tokens(lengths)
    padded_BSD = pad(hidden_TD, lengths)
    assert padded_BSD.shape == (len(lengths), max(lengths), 3)
    assert torch.equal(unpad(padded_BSD, lengths), hidden_TD)


@given(LENGTHS)
def test_rows_lie_to_the_left_and_the_rest_is_zero(lengths: list[int]) -> None:
    hidden_TD = tokens(lengths)
    for row, length, own in zip(pad(hidden_TD, lengths), lengths, hidden_TD.split(lengths), strict=True):
        assert torch.equal(row[:length], own)
        assert row[length:].count_nonzero() == 0


@given(LENGTHS)
def test_what_the_padding_holds_is_never_seen(lengths: list[int]) -> None:
    hidden_TD = tokens(lengths)
    padded_BSD = pad(hidden_TD, lengths).clone()
    for row, length in zip(padded_BSD, lengths, strict=True):
        row[length:] = float("nan")
    assert torch.equal(unpad(padded_BSD, lengths), hidden_TD)


@given(LENGTHS)
def test_gradients_are_the_same_way_in_reverse(lengths: list[int]) -> None:
    hidden_TD = tokens(lengths).requires_grad_()
    padded_BSD = pad(hidden_TD, lengths)
    weights_BSD = torch.arange(1.0, padded_BSD.numel() + 1).reshape(padded_BSD.shape)
    (padded_BSD * weights_BSD).sum().backward()
    assert torch.equal(hidden_TD.grad, unpad(weights_BSD, lengths))
    whole_BSD = torch.zeros(len(lengths), max(lengths), 3, requires_grad=True)
    (unpad(whole_BSD, lengths) * tokens(lengths)).sum().backward()
    assert torch.equal(whole_BSD.grad, pad(tokens(lengths), lengths))


@given(LENGTHS)
def test_positions_count_row_after_row(lengths: list[int]) -> None:
    wanted = [row * max(lengths) + column for row, length in enumerate(lengths) for column in range(length)]
    assert real_positions(lengths, torch.device("cpu")).tolist() == wanted


def test_full_rows_are_not_copied() -> None:
    hidden_TD = tokens([4, 4])
    assert pad(hidden_TD, [4, 4]).data_ptr() == hidden_TD.data_ptr()
    assert unpad(pad(hidden_TD, [4, 4]), [4, 4]).data_ptr() == hidden_TD.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    assert unpad(pad(tokens([1, 3]).to(dtype), [1, 3]), [1, 3]).dtype == dtype
