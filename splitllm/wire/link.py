"""How a role asks the role above it: one request, one reply."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from splitllm.wire.message import Message

Handler = Callable[[Message], Awaitable[Message]]


@dataclass
class Traffic:
    """Bytes of tensors that crossed a cut."""

    up: int = 0
    down: int = 0


class Link(Protocol):
    """A way up. Several requests may be under way at once; each gets the reply to itself."""

    traffic: Traffic

    async def request(self, message: Message) -> Message:
        """Ask the role above.

        Raises:
            PeerError: the request breaks the protocol.
        """
        ...


class LocalLink:
    """The role above lives in this process: its handler is called with the message itself.

    Args:
        handler: of the role above.
        yields: let other micro-batches run before the request is handled, as a network would.
    """

    def __init__(self, handler: Handler, *, yields: bool = False) -> None:
        self.traffic = Traffic()
        self._handler, self._yields = handler, yields

    async def request(self, message: Message) -> Message:
        """Hand the message over and wait for the reply."""
        self.traffic.up += message.nbytes
        if self._yields:
            await asyncio.sleep(0)
        reply = await self._handler(message)
        if self._yields:
            await asyncio.sleep(0)
        self.traffic.down += reply.nbytes
        return reply
