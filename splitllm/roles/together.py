"""Small things that client and server do alike."""

from __future__ import annotations

import asyncio
import math
import reprlib
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

import torch

from splitllm.errors import PeerError
from splitllm.wire.link import Traffic
from splitllm.wire.message import Message

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
LARGEST_NORM = 1e300
"""Of squared norms: sums of them stay finite, and what is larger has diverged in any precision."""
ADAPTER_SLOT = "adapter"
SLOTS = {ADAPTER_SLOT: True, "exp_avg": True, "exp_avg_sq": True, "step": False}
"""What a state holds of an adapter tensor -> whether it has that tensor's shape, or no dims."""


def no_commit(_steps: int, _generation: int) -> None:
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


def answered(reply: Message, key: str, fits: Callable[[Any], bool]) -> Any:
    """A value in the header of an answer.

    Args:
        reply: the answer.
        key: of the value.
        fits: whether it is one of those that may be there.

    Raises:
        PeerError: it does not fit, or is missing.
    """
    value = reply.header.get(key)
    if not fits(value):
        raise PeerError(f"{reply.sender} answered {reply.kind} with {reprlib.repr(value)} as {key}; that is none")
    return value


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 on."""
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return (type(value) is int and abs(value) < 1 << 63) or (type(value) is float and math.isfinite(value))


def is_loss(value: Any) -> bool:
    """Whether it is what `finite` makes of a loss."""
    return value is None or is_number(value)


def are_texts(values: Iterable[Any]) -> bool:
    """Whether all are strings."""
    return all(isinstance(value, str) for value in values)


def weights_in(reply: Message, clients: Iterable[int]) -> dict[int, float]:
    """The loss weight of each of these clients, and of those of others, in the answer to an `open`.

    Raises:
        PeerError: one is missing, or is no weight.
    """
    wanted = {str(client) for client in clients}

    def fits(value: Any) -> bool:
        plain = isinstance(value, dict) and wanted <= {str(client) for client in value}
        return plain and all(str(client).isdecimal() and is_number(weight) for client, weight in value.items())

    return {int(client): float(weight) for client, weight in answered(reply, "weights", fits).items()}


def state_in(reply: Message, adapter: Mapping[str, torch.Tensor]) -> Tensors:
    """The state of a tier in the answer to a `share`: all of its adapter, with the optimiser's values or none.

    Args:
        reply: the answer.
        adapter: of that tier, for the shapes.

    Raises:
        PeerError: something is missing or of another shape.
    """
    state: Tensors = {}
    stepped = any(name.partition("/")[0] != ADAPTER_SLOT for name in reply.tensors)
    for name, tensor in adapter.items():
        for slot, like in SLOTS.items():
            if slot == ADAPTER_SLOT or stepped:
                key = f"{slot}/{name}"
                state[key] = expected(reply, key, tuple(tensor.shape) if like else ())
    return state


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
