"""A peer with a right certificate and nothing good in mind: broken frames, calls and bytes against a real server.

Its frames are made from the recorded ones (`tests/wire/corpus`). It never sends a join that is right, but for those
that it is told to: whoever joins takes part, and holding up the others is then its right. Nor does it close a step, or
tell that values are not finite, in a way that the recipe allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitllm.errors import PeerError
from splitllm.roles.checks import Allowed
from splitllm.wire.assembling import Assembler, Limits
from splitllm.wire.certificates import Credentials
from splitllm.wire.envelopes import request_of
from splitllm.wire.frames import FRAME_BYTES, FrameType
from splitllm.wire.remote import METHOD, SERVICE, Dialer, DialledStream
from splitllm.wire.stream import Disconnected, Refused
from tests.soak.noise import http2_noise, tcp_noise, tls
from tests.wire.mutations import changed, corpus, mutated, opened

NAME = "client-1"
SERVER = "cloud"
ORDERED = ("open", "forward-none", "forward-int8", "backward-none", "backward-int4", "evaluation", "share", "evaluated")
MOVES = ("join", "close", "diverged")
STREAMS_A_CHANNEL = 40
PATIENCE = 60.0


@dataclass
class Attack:
    """One peer's evil.

    Args:
        port: of the server.
        certificates: of the attacker and, by the other's name, of the client that it harms.
        hello: what a right hello of the attacker says.
        allowed, limits: what the server checks by.
        seed: of all that it does.

    Attributes:
        sent: frames written.
        judged: frames that the server was seen to refuse, or to answer; right hellos are not counted.
        told: how streams ended, by status.
        opened: streams, connections below gRPC, and odd calls.
        hung: what did not end.
        joining: it waits for a generation to begin.
    """

    port: int
    certificates: dict[str, Credentials]
    hello: dict[str, str]
    allowed: Allowed
    limits: Limits
    seed: int = 0
    sent: int = 0
    judged: int = 0
    told: Counter[str] = field(default_factory=Counter)
    opened: Counter[str] = field(default_factory=Counter)
    hung: list[str] = field(default_factory=list)
    joining: bool = False

    def __post_init__(self) -> None:
        self._frames, self._count, self._incarnation = corpus(), itertools.count(), "0"
        self._own = asyncio.Lock()
        self._stale = [name for name in self._frames if name not in ("hello", "join", "finish")]

    async def until(self, frames: int, workers: int = 6) -> None:
        """Attack until so many frames were judged."""
        async with asyncio.TaskGroup() as group:
            for number in range(workers):
                group.create_task(self._work(Random(f"{self.seed}-{number}"), frames))

    async def join_and_misbehave(self, seed: int, states: list[tuple[int, str]]) -> None:
        """Take part, as a process that kept these states, and then break the protocol."""
        rng = Random(f"{self.seed}-joins-{seed}")
        values = {"header": {"standings": {NAME: ["client", states]}}, "generation": 0, "received": []}
        join = changed(self._frames["join"], 1, **values)
        async with self._own, self._channel(NAME) as channel, asyncio.timeout(PATIENCE):
            self.joining = True
            while True:
                async with self._stream(channel, NAME) as stream:
                    try:
                        reply = await self._joined(stream, join)
                    except (Refused, Disconnected) as end:
                        if isinstance(end, Refused) and end.reason != "taken":
                            raise  # those before it may not be quite gone
                        reply = None
                    if reply is None:
                        await asyncio.sleep(0.05)
                        continue
                    self.joining = False
                    said = opened(reply)[2]["values"]["header"]
                    await self._say(stream, self._live_frames(rng, int(said["generation"]), int(said["step"])))
                    self.opened["joins"] += 1
                    return

    async def _joined(self, stream: DialledStream, join: bytes) -> bytes | None:
        """The reply to a join over a new stream; None if another of its streams took the place of this one."""
        await stream.write(self._hello(NAME, anew=True))
        await stream.write(join)
        welcome, reply = await stream.read(), await stream.read()
        if welcome is None or reply is None:
            return None
        assert opened(reply)[0] == FrameType.REPLY, reply
        return reply

    async def healthy(self) -> bool:
        """Whether the server says that it serves."""
        async with self._channel(NAME) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            found = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=PATIENCE)
        return bool(found.status == health_pb2.HealthCheckResponse.SERVING)

    async def say_goodbye(self) -> None:
        """So that the server need not wait for this peer at the end of the run, if it still does."""
        async with self._channel(NAME) as channel, self._stream(channel, NAME) as stream:
            with contextlib.suppress(Disconnected):
                await stream.write(self._hello(NAME, anew=True))
                await stream.write(self._frames["goodbye"])
                await stream.done_writing()
                while await stream.read() is not None:
                    pass

    async def _work(self, rng: Random, frames: int) -> None:
        while self.judged < frames:
            name = NAME if rng.random() < 0.9 else "client-0"
            async with self._channel(name) as channel:
                for _ in range(rng.randrange(1, STREAMS_A_CHANNEL)):
                    await self._within(self._one(rng, channel, name), "a stream")
                    if self.judged >= frames:
                        return
            for kind, attempt in (("below gRPC", self._noise), ("odd calls", self._odd_call)):
                self.opened[kind] += 1
                await self._within(attempt(rng), kind)

    async def _within(self, attempt: Awaitable[None], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await attempt
        except TimeoutError:
            self.hung.append(what)

    async def _one(self, rng: Random, channel: grpc.aio.Channel, name: str) -> None:
        """A stream from its beginning to its end."""
        frames = self._stale_frames(rng)
        wrong, first = rng.choice((*self.hello.values(), "client-0", SERVER, "x" * 300)), rng.random()
        hello = self._hello(name if first < 0.97 else wrong, anew=rng.random() < 0.3)
        begins = [hello] if first > 0.05 else mutated(rng, hello)
        polite = name == NAME and rng.random() < 0.85  # one process at a time has the name; else one is refused
        async with self._own if polite else contextlib.nullcontext(), self._stream(channel, name) as stream:
            await self._say(stream, [*begins, *frames], right=int(begins == [hello] and name == NAME))

    async def _say(self, stream: DialledStream, frames: list[bytes], right: int = 0) -> None:
        """Send frames, and count what comes back; `right` of them are."""
        self.opened["streams"] += 1
        answers = asyncio.create_task(self._answers(stream))
        with contextlib.suppress(Refused, Disconnected):
            for frame in frames:
                await stream.write(frame)
                self.sent += 1
            await stream.done_writing()
        count, status = await answers
        self.told[status] += 1
        self.judged += count - min(right, count) + (status.startswith("refused"))

    async def _answers(self, stream: DialledStream) -> tuple[int, str]:
        count = 0
        try:
            while await stream.read() is not None:
                count += 1
        except Refused as refused:
            return count, f"refused: {refused.reason}"
        except Disconnected as lost:
            return count, "ended" if "ended the connection" in str(lost) else f"lost: {lost}"[:100]
        return count, "ended"

    def _hello(self, name: str, *, anew: bool) -> bytes:
        """That of a new process, or of the one that was there before."""
        if anew:
            self._incarnation = f"{self.seed}-{next(self._count)}"
        return changed(self._frames["hello"], **{**self.hello, "name": name, "incarnation": self._incarnation})

    def _stale_frames(self, rng: Random) -> list[bytes]:
        """Of a generation that is over: whole ones in any order, then a broken one, and some after it."""
        frames = []
        for number in range(1, 1 + rng.choice((0, 0, 1, 2, 5, 20))):
            frames.append(self._numbered(rng.choice(self._stale), rng.choice((number, number, 1)), [number - 1]))
        name = rng.choice([*self._stale, "join", "finish"])
        broken = mutated(rng, self._numbered(name, 99, []))
        return [frame for frame in [*frames, *broken, *frames[:1]] if not self._takes_part(frame)]

    def _live_frames(self, rng: Random, generation: int, step: int) -> list[bytes]:
        """Of the generation under way: some in their order, some not, one in three broken."""
        frames: list[bytes] = []
        chosen = ORDERED if rng.random() < 0.7 else rng.choices(list(self._frames), k=8)
        for number, name in enumerate(chosen, 2):
            if name in ("hello", "goodbye", "join"):
                continue
            place = {"micro_batch": [step, 1, 0] if name.startswith(("forward", "backward")) else [step, 0, 0]}
            place = {"micro_batch": [-1, 1, 0]} if name == "evaluation" else place
            frame = changed(self._frames[name], number, generation=generation, received=[number - 1], **place)
            frames += mutated(rng, frame) if rng.random() < 0.3 else [frame]
        frames.append(b"the end")
        return [frame for frame in frames if not self._takes_part(frame)]

    def _numbered(self, name: str, number: int, received: list[int]) -> bytes:
        frame = self._frames[name]
        return frame if name == "goodbye" else changed(frame, number, received=received)

    def _takes_part(self, frame: bytes) -> bool:
        """Whether a frame is of those that move the run, and the recipe allows it."""
        if not any(f'"{kind}"'.encode() in frame for kind in MOVES):
            return False
        try:
            envelope = Assembler(self.limits).add(frame)
            if envelope is None:
                return False
            message = request_of(envelope, NAME)[0]
            self.allowed.check(message)
        except PeerError:
            return False
        return message.kind in MOVES

    def _channel(self, name: str, **options: Any) -> grpc.aio.Channel:
        own = self.certificates[name]
        credentials = grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)
        found = [("grpc.ssl_target_name_override", SERVER), ("grpc.use_local_subchannel_pool", 1)]
        found += [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0), *options.items()]
        return grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials, options=found)

    @contextlib.asynccontextmanager
    async def _stream(self, channel: grpc.aio.Channel, name: str) -> Any:
        dialer = Dialer(f"127.0.0.1:{self.port}", SERVER, self.certificates[name], 10.0)
        stream = DialledStream(channel, dialer._about)
        await stream.__aenter__()
        try:
            yield stream
        finally:
            stream._call.cancel()

    async def _odd_call(self, rng: Random) -> None:
        """Calls that gRPC itself has to turn away."""
        odd: list[Callable[[grpc.aio.Channel], Any]] = [
            lambda channel: channel.stream_stream(f"/{SERVICE}/Nothing")(),
            lambda channel: channel.stream_stream(f"/{SERVICE}/{METHOD}", request_serializer=None)(
                metadata=tuple((f"x-{n}", "y" * 1000) for n in range(rng.choice((1, 9, 60))))
            ),
            lambda channel: channel.stream_stream(f"/{SERVICE}/{METHOD}")(compression=grpc.Compression.Gzip),
            lambda channel: channel.stream_stream(f"/{SERVICE}/{METHOD}")(),
        ]
        index = rng.randrange(len(odd))
        async with self._channel(NAME) as channel:
            call = odd[index](channel)
            with contextlib.suppress(grpc.aio.BaseError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                sizes = (FRAME_BYTES + 1, 3 * FRAME_BYTES) if index >= 2 else (100,)
                await call.write(bytes(rng.choice(sizes)))
                await call.read()
            call.cancel()

    async def _noise(self, rng: Random) -> None:
        """Bytes where TLS, or below it HTTP/2, should be."""
        secured = rng.random() < 0.5
        context = tls(self.certificates[NAME]) if secured else None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", self.port, ssl=context, server_hostname=SERVER if secured else None
            )
            try:
                writer.write(http2_noise(rng) if secured else tcp_noise(rng))
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.choice((0.0, 0.01, 2.0))):
                        await reader.read(100)
            finally:
                writer.transport.abort()
