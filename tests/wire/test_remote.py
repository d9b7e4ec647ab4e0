"""gRPC as it is set up: limits, the health service, a port that is taken, and an end in good order."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitllm.wire.frames import FRAME_BYTES
from splitllm.wire.remote import Dialer, Listener
from splitllm.wire.stream import Disconnected, Refused, Stream
from tests.wire.serving import dialer, linked, raises, relayed, run, served, until


async def health(port: int, service: str = "") -> int:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


def test_health_says_serving_and_while_it_stops_not_serving() -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

    async def test() -> None:
        async with served() as server:
            assert [await health(server.port), await health(server.port, "splitllm.Wire")] == [serving, serving]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                assert (await watch.read()).status == serving
                async with linked(server.port) as link:
                    await link.welcome()
                    stopping = asyncio.create_task(server.listener.stop(0.3))
                    assert (await watch.read()).status == not_serving
                    await stopping

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
            with pytest.raises(OSError, match=rf"^cannot listen on 127\.0\.0\.1:{server.port}: the address is in use"):
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


@pytest.mark.parametrize("keepalive", [0.3, 1.0])
def test_a_silent_peer_is_given_up_within_twice_keepalive(keepalive: float) -> None:
    async def test() -> None:
        states: list[str] = []
        async with served(keepalive=keepalive) as server, relayed(server.port) as relay:  # noqa: SIM117
            async with linked(relay.listen[1], keepalive=keepalive, states=states) as link:
                await link.welcome()
                await until(lambda: server.events != [])
                relay.cut(10)
                await until(lambda: len(states) > 1 and server.events[-1][0] == "away", 2 * keepalive + 1)
                assert "ping timeout" in states[1]

    run(test)


def test_streams_beyond_the_limit_wait_or_are_turned_away_for_now() -> None:
    async def test() -> None:
        async def serve(stream: Stream, _: str | None) -> None:
            await stream.read()

        server = Listener("127.0.0.1:0", serve, None, 10.0, 1)
        port = await server.start()
        async with dialer(port).dial():
            await asyncio.sleep(0.1)
            async with Dialer(f"127.0.0.1:{port}", "cloud", None, 10.0).dial() as second:
                assert "oncurrent" in await raises(second.read(), Disconnected)
        await server.stop(0)

    run(test)
