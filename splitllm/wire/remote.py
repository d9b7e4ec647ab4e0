"""gRPC, and nothing else: streams of opaque frames over `grpc.aio`, with mutual TLS, keepalive and the health service.

The one file that imports grpc. Messages are bytes with identity serializers: no generated code. Frames are at most
`FRAME_BYTES`, and both sides refuse longer ones before they are read.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2

from splitllm.wire.certificates import Credentials, peer_name
from splitllm.wire.frames import FRAME_BYTES
from splitllm.wire.stream import Disconnected, Reason, Refused, Stream

SERVICE = "splitllm.Wire"
METHOD = "Exchange"
CODES: dict[Reason, grpc.StatusCode] = {
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "identity": grpc.StatusCode.PERMISSION_DENIED,
    "mismatch": grpc.StatusCode.FAILED_PRECONDITION,
    "taken": grpc.StatusCode.ALREADY_EXISTS,
    "admission": grpc.StatusCode.OUT_OF_RANGE,
    "internal": grpc.StatusCode.ABORTED,
}
REASONS = {code: reason for reason, code in CODES.items()}
HEALTH = "grpc.health.v1.Health"
STREAMS_A_CONNECTION = 8
CALLS_A_NAME = 2  # of each kind: one that nobody has missed yet, and the one that takes its place
WINDOW_BYTES = 2 << 20
SILENCE = 12  # keepalives; a ping waits behind a window and a frame, and so does the answer to it
UNCONFIRMED = 2  # keepalives; TCP's confirmations wait behind nothing
ENDING_SECONDS = 1.0
HANDSHAKE_SECONDS = 5.0
HEALTH_SECONDS = 5.0
TLS_REFUSALS = {
    "certificate has expired": "its certificate has expired; renew it there with splitllm certs",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of the CA that this role trusts",
    "Hostname Verification Check failed": "its certificate is that of another role; check wire.addresses",
    "WRONG_VERSION_NUMBER": "it speaks no TLS; give it wire.certificates",
}

Serve = Callable[[Stream, str | None], Awaitable[None]]


NO_NEWS = ("ExecuteBatchError raised in core", "Aborting method")


def _is_news(record: logging.LogRecord) -> bool:
    """That a caller is gone, or cut off as this server stops, is none; told late, gRPC logs a traceback of it."""
    cancelled = record.exc_info is not None and record.exc_info[0] is asyncio.CancelledError
    return not cancelled and not str(record.msg).startswith(NO_NEWS)


logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)

if not hasattr(cygrpc._AioCall, "send_serialized_message"):  # see `DialledStream.write`
    raise ImportError(f"grpcio {grpc.__version__} is not one that splitllm works with; install that of constraints.txt")


def _options(keepalive: float) -> list[tuple[str, Any]]:
    """What both sides set; `keepalive` is in seconds.

    The window is fixed: left to gRPC, several MiB are under way on a slow link, and a ping waits behind them. Of the
    two timeouts, TCP gets `keepalive_timeout_ms` as its own (TCP_USER_TIMEOUT: sent bytes, a ping's too, that nobody
    confirms), so a dead machine or cable is noticed soon; the other is for who confirms them and says nothing.
    """
    milliseconds = max(1, int(keepalive * 1000))
    return [
        ("grpc.max_send_message_length", FRAME_BYTES),
        ("grpc.max_receive_message_length", FRAME_BYTES),
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", UNCONFIRMED * milliseconds),
        ("grpc.http2.ping_timeout_ms", SILENCE * milliseconds),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", milliseconds // 2),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", milliseconds // 4),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def patience(keepalive: float) -> float:
    """Seconds after which a name is no longer held by a process that is gone, whatever became of its connection."""
    return max(60.0, (SILENCE + 3) * keepalive)


class Dialer:
    """Opens streams to one server.

    Args:
        address: HOST:PORT.
        server: name that its certificate must have.
        credentials: this role's, or None for plain TCP.
        keepalive: seconds without a sign of life after which the server is asked for one. It is given up when nothing
            confirms the question for `UNCONFIRMED` times as long, or it has not answered for `SILENCE` times as long.
    """

    def __init__(self, address: str, server: str, credentials: Credentials | None, keepalive: float) -> None:
        self.address, self.server, self._credentials = address, server, credentials
        self._options = [
            *_options(keepalive),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.enable_retries", 0),
        ]

    def dial(self) -> DialledStream:
        """A stream to use as an asynchronous context manager; it connects with the first frame written."""
        if self._credentials is None:
            return DialledStream(grpc.aio.insecure_channel(self.address, options=self._options), self._about)
        found = grpc.ssl_channel_credentials(
            self._credentials.authority, self._credentials.key, self._credentials.certificate
        )
        options = [*self._options, ("grpc.ssl_target_name_override", self.server)]
        return DialledStream(grpc.aio.secure_channel(self.address, found, options=options), self._about)

    def _about(self, error: grpc.aio.AioRpcError) -> Disconnected | Refused:
        """What a failed call means; gRPC tells its cause in words only."""
        code = error.code()
        details = " ".join((error.details() or code.name.lower()).split())
        where = f"{self.server} at {self.address}"
        if code in REASONS:
            return Refused(REASONS[code], details)
        if code is grpc.StatusCode.OK:
            return Disconnected(f"{where} ended the connection")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            return Refused("invalid", f"{where}: a frame is longer than {FRAME_BYTES} bytes ({details})")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return Refused("mismatch", f"{self.address} is no splitllm server")
        for mark, remedy in TLS_REFUSALS.items():
            if mark in details:
                return Refused("identity", f"{where}: {remedy} ({details.rpartition('error:')[2]})")
        if self._credentials is not None and details.endswith(": Socket closed"):
            return Disconnected(
                f"{where} closed the connection after the TLS handshake: if this goes on, it does not accept the "
                "certificate of this role: it must be of the same CA and not expired"
            )
        return Disconnected(f"{where}: {details.rpartition('last error: ')[2]}")


class DialledStream:
    """The calling side's end."""

    def __init__(
        self, channel: grpc.aio.Channel, about: Callable[[grpc.aio.AioRpcError], Disconnected | Refused]
    ) -> None:
        self._channel, self._about = channel, about

    async def __aenter__(self) -> DialledStream:
        """Start the call."""
        self._call = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the call and close the connection."""
        self._call.cancel()
        await self._channel.close()

    async def read(self) -> bytes | None:
        """The next frame, or None at the end."""
        try:
            frame = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise self._about(error) from error
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            raise await self._ended() from error
        return None if frame is grpc.aio.EOF else bytes(frame)

    async def write(self, frame: bytes) -> None:
        """Send a frame."""
        try:
            await self._call.wait_for_connection()
            # Not `self._call.write`: where the other side has ended the call, it puts INTERNAL in place of the reason.
            await self._call._cython_call.send_serialized_message(frame)
        except grpc.aio.AioRpcError as error:
            raise self._about(error) from error
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            raise await self._ended() from error

    async def done_writing(self) -> None:
        """Say that no more frames will come."""
        try:
            await self._call.done_writing()
        except (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            raise Disconnected("the call ended") from error

    async def _ended(self) -> Disconnected | Refused:
        try:
            async with asyncio.timeout(ENDING_SECONDS):  # the reason comes after all that is still to be read
                code, details = await self._call.code(), await self._call.details()
        except TimeoutError:
            return Disconnected("the call ended")
        return self._about(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details))


class ServedStream:
    """The answering side's end."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context

    async def read(self) -> bytes | None:
        """The next frame, or None at the end."""
        try:
            frame = await self._context.read()
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            raise Disconnected(str(error)) from error
        return None if frame is grpc.aio.EOF else bytes(frame)

    async def write(self, frame: bytes) -> None:
        """Send a frame."""
        try:
            await self._context.write(frame)
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            raise Disconnected(str(error)) from error


