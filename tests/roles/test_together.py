"""Small things that client and server do alike."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import PeerError
from splitllm.roles.together import LARGEST_NORM, Crossed, expected, finite, gathered
from splitllm.wire.link import Traffic
from splitllm.wire.message import Message


def test_a_tensor_that_is_due_is_there_in_its_shape_and_of_floats() -> None:
    message = Message("forward", "cloud", (0, 0, 0), tensors={"rows_ND": torch.ones(2, 3), "n": torch.ones(2).int()})
    assert expected(message, "rows_ND", (2, 3)) is message.tensors["rows_ND"]
    for name, shape, found in [("rows_ND", (3, 2), "[2, 3] of torch.float32"), ("gradient_TD", (1,), "nothing")]:
        with pytest.raises(PeerError) as error:
            expected(message, name, shape)
        text = f"cloud sent forward with {found} as {name}; {list(shape)} is needed"
        assert str(error.value) == text
    with pytest.raises(PeerError, match=r"torch\.int32"):
        expected(message, "n", (2,))


def test_when_one_fails_the_others_are_cancelled_before_its_error_arrives() -> None:
    async def run() -> list[str]:
        ends: list[str] = []

        async def slow() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ends.append("cancelled")

        async def fail() -> None:
            await asyncio.sleep(0)
            raise PeerError("broken")

        with pytest.raises(PeerError, match="broken"):
            await gathered([slow(), fail(), slow()])
        return ends

    assert asyncio.run(run()) == ["cancelled", "cancelled"]


def test_results_come_in_the_order_of_the_jobs() -> None:
    async def after(ticks: int) -> int:
        for _ in range(ticks):
            await asyncio.sleep(0)
        return ticks

    assert asyncio.run(gathered(after(ticks) for ticks in (5, 0, 3))) == [5, 0, 3]


def test_bytes_are_those_since_it_was_last_asked() -> None:
    traffic = Traffic(7, 5)
    crossed = Crossed(traffic)
    assert crossed.since_asked() == [7, 5]
    traffic.up += 10
    assert crossed.since_asked() == [10, 0] and crossed.since_asked() == [0, 0]


@given(st.floats())
def test_every_norm_can_travel_and_none_stands_for_what_is_not_finite(value: float) -> None:
    sent = finite(value)
    assert json.loads(json.dumps(sent, allow_nan=False)) == sent
    assert (sent == value) if abs(value) <= LARGEST_NORM else sent is None
