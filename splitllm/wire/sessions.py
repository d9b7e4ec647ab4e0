"""The answering side of the wire: who is connected, what they asked, and every question answered once.

A *session* is one run of a child's process, told apart by its incarnation. It outlives connections: what was asked goes
on being computed while the child reconnects, and an answer is kept until the child says that it has it. Asked again, a
question is answered from there and not computed twice.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from splitllm.errors import PeerError, RankError, SplitLLMError
from splitllm.wire.assembling import Assembler, Limits
from splitllm.wire.coding import Coding
from splitllm.wire.envelopes import error_envelope, reply_envelope, request_of
from splitllm.wire.frames import VERSION, Envelope, FrameType, to_frames
from splitllm.wire.message import TOGETHER, Message
from splitllm.wire.stream import Disconnected, Refused, Stream, first_error

logger = logging.getLogger(__name__)
HELLO_SECONDS = 20.0
HELLO_LIMITS = Limits(values_bytes=16 << 10, payload_bytes=0)


@dataclass(frozen=True)
class Reception:
    """What a server does with its children.

    Attributes:
        admit: looks at a hello and the name in the certificate (None without TLS); the child's name and what it is
            told, or Refused.
        answer: answers a request that passed `check`.
        check: raises PeerError for a request that the recipe does not allow.
        room: requests of a child under way at once; it is told, and more are not read (backpressure).
        coding: codecs of the link to a child.
        limits: of what a child may send at once.
        back, away, left: told when a child is connected, is no longer, and has said goodbye. A process that replaces
            one which had joined is back only when it has joined too: without that it is no part of the run.
        fatal: told of an error that is nobody's but this server's, or ends the run.
    """

    admit: Callable[[Mapping[str, Any], str | None], tuple[str, Mapping[str, Any]]]
    answer: Callable[[Message], Awaitable[Message]]
    check: Callable[[Message], None]
    room: Callable[[str], int]
    coding: Callable[[], Coding]
    limits: Limits
    back: Callable[[str], None]
    away: Callable[[str], None]
    left: Callable[[str], None]
    fatal: Callable[[BaseException], None]


@dataclass(eq=False)
class Connection:
    """One stream of a session.

    Attributes:
        due: numbers whose answers are to be sent over it, in this order; the answers themselves lie with the session.
        last: frames to send before anything else, when the run is over.
        more: set when something is due.
        replaced: set when the child has connected anew.
    """

    due: dict[int, None] = field(default_factory=dict)
    last: list[bytes] = field(default_factory=list)
    more: asyncio.Event = field(default_factory=asyncio.Event)
    replaced: asyncio.Event = field(default_factory=asyncio.Event)


class Session:
    """One run of one child's process.

    Attributes:
        answers: number -> its answer, being computed or not yet known to have arrived: frames, or why the child must
            not go on. There are never more than `most`.
        joined: whether it has asked to take part.
        replaces: whether one before it had, and it has not yet.
        over: whether it broke the protocol, and nothing of it is kept.
    """

    def __init__(self, name: str, incarnation: str, room: int, coding: Coding) -> None:
        self.name, self.incarnation, self.coding = name, incarnation, coding
        self.room, self.most = asyncio.Semaphore(room), 4 * room + 16
        self.answers: dict[int, asyncio.Future[list[bytes] | Refused]] = {}
        self.connection: Connection | None = None
        self.bytes_up = self.bytes_down = self.requests = 0
        self.joined = self.replaces = self.over = False

    def attach(self) -> Connection:
        """A new connection; one that seems to be open still is replaced."""
        if self.connection is not None:
            self.connection.replaced.set()
        self.connection = Connection()
        return self.connection

    def detach(self, connection: Connection) -> bool:
        """A connection is gone; whether it was the newest."""
        if self.connection is not connection:
            return False
        self.connection = None
        return True

    def send(self, number: int) -> None:
        """Send an answer, if there is a connection; else the child will ask again."""
        if self.connection is not None:
            self.connection.due[number] = None
            self.connection.more.set()

    def drop(self, number: int) -> None:
        """The child does not need this answer: forget it, now or when it is computed."""
        answer = self.answers.get(number)
        if answer is not None:
            answer.add_done_callback(lambda _: self._discard(number))

    def forget(self) -> None:
        """The process that asked is gone."""
        for answer in self.answers.values():
            answer.cancel()
        self.answers.clear()

    def _discard(self, number: int) -> None:
        self.answers.pop(number, None)
        if self.connection is not None:
            self.connection.due.pop(number, None)


class Sessions:
    """The children of one server.

    Args:
        reception: what it does with them.
        hello_seconds: within which a connection must begin with a hello.

    Attributes:
        by_name: the newest session of every child.
        refused: how many connections were refused, by reason.
    """

    def __init__(self, reception: Reception, hello_seconds: float = HELLO_SECONDS) -> None:
        self._reception, self._hello_seconds = reception, hello_seconds
        self._incarnation = secrets.token_hex(8)
        self.by_name: dict[str, Session] = {}
        self.refused: dict[str, int] = {}

    async def serve(self, stream: Stream, identity: str | None) -> None:
        """Talk over one stream until it ends.

        Args:
            stream: of a child.
            identity: the name in its certificate, empty if that is no role's, None without TLS.

        Raises:
            Refused: the child must not go on; the transport tells it why.
            Disconnected: the connection is gone.
        """
        try:
            await self._serve(stream, identity)
        except Refused as refused:
            self.refused[refused.reason] = self.refused.get(refused.reason, 0) + 1
            child = {"child": refused.child} if refused.child else {}
            logger.warning("refused", extra={"fields": {**child, "reason": refused.reason, "text": str(refused)}})
            raise

    def tell_all(self, error: SplitLLMError) -> None:
        """The run is over for everybody; number 0 answers no request in particular."""
        for session in self.by_name.values():
            if session.connection is not None:
                session.connection.last = to_frames(error_envelope(0, error))
                session.connection.more.set()

    async def _serve(self, stream: Stream, identity: str | None) -> None:
        session, welcome = await self._enter(stream, identity)
        connection = session.attach()
        try:
            for frame in to_frames(Envelope(FrameType.WELCOME, 0, welcome)):
                await stream.write(frame)
            if not session.replaces:
                self._reception.back(session.name)
            logger.info("connected", extra={"fields": {"child": session.name}})
            await self._talk(stream, session, connection)
        except Refused as refused:
            refused.child = session.name
            if session.connection is connection:
                session.forget()
                session.over = True
            raise
        finally:
            if session.detach(connection):
                self._reception.away(session.name)
                logger.info("disconnected", extra={"fields": {"child": session.name}})

    async def _enter(self, stream: Stream, identity: str | None) -> tuple[Session, dict[str, Any]]:
        """Shake hands."""
        if identity == "":
            raise Refused("identity", "the certificate names no role; issue it with splitllm certs")
        try:
            async with asyncio.timeout(self._hello_seconds):
                hello = await _next(stream, Assembler(HELLO_LIMITS))
        except TimeoutError:
            raise Refused("invalid", f"no hello within {self._hello_seconds:g} seconds") from None
        if hello is None or hello.type is not FrameType.HELLO:
            raise Refused("invalid", "a connection begins with a hello")
        values, incarnation = hello.values, hello.values.get("incarnation")
        if values.get("protocol") != VERSION:
            raise Refused(
                "mismatch", f"protocol {str(values.get('protocol'))[:20]} is not that of this server, {VERSION}"
            )
        name, welcome = self._reception.admit(values, identity)
        if not isinstance(incarnation, str) or not 1 <= len(incarnation) <= 64:
            raise Refused("invalid", f"{name}: the hello names no incarnation")
        room = self._reception.room(name)
        return self._session(name, incarnation, room), {**welcome, "incarnation": self._incarnation, "room": room}

    def _session(self, name: str, incarnation: str, room: int) -> Session:
        known = self.by_name.get(name)
        if known is not None and known.incarnation == incarnation and not known.over:
            return known
        if known is not None and known.connection is not None:
            raise Refused("taken", f"another process is connected as {name}: every role runs once; stop one of them")
        self.by_name[name] = session = Session(name, incarnation, room, self._reception.coding())
        if known is not None:
            known.forget()
            session.replaces = known.joined or known.replaces
        return session

    async def _talk(self, stream: Stream, session: Session, connection: Connection) -> None:
        """Read requests and send answers, until either ends or another connection takes over."""
        jobs = {
            asyncio.create_task(self._read(stream, session, connection)),
            asyncio.create_task(_write(stream, session, connection)),
            asyncio.create_task(_until_replaced(session, connection)),
        }
        try:
            done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.wait(jobs)
        if (error := first_error(done)) is not None:
            raise error

    async def _read(self, stream: Stream, session: Session, connection: Connection) -> None:
        assembler = Assembler(self._reception.limits)
        try:
            while (envelope := await _next(stream, assembler, session)) is not None:
                if envelope.type is FrameType.GOODBYE:
                    for number in session.answers:
                        session.drop(number)
                    self._reception.left(session.name)
                    return
                await self._accept(envelope, session, connection)
        except (Refused, Disconnected):
            raise
        except PeerError as error:
            raise Refused("invalid", str(error)) from error

    async def _accept(self, envelope: Envelope, session: Session, connection: Connection) -> None:
        """Start answering a request, or answer it again; waits while too many are under way."""
        message, received = request_of(envelope, session.name)
        for number in received:
            session.drop(number)
        known = session.answers.get(envelope.number)
        if known is not None:
            if known.done():
                session.send(envelope.number)
            return
        self._reception.check(message)
        if len(session.answers) >= session.most:
            raise PeerError(f"{session.name} does not say which answers it has: {len(session.answers)} are kept for it")
        await session.room.acquire()
        if session.connection is not connection:  # what waited here may be asked, or answered, over the new one
            session.room.release()
            raise Disconnected(f"{session.name} has connected anew")
        session.requests += 1
        if message.kind == "join":
            self._join(session)
        session.answers[envelope.number] = task = asyncio.create_task(self._answer(envelope.number, message, session))
        task.add_done_callback(lambda task: self._answered(envelope.number, message, session, task))

    def _join(self, session: Session) -> None:
        session.joined = True
        if session.replaces:
            session.replaces = False
            self._reception.back(session.name)

    async def _answer(self, number: int, message: Message, session: Session) -> list[bytes] | Refused:
        """The frames of the answer, or of a passing state; or what the child is told as it is turned away."""
        try:
            session.coding.note_request(message)
            reply = await self._reception.answer(message)
            return to_frames(reply_envelope(number, reply, session.coding.pack_reply(message, reply)))
        except Refused as refused:
            return refused
        except RankError as error:  # what was asked is answered by who takes this process's place
            self._reception.fatal(error)
            raise asyncio.CancelledError from error
        except SplitLLMError as error:
            if type(error) is PeerError:
                return Refused("invalid", str(error))
            if not isinstance(error, PeerError):
                self._reception.fatal(error)
            return to_frames(error_envelope(number, error))

    def _answered(
        self, number: int, message: Message, session: Session, task: asyncio.Task[list[bytes] | Refused]
    ) -> None:
        session.room.release()
        if task.cancelled():
            session.answers.pop(number, None)
            return
        if (error := task.exception()) is not None:
            session.answers[number] = told = asyncio.get_running_loop().create_future()
            told.set_result(self._broken(message, error))
        session.send(number)

    def _broken(self, message: Message, error: BaseException) -> Refused:
        """This server has a defect."""
        logger.error(
            "internal error", exc_info=error, extra={"fields": {"kind": message.kind, "child": message.sender}}
        )
        if message.kind in TOGETHER:
            self._reception.fatal(error)
        return Refused(
            "internal", f"{message.kind} of {message.sender} failed with {type(error).__name__}; see the server's log"
        )


async def _write(stream: Stream, session: Session, connection: Connection) -> None:
    """Send what is due. Answers wait with the session, so a child that does not read fills no queue."""
    while True:
        await connection.more.wait()
        connection.more.clear()
        while connection.last or connection.due:
            frames = connection.last or _take(session, connection)
            connection.last = []
            for frame in frames:
                await stream.write(frame)
                session.bytes_down += len(frame)


def _take(session: Session, connection: Connection) -> list[bytes]:
    """The next answer that is due, if the child still needs it."""
    number = next(iter(connection.due))
    del connection.due[number]
    answer = session.answers.get(number)
    if answer is None or not answer.done():  # forgotten, and perhaps asked again
        return []
    found = answer.result()
    if isinstance(found, Refused):
        del session.answers[number]
        raise found
    return found


async def _until_replaced(session: Session, connection: Connection) -> None:
    await connection.replaced.wait()
    raise Disconnected(f"{session.name} has connected anew")


async def _next(stream: Stream, assembler: Assembler, session: Session | None = None) -> Envelope | None:
    """The next envelope, or None at the end of the stream."""
    while (frame := await stream.read()) is not None:
        if session is not None:
            session.bytes_up += len(frame)
        try:
            envelope = assembler.add(frame)
        except PeerError as error:
            raise Refused("invalid", str(error)) from error
        if envelope is not None:
            return envelope
    return None
