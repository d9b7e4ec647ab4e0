"""Small things that client and server do alike."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

import torch

from splitllm.errors import PeerError
from splitllm.wire.link import Traffic
from splitllm.wire.message import Message

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
LARGEST_NORM = 1e300
"""Of squared norms: sums of them stay finite, and what is larger has diverged in any precision."""


def no_commit(_steps: int) -> None:
    """For roles whose run is saved from outside."""


def expected(message: Message, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a message.

    Raises:
        PeerError: it is missing or of another shape.
    """
    tensor = message.tensors.get(name)
    if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
        found = "nothing" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
        raise PeerError(f"{message.sender} sent {message.kind} with {found} as {name}; {list(shape)} is needed")
    return tensor


def finite(value: float) -> float | None:
    """A loss or squared norm as it travels: JSON has no infinity, so None stands for what is not finite."""
    return value if abs(value) <= LARGEST_NORM else None


def travelled(value: float | None) -> float:
    """What `finite` made of it; what was not finite is infinite."""
    return math.inf if value is None else float(value)


async def gathered(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all jobs; if one fails the others are cancelled before its error goes on."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


class Crossed:
    """What crossed a link since this was last asked."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic, self._then = traffic, Traffic()

    def since_asked(self) -> list[int]:
        """Bytes up and down."""
        up, down = self._traffic.up - self._then.up, self._traffic.down - self._then.down
        self._then = Traffic(self._traffic.up, self._traffic.down)
        return [up, down]


def add_into(sums: Tensors, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add tensors to the sums by name, in the order of calls."""
    for name, tensor in tensors.items():
        sums[name] = sums[name] + tensor if name in sums else tensor
