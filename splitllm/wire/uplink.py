"""A link to a role on another machine: connects, reconnects, and asks every question until it is answered once."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from splitllm.errors import PeerError, RejoinError, SplitLLMError
from splitllm.wire.assembling import Assembler, Limits
from splitllm.wire.codecs import Packed
from splitllm.wire.coding import Coding
from splitllm.wire.envelopes import error_of, reply_of, request_values
from splitllm.wire.frames import VERSION, Envelope, FrameType, to_frames
from splitllm.wire.link import Traffic
from splitllm.wire.message import Message
from splitllm.wire.stream import Disconnected, Refused, Stream, backoff, first_error

logger = logging.getLogger(__name__)
HANDSHAKE_SECONDS = 20.0
GOODBYE = (2, 0)


class Dialled(Stream, Protocol):
    """A stream of the calling side, which can say that it is done."""

    async def done_writing(self) -> None:
        """No more frames will come."""
        ...


Dial = Callable[[], AbstractAsyncContextManager[Dialled]]


@dataclass
class _Pending:
    """A question without an answer yet; once it was sent, the frames and what they say was received."""

    message: Message
    packed: Mapping[str, Packed]
    reply: asyncio.Future[Message] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    frames: list[bytes] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    @property
    def urgency(self) -> int:
        """Gradients go before activations that wait."""
        return 0 if self.message.kind == "backward" else 1


class RemoteLink:
    """The way up to another process.

    A request has a number. No more are sent than the role above takes at once, those that were cancelled aside; the
    others wait here, gradients first.
    When the connection breaks, those without an answer are sent again over the next one, as the same bytes; the other
    side answers a number it has seen from its cache. When the other side itself was restarted, they fail with
    `RejoinError`.

    Args:
        dial: opens a stream.
        server: name of the role above.
        hello: what the handshake says of this role, beside version and incarnation.
        coding: codecs of this link.
        limits: of what the role above may send.
        patience: seconds for which `taken` is held for a passing state.
        on_change: called with "connected" or a line that says what keeps it from being so, when that changes.

    Attributes:
        traffic: the frames' bytes since the handshake, those that were sent again included.
        of_client: the same by the client whose lane a request and its answer belong to.
        failed: done, with the error, when there is no way up any more.
    """

    def __init__(
        self,
        dial: Dial,
        server: str,
        hello: Mapping[str, Any],
        coding: Coding,
        limits: Limits,
        *,
        patience: float = 150.0,
        on_change: Callable[[str], None] = lambda state: None,
    ) -> None:
        self.traffic, self.of_client = Traffic(), defaultdict[int, Traffic](Traffic)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._dial, self._server, self._coding, self._limits = dial, server, coding, limits
        self._hello = {**hello, "protocol": VERSION, "incarnation": secrets.token_hex(8)}
        self._patience, self._on_change, self._state = patience, on_change, ""
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._received: list[int] = []
        self._outbox: asyncio.PriorityQueue[tuple[int, int]] = asyncio.PriorityQueue()
        self._under_way: set[int] = set()
        self._room, self._answered = 1, asyncio.Event()
        self._welcome: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._peer: str | None = None
        self._leaving = False
        self._task = asyncio.create_task(self._keep_connected())
        self._task.add_done_callback(self._ended)

    @property
    def under_way(self) -> int:
        """Requests that were sent, and whose answers are waited for."""
        return len(self._under_way)

    async def welcome(self) -> Mapping[str, Any]:
        """What the role above told at the first handshake.

        Raises:
            Refused: it will not have this role.
        """
        return await asyncio.shield(self._welcome)

    async def request(self, message: Message) -> Message:
        """Ask the role above.

        Raises:
            RejoinError: the run goes back to an earlier step.
            PeerError: the role above refuses this role, its answer breaks the protocol, or the link is closed.
        """
        if self.failed.done():
            self.failed.result()
        number = next(self._numbers)
        self._pending[number] = pending = _Pending(message, self._coding.pack_request(message))
        self._outbox.put_nowait((pending.urgency, number))
        try:
            return await pending.reply
        finally:
            self._pending.pop(number, None)
            self._free(number)
            if pending.reply.cancelled() and pending.frames:  # it may never arrive: then neither does what it says
                self._received += [number, *pending.received]

    async def close(self, *, goodbye: bool = False) -> None:
        """End the connection.

        Args:
            goodbye: tell the role above that the run is complete for this one.
        """
        if goodbye and not self._task.done():
            self._leaving = True
            self._outbox.put_nowait(GOODBYE)
            self._answered.set()
            await asyncio.wait({self._task}, timeout=HANDSHAKE_SECONDS)
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _keep_connected(self) -> None:
        delays, trouble_since = backoff(), None
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with self._dial() as stream:
                    await self._shake_hands(stream)
                    delays, trouble_since = backoff(), None
                    if await self._exchange(stream):
                        return
            except Disconnected as lost:
                self._tell(str(lost))
            except Refused as refused:
                trouble_since = trouble_since or loop.time()
                if refused.reason != "taken" or loop.time() - trouble_since > self._patience:
                    self._fail(refused)
                    return
                self._tell(str(refused))
            except SplitLLMError as error:  # the run is over, or what came over the stream breaks the protocol
                self._fail(error)
                return
            await asyncio.sleep(next(delays))

    async def _shake_hands(self, stream: Stream) -> None:
        assembler = Assembler(self._limits)
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                for frame in to_frames(Envelope(FrameType.HELLO, 0, self._hello)):
                    await stream.write(frame)
                envelope = await self._next(stream, assembler, Traffic())
        except TimeoutError:
            raise Disconnected(f"{self._server} does not answer") from None
        if envelope is None:
            raise Disconnected(f"{self._server} ended the connection before a welcome")
        peer, room = envelope.values.get("incarnation"), envelope.values.get("room")
        if envelope.type is not FrameType.WELCOME or not isinstance(peer, str) or type(room) is not int or room < 1:
            raise PeerError(f"{self._server} answered the hello with no welcome")
        if self._peer is not None and peer != self._peer:
            self._forget(f"{self._server} was restarted")
        self._peer, self._room = peer, room
        if not self._welcome.done():
            self._welcome.set_result(envelope.values)
        self._tell("connected")

    async def _exchange(self, stream: Dialled) -> bool:
        """Send and receive until the connection is lost (raises), or this role has left (returns True)."""
        self._outbox, self._under_way = asyncio.PriorityQueue(), set()
        for number, pending in self._pending.items():
            self._outbox.put_nowait((pending.urgency, number))
        if self._leaving:
            self._outbox.put_nowait(GOODBYE)
        jobs = {asyncio.create_task(self._send(stream)), asyncio.create_task(self._receive(stream))}
        try:
            await asyncio.wait(jobs, return_when=asyncio.FIRST_EXCEPTION)
            ended = {job for job in jobs if job.done()}
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.wait(jobs)
        if (error := first_error(ended)) is not None:
            raise error
        return True

    async def _send(self, stream: Dialled) -> None:
        while (entry := await self._most_urgent()) != GOODBYE:
            number = entry[1]
            pending = self._pending.get(number)
            if pending is None or pending.reply.done() or not (pending.frames or self._frame(number, pending)):
                continue
            self._under_way.add(number)
            lane = self.of_client[pending.message.micro_batch[1]]
            for frame in pending.frames:
                await stream.write(frame)
                self.traffic.up += len(frame)
                lane.up += len(frame)
        for frame in to_frames(Envelope(FrameType.GOODBYE, 0)):
            await stream.write(frame)
            self.traffic.up += len(frame)
        await stream.done_writing()

    async def _most_urgent(self) -> tuple[int, int]:
        """What to send next, once the role above has room for it."""
        while len(self._under_way) >= self._room and not self._leaving:
            self._answered.clear()
            await self._answered.wait()
        return await self._outbox.get()

    def _frame(self, number: int, pending: _Pending) -> bool:
        """Make a request's frames, once: what is sent again is the same. False if it cannot travel."""
        values = request_values(pending.message, self._received)
        try:
            pending.frames = to_frames(Envelope(FrameType.REQUEST, number, values, pending.packed))
        except PeerError as error:
            pending.reply.set_exception(error)
            return False
        pending.received, self._received, pending.packed = self._received, [], {}
        return True

    async def _receive(self, stream: Stream) -> None:
        assembler, before = Assembler(self._limits), self.traffic.down
        while (envelope := await self._next(stream, assembler, self.traffic)) is not None:
            if envelope.type not in (FrameType.REPLY, FrameType.ERROR):
                raise PeerError(f"{self._server} sent a {envelope.type.name.lower()} where only answers are due")
            if envelope.type is FrameType.ERROR and envelope.number == 0:
                raise error_of(envelope)
            self._received.append(envelope.number)
            self._free(envelope.number)
            if (pending := self._pending.get(envelope.number)) is not None:
                self.of_client[pending.message.micro_batch[1]].down += self.traffic.down - before
            before = self.traffic.down
            self._resolve(envelope)
        if not self._leaving:
            raise Disconnected(f"{self._server} ended the connection")

    def _free(self, number: int) -> None:
        """Its answer has come, or will not: what is received need not be answered."""
        self._under_way.discard(number)
        self._answered.set()

    def _resolve(self, envelope: Envelope) -> None:
        pending = self._pending.get(envelope.number)
        if pending is None or pending.reply.done():
            return
        if envelope.type is FrameType.REPLY:
            pending.reply.set_result(reply_of(envelope, pending.message, self._server))
        else:
            pending.reply.set_exception(error_of(envelope))

    @staticmethod
    async def _next(stream: Stream, assembler: Assembler, traffic: Traffic) -> Envelope | None:
        while (frame := await stream.read()) is not None:
            traffic.down += len(frame)
            envelope = assembler.add(frame)
            if envelope is not None:
                return envelope
        return None

    def _forget(self, reason: str) -> None:
        """Nobody above knows the questions that were asked: fail them."""
        self._received = []
        for pending in self._pending.values():
            if not pending.reply.done():
                pending.reply.set_exception(RejoinError(f"{reason}; join again"))

    def _fail(self, error: SplitLLMError) -> None:
        waiting: list[asyncio.Future[Any]] = [self._welcome, self.failed]
        for future in [*waiting, *(pending.reply for pending in self._pending.values())]:
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be waiting

    def _tell(self, state: str) -> None:
        if state != self._state:
            self._state = state
            self._on_change(state)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody connects any more: who still waits must not wait for ever."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("internal error", exc_info=error)
        self._fail(PeerError(f"the link to {self._server} is closed{f' by {error!r}' if error is not None else ''}"))
