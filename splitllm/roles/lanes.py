"""The door of a server whose clients go at their own pace: each has a lane.

A *lane* is one client with the roles above it. It has steps, generations and journals of its own, so that whatever
becomes of a client, no other client's lane notices. All lanes of a server share its shard and its device, where they
meet in batches. A message belongs to the lane of the client that its place names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from splitllm.errors import PeerError
from splitllm.roles.gate import Gate
from splitllm.roles.runner import Batching
from splitllm.wire.message import Message


class All:
    """Set when all of these events are; has what of `asyncio.Event` is needed to wait for it."""

    def __init__(self, events: Iterable[asyncio.Event]) -> None:
        self._events = list(events)

    def is_set(self) -> bool:
        """Whether all are."""
        return all(event.is_set() for event in self._events)

    async def wait(self) -> None:
        """Until all are."""
        for event in self._events:
            await event.wait()


class Lanes:
    """Stands where a `Gate` does, in front of many.

    Args:
        gates: client -> the gate of its lane.
        batching: what all lanes share.

    Attributes:
        children: names of the roles below.
        finished: set when all lanes are complete.
        all_left: set when every child has said goodbye to every lane.
    """

    def __init__(self, gates: Mapping[int, Gate], batching: Batching) -> None:
        self.gates, self.batching = dict(gates), batching
        self.children = list(dict.fromkeys(child for gate in gates.values() for child in gate.children))
        self.finished = All(gate.finished for gate in gates.values())
        self.all_left = All(gate.all_left for gate in gates.values())

    async def handle(self, message: Message) -> Message:
        """Answer one request, in its lane.

        Raises:
            RejoinError: that lane's generation is over.
            PeerError: it breaks the protocol.
            DivergedError: that lane's values are not finite: it ends, and no other.
        """
        return await self._gate(message).handle(message)

    def check(self, message: Message) -> None:
        """Look at a request, by what the recipe allows in its lane.

        Raises:
            PeerError: it is not allowed.
        """
        self._gate(message).check(message)

    def away(self, child: str) -> None:
        """The connection of a child is gone."""
        self._each(child, lambda gate: gate.away(child))

    def back(self, child: str) -> None:
        """A child is connected."""
        self._each(child, lambda gate: gate.back(child))

    def left(self, child: str) -> None:
        """A child has said goodbye."""
        self._each(child, lambda gate: gate.left(child))

    def missing(self, seconds: float) -> list[str]:
        """Children that have been away for so many seconds, and are waited for without end."""
        return sorted({child for gate in self.gates.values() for child in gate.missing(seconds)})

    def _gate(self, message: Message) -> Gate:
        gate = self.gates.get(message.micro_batch[1])
        if gate is None or message.sender not in gate.children:
            raise PeerError(f"{message.sender} sent {message.kind} for client {message.micro_batch[1]}, not below it")
        return gate

    def _each(self, child: str, tell: Callable[[Gate], None]) -> None:
        for gate in self.gates.values():
            if child in gate.children:
                tell(gate)
