"""Messages count their bytes and cannot be changed on the way."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.model.randomness import MicroBatchId
from splitllm.wire.message import Message

SIZES = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([torch.float64, torch.bfloat16, torch.int32])), max_size=4
)


@given(SIZES)
def test_bytes_are_those_of_the_tensors(sizes: list[tuple[int, torch.dtype]]) -> None:
    tensors = {str(number): torch.zeros(rows, 3, dtype=dtype) for number, (rows, dtype) in enumerate(sizes)}
    message = Message("forward", "client-0", (0, 0, 0), {"lengths": [3]}, tensors)
    assert message.nbytes == sum(rows * 3 * dtype.itemsize for rows, dtype in sizes)


def test_a_message_knows_its_step_and_does_not_change() -> None:
    message = Message("open", "client-0", MicroBatchId(7, 1, 2))
    assert message.step == 7 and message.nbytes == 0
    assert not message.header and not message.tensors
    with pytest.raises(FrozenInstanceError):
        message.sender = "client-1"  # type: ignore[misc]