class Listener:
    """A gRPC server with one method, and `Check` of the standard health service beside it.

    Who has a certificate may have `CALLS_A_NAME` calls of each open, so that nobody takes the places of the others.

    Args:
        address: HOST:PORT to listen on; port 0 takes a free one.
        serve: talks over one stream until it ends; the second argument is the name in the peer's certificate, empty if
            that is no role's, None without TLS.
        credentials: of this role, or None for plain TCP.
        keepalive: as that of `Dialer`.
        streams: how many may be open at once, and as many questions for its health.
    """

    def __init__(
        self, address: str, serve: Serve, credentials: Credentials | None, keepalive: float, streams: int
    ) -> None:
        self.address, self._serve, self._credentials = address, serve, credentials
        self._open: set[asyncio.Future[None]] = set()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._status = health_pb2.HealthCheckResponse.NOT_SERVING
        self._server = grpc.aio.server(
            options=[
                *_options(keepalive),
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", STREAMS_A_CONNECTION),
                ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
            ],
            maximum_concurrent_rpcs=2 * streams,
        )

    async def start(self) -> int:
        """Listen; returns the port.

        Raises:
            OSError: the address cannot be listened on.
        """
        _raise_descriptors()
        for service, method, talk in ((SERVICE, METHOD, self._exchange), (HEALTH, "Check", self._check)):
            handlers = {method: grpc.stream_stream_rpc_method_handler(talk)}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        try:
            port = self._bind()
        except RuntimeError as error:
            reason = "the address is in use, or is not one of this machine"
            remedy = "choose another with wire.addresses or --listen"
            raise OSError(f"cannot listen on {self.address}: {reason}; {remedy}") from error
        await self._server.start()
        self._status = health_pb2.HealthCheckResponse.SERVING
        return port

    async def stop(self, grace: float) -> None:
        """Take no new streams, let those that are open end, and after `grace` seconds end them."""
        self._status = health_pb2.HealthCheckResponse.NOT_SERVING
        stopping = asyncio.create_task(self._server.stop(grace + ENDING_SECONDS))
        await asyncio.sleep(0)
        if self._open:
            _, late = await asyncio.wait(self._open, timeout=grace)
            for serving in late:  # left to gRPC, this would be a traceback in the log
                serving.cancel()
        await stopping

    def _bind(self) -> int:
        if self._credentials is None:
            return int(self._server.add_insecure_port(self.address))
        found = grpc.ssl_server_credentials(
            [(self._credentials.key, self._credentials.certificate)],
            root_certificates=self._credentials.authority,
            require_client_auth=True,
        )
        return int(self._server.add_secure_port(self.address, found))

    async def _exchange(self, _frames: Any, context: grpc.aio.ServicerContext) -> None:
        identity = self._identity(context)
        with self._counted(identity, METHOD) as welcome:
            if not welcome:
                text = f"{CALLS_A_NAME} calls of {identity} are open already; end one of them, or try again"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            serving = asyncio.ensure_future(self._serve(ServedStream(context), identity))
            self._open.add(serving)
            serving.add_done_callback(self._open.discard)
            try:
                await serving
            except Refused as refused:
                await context.abort(CODES[refused.reason], str(refused))
            except (Disconnected, asyncio.CancelledError):
                return  # gRPC cancels what serves a lost caller, and would log it

    async def _check(self, _requests: Any, context: grpc.aio.ServicerContext) -> None:
        """The health service's `Check`, as a stream of one message: who asks nothing does not hold it."""
        with self._counted(self._identity(context), HEALTH) as welcome:
            if not welcome:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many questions at once")
            try:
                async with asyncio.timeout(HEALTH_SECONDS):
                    question = await ServedStream(context).read()
                    asked = health_pb2.HealthCheckRequest.FromString(question or b"")
            except (TimeoutError, DecodeError, Disconnected):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no question came")
            if asked.service not in ("", SERVICE):
                await context.abort(grpc.StatusCode.NOT_FOUND, f"the services are {SERVICE} and the empty name")
            await context.write(health_pb2.HealthCheckResponse(status=self._status).SerializeToString())

    def _identity(self, context: grpc.aio.ServicerContext) -> str | None:
        return peer_name(context.auth_context()) or "" if self._credentials is not None else None

    @contextmanager
    def _counted(self, identity: str | None, kind: str) -> Iterator[bool]:
        """Whether one more call of this kind is welcome; without TLS nobody knows whose it is."""
        if identity is None:
            yield True
            return
        self._calls[identity, kind] += 1
        try:
            yield self._calls[identity, kind] <= CALLS_A_NAME
        finally:
            self._calls[identity, kind] -= 1
            if not self._calls[identity, kind]:
                del self._calls[identity, kind]


def _raise_descriptors() -> None:
    """As many files as this process may open: what is left of them strangers' connections cannot take."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
