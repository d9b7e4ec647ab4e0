"""gRPC as it is set up: limits, the health service, a port that is taken, and an end in good order."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitllm.wire import remote
from splitllm.wire.certificates import load_credentials
from splitllm.wire.frames import FRAME_BYTES
from splitllm.wire.issuing import issue
from splitllm.wire.message import Message
from splitllm.wire.remote import Dialer, Listener
from splitllm.wire.stream import Disconnected, Refused, Stream
from tests.grids import fast_if
from tests.wire.serving import dialer, linked, raises, relayed, run, served, until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def health(channel: grpc.aio.Channel, service: str = "") -> int:
    found = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(found.status)


def channel_to(port: int) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])


def test_health_says_serving_and_while_it_stops_not_serving() -> None:
    async def test() -> None:
        async with served() as server, channel_to(server.port) as channel:
            assert [await health(channel), await health(channel, "splitllm.Wire")] == [SERVING, SERVING]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health(channel, "other")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            asking = channel.stream_stream("/grpc.health.v1.Health/Check")()
            await asking.wait_for_connection()
            await asyncio.sleep(0.1)
            async with linked(server.port) as link:
                await link.welcome()
                stopping = asyncio.create_task(server.listener.stop(0.3))
                await asyncio.sleep(0.05)
                await asking.write(health_pb2.HealthCheckRequest().SerializeToString())
                assert health_pb2.HealthCheckResponse.FromString(await asking.read()).status == NOT_SERVING
                await stopping

    run(test)


def test_questions_for_health_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "HEALTH_SECONDS", 0.2)

    async def ends(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> grpc.StatusCode:
        async with asyncio.timeout(5):
            return await call.code()

    async def test() -> None:
        async with served() as server, channel_to(server.port) as channel:
            watching = channel.stream_stream("/grpc.health.v1.Health/Watch")()
            assert await ends(watching) is grpc.StatusCode.UNIMPLEMENTED
            for told in (None, b"\xff\xff"):
                asking = channel.stream_stream("/grpc.health.v1.Health/Check")()
                if told is not None:
                    await asking.write(told)
                assert await ends(asking) is grpc.StatusCode.INVALID_ARGUMENT

    run(test)


def test_one_certificate_asks_for_health_as_often_as_it_likes_but_not_at_once(tmp_path: Path) -> None:
    issue(tmp_path, ["cloud", "client-0"])
    cloud, client = (load_credentials(tmp_path, name) for name in ("cloud", "client-0"))
    secure = grpc.ssl_channel_credentials(client.authority, client.key, client.certificate)

    async def test() -> None:
        async with served(credentials=cloud) as server:
            options = [("grpc.ssl_target_name_override", "cloud")]
            async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", secure, options=options) as channel:
                for _ in range(3 * remote.CALLS_A_NAME):
                    assert await health(channel) == SERVING
                held = [channel.stream_stream("/grpc.health.v1.Health/Check")() for _ in range(remote.CALLS_A_NAME)]
                await until(lambda: server.listener._calls["client-0", remote.HEALTH] == len(held))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await health(channel)
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(test)


def listener(serve: object, port: int = 0) -> Listener:
    return Listener(f"127.0.0.1:{port}", serve, None, 10.0, 8)  # type: ignore[arg-type]


def test_a_stream_that_ends_while_the_server_stops_ends_well() -> None:
    async def test() -> None:
        async def serve(stream: Stream, _: str | None) -> None:
            while (frame := await stream.read()) is not None:
                await stream.write(frame)

        server = listener(serve)
        port = await server.start()
        async with dialer(port).dial() as good, dialer(port).dial() as late:
            for stream in (good, late):
                await stream.write(b"1")
                assert await stream.read() == b"1"
            started = time.monotonic()
            stopping = asyncio.create_task(server.stop(0.5))
            await asyncio.sleep(0.1)
            await good.write(b"2")
            assert await good.read() == b"2"
            await good.done_writing()
            assert await good.read() is None and await good._call.code() is grpc.StatusCode.OK
            await stopping
            assert 0.4 < time.monotonic() - started < 2.5

    run(test)


def test_an_address_in_use_is_one_clear_error() -> None:
    async def test() -> None:
        async with served() as server:
            said = (
                rf"^cannot listen on 127\.0\.0\.1:{server.port}: the address is in use, .* wire\.addresses or --listen$"
            )
            with pytest.raises(OSError, match=said):
                async with served(port=server.port):
                    pass

    run(test)


def test_a_frame_of_just_the_limit_passes_both_ways_and_one_more_byte_does_not() -> None:
    async def test() -> None:
        async def serve(stream: Stream, _: str | None) -> None:
            while (frame := await stream.read()) is not None:
                await stream.write(frame)

        server = listener(serve)
        port = await server.start()
        whole = b"y" * FRAME_BYTES
        async with dialer(port).dial() as stream:
            await stream.write(whole)
            assert await stream.read() == whole
            assert f"longer than {FRAME_BYTES} bytes" in await raises(_written(stream, whole + b"x"), Refused)
        await server.stop(0)

    run(test)


async def _written(stream: Stream, frame: bytes) -> None:
    await stream.write(frame)
    await stream.read()


@pytest.mark.parametrize("keepalive", [0.1, pytest.param(0.25, marks=fast_if(False))])
def test_a_peer_that_confirms_but_does_not_answer_is_given_up_after_twelve_keepalives(keepalive: float) -> None:
    async def test() -> None:
        states: list[str] = []
        async with served(keepalive=keepalive) as server, relayed(server.port) as relay:  # noqa: SIM117
            async with linked(relay.listen[1], keepalive=keepalive, states=states) as link:
                await link.welcome()
                await until(lambda: server.events != [])
                relay.cut(10)
                started = time.monotonic()
                await until(lambda: len(states) > 1 and server.events[-1][0] == "away", 13 * keepalive + 1)
                assert "ping timeout" in states[1] and time.monotonic() - started > 11 * keepalive

    run(test)


def test_tcp_gives_up_bytes_that_nobody_confirms_after_two_keepalives() -> None:
    async def test() -> None:
        async with served(keepalive=1.5) as server, linked(server.port, keepalive=1.5) as link:
            await link.welcome()
            assert sorted(user_timeouts(server.port)) == [3000, 3000]

    run(test)


def user_timeouts(port: int) -> list[int]:
    """TCP_USER_TIMEOUT in ms of the ends of the connections to a port, both of this process."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(entry))) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and port in (one.getsockname()[1], one.getpeername()[1]):
                found.append(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
    return found


@pytest.mark.parametrize("direction", ["up", "down", pytest.param("both", marks=fast_if(False))])
def test_a_slow_link_is_kept_as_long_as_bytes_arrive(direction: str) -> None:
    """A ping waits for a window of data; it alone takes longer than a keepalive, the transfer several times so."""
    keepalive, large, small = 0.5, torch.zeros(2**20), torch.zeros(1)

    async def test() -> None:
        states: list[str] = []

        async def answer(message: Message) -> Message:
            tensors = {"x": small if direction == "up" else large}
            return Message("forward", "cloud", message.micro_batch, {}, tensors)

        async with served(answer, keepalive=keepalive) as server, relayed(server.port, 2e6) as relay:  # noqa: SIM117
            async with linked(relay.listen[1], keepalive=keepalive, states=states) as link:
                await link.welcome()
                started = time.monotonic()
                asked = Message("forward", "client-0", (0, 0, 0), {}, {"x": small if direction == "down" else large})
                await link.request(asked)
                assert time.monotonic() - started > 3 * keepalive
                assert states == ["connected"] and relay.accepted == 1

    run(test, 60)


def test_a_connection_that_does_not_shake_hands_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "HANDSHAKE_SECONDS", 0.3)
    issue(tmp_path, ["cloud"])

    async def test() -> None:
        async with served(credentials=load_credentials(tmp_path, "cloud")) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            async with asyncio.timeout(5):
                assert await reader.read() == b""
            writer.close()

    run(test)


def test_a_server_may_open_as_many_files_as_the_system_lets_it() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))

    async def test() -> None:
        async with served():
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)

    try:
        run(test)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_streams_beyond_the_limit_wait_or_are_turned_away_for_now() -> None:
    async def test() -> None:
        async def serve(stream: Stream, _: str | None) -> None:
            await stream.read()

        server = Listener("127.0.0.1:0", serve, None, 10.0, 1)
        port = await server.start()
        async with dialer(port).dial(), dialer(port).dial():
            await asyncio.sleep(0.1)
            async with Dialer(f"127.0.0.1:{port}", "cloud", None, 10.0).dial() as second:
                assert "oncurrent" in await raises(second.read(), Disconnected)
        await server.stop(0)

    run(test)
