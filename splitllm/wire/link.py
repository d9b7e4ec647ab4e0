"""How a role asks the role above it: one request, one reply."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from splitllm.wire.codecs import Packed
from splitllm.wire.coding import Coding, unpack_all
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
    """The role above lives in this process: its handler gets the message itself, or what lossy codecs leave of it.

    Args:
        handler: of the role above.
        yields: let other micro-batches run before the request is handled, as a network would.
        coding: of the end that asks and of the end that answers. Where a codec of theirs is lossy, request and reply
            arrive as they would from afar, and the packed bytes are counted; otherwise nothing is copied.
    """

    def __init__(self, handler: Handler, *, yields: bool = False, coding: tuple[Coding, Coding] | None = None) -> None:
        self.traffic = Traffic()
        self._handler, self._yields = handler, yields
        self._coding = coding if coding is not None and any(end.lossy for end in coding) else None

    async def request(self, message: Message) -> Message:
        """Hand the message over and wait for the reply."""
        message, sent = self._up(message)
        self.traffic.up += sent
        if self._yields:
            await asyncio.sleep(0)
        reply = await self._handler(message)
        if self._yields:
            await asyncio.sleep(0)
        reply, sent = self._down(message, reply)
        self.traffic.down += sent
        return reply

    def _up(self, message: Message) -> tuple[Message, int]:
        """The request as it arrives, and the bytes that travel."""
        if self._coding is None:
            return message, message.nbytes
        return _arrived(message, self._coding[0].pack_request(message))

    def _down(self, request: Message, reply: Message) -> tuple[Message, int]:
        """The reply as it arrives, and the bytes that travel."""
        if self._coding is None:
            return reply, reply.nbytes
        return _arrived(reply, self._coding[1].pack_reply(request, reply))


def _arrived(message: Message, packed: Mapping[str, Packed]) -> tuple[Message, int]:
    return replace(message, tensors=unpack_all(packed)), sum(one.nbytes for one in packed.values())
