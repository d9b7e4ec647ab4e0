"""What a server keeps of its children is bounded, whatever they do; and nobody waits because of another."""

from __future__ import annotations

import asyncio
import itertools
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress

import torch

from splitllm.wire.coding import Coding
from splitllm.wire.envelopes import request_values
from splitllm.wire.frames import Envelope, FrameType, to_frames
from splitllm.wire.message import Message
from splitllm.wire.remote import DialledStream
from splitllm.wire.stream import Disconnected, Refused
from tests.wire.serving import HELLO, dialer, echo, linked, run, served, until

MIB = 2**20


def ask(index: int, size: int = 1) -> Message:
    return Message("forward", "client-0", (0, 0, index), {"index": index}, {"x": torch.zeros(size)})


def frames_of(number: int, received: list[int], size: int = 1) -> list[bytes]:
    message = ask(number, size)
    packed = Coding().pack_request(message)
    return to_frames(Envelope(FrameType.REQUEST, number, request_values(message, received), packed))


async def enter(stream: DialledStream) -> None:
    hello = {**HELLO, "protocol": 1, "incarnation": "x"}
    await stream.write(to_frames(Envelope(FrameType.HELLO, 0, hello))[0])
    assert await stream.read() is not None


async def flood(stream: DialledStream, requests: Iterator[list[bytes]]) -> int:
    """Write without reading until nothing goes out any more; how many frames did."""
    sent = 0
    try:
        for frames in requests:
            for frame in frames:
                async with asyncio.timeout(1.0):
                    await stream.write(frame)
                sent += 1
    except (TimeoutError, asyncio.CancelledError):
        pass
    return sent


def test_answers_are_dropped_once_the_child_has_them() -> None:
    async def test() -> None:
        async with served() as server, linked(server.port) as link:
            most = 0
            for index in range(2000):
                await link.request(ask(index))
                most = max(most, len(server.sessions.by_name["client-0"].answers))
            assert most <= 2
            await asyncio.gather(*(link.request(ask(index)) for index in range(100)))
            assert len(server.sessions.by_name["client-0"].answers) <= 16

    run(test)


def test_requests_that_are_cancelled_leave_no_answers() -> None:
    async def test() -> None:
        begun = asyncio.Event()

        async def slow(message: Message) -> Message:
            begun.set()
            await asyncio.sleep(0.002)
            return await echo(message)

        async with served(slow) as server, linked(server.port) as link:
            for index in range(100):  # more than are ever kept
                begun.clear()
                asked = asyncio.create_task(link.request(ask(index)))
                await begun.wait()
                asked.cancel()
            for index in range(20):
                await link.request(ask(index))
            assert len(server.sessions.by_name["client-0"].answers) <= 2 and not server.sessions.refused

    run(test)


def test_a_flood_is_held_and_others_are_answered() -> None:
    """It writes 1 MiB requests, says that it has all answers, and reads none."""

    async def test() -> None:
        over = asyncio.Event()

        async def held(message: Message) -> Message:
            if message.sender == "client-0":
                await over.wait()
            return await echo(message)

        async with served(held, room=4) as server, linked(server.port, "client-1") as other:
            async with dialer(server.port).dial() as stream:
                await enter(stream)
                requests = (frames_of(number, [], MIB // 4) for number in itertools.count(1))
                flooding = asyncio.create_task(flood(stream, requests))
                for index in range(50):
                    assert (await other.request(ask(index))).header == {"index": index}
                sent = await flooding
                assert sent < 64, "held by flow control"
                session = server.sessions.by_name["client-0"]
                assert session.requests == len(session.answers) == 4
                assert (await other.request(ask(1))).header == {"index": 1}
            over.set()

    run(test)


def test_who_never_says_what_it_has_is_refused_when_too_much_is_kept_for_it() -> None:
    async def test() -> None:
        async with served(room=2) as server:
            async with dialer(server.port).dial() as stream:
                await enter(stream)
                reading = asyncio.create_task(_last_words(stream))
                with suppress(Refused, Disconnected):
                    for number in range(1, 60):
                        await stream.write(frames_of(number, [])[0])
                assert await reading == "client-0 does not say which answers it has: 24 are kept for it"
            assert len(server.sessions.by_name["client-0"].answers) <= 24

    run(test)


async def _last_words(stream: DialledStream) -> str:
    try:
        while await stream.read() is not None:
            pass
    except Refused as refused:
        return str(refused)
    return ""


def test_who_does_not_read_but_claims_to_have_the_answers_fills_no_queue() -> None:
    async def test() -> None:
        large = torch.zeros(MIB // 4)

        async def answer(message: Message) -> Message:
            return Message("forward", "cloud", message.micro_batch, {}, {"x": large})

        async with served(answer, room=4) as server, dialer(server.port).dial() as stream:
            await enter(stream)
            numbers = itertools.count(1)

            def requests(count: int) -> Iterator[list[bytes]]:
                return (frames_of(n, [n - 1]) + frames_of(n, []) for n in itertools.islice(numbers, count))

            await flood(stream, requests(50))
            tracemalloc.start()
            await flood(stream, requests(300))
            session = server.sessions.by_name["client-0"]
            await until(lambda: session.requests == 350)
            grown, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert session.connection is not None and len(session.connection.due) <= 4 and len(session.answers) <= 4
            assert grown < 16 * MIB, "300 MiB of answers were computed"

    run(test)


def test_a_new_connection_takes_over_from_one_that_hangs() -> None:
    """A number that waits for room on the old connection is not computed there too."""

    async def test() -> None:
        calls: list[int] = []
        over = asyncio.Event()

        async def held(message: Message) -> Message:
            calls.append(message.micro_batch[2])
            await over.wait()
            return await echo(message)

        async with served(held, room=1) as server, dialer(server.port).dial() as old:
            await enter(old)
            for number in (1, 2):
                await old.write(frames_of(number, [])[0])
            await until(lambda: calls == [1])
            async with dialer(server.port).dial() as new:
                await enter(new)
                for number in (1, 2, 3):
                    await new.write(frames_of(number, [])[0])
                over.set()
                for _ in range(3):
                    assert await new.read() is not None
                assert calls == [1, 2, 3]
            assert server.events.count(("away", "client-0")) <= 1

    run(test)


def test_a_new_process_of_a_child_has_the_old_ones_requests_forgotten() -> None:
    async def test() -> None:
        cancelled: list[int] = []

        async def held(message: Message) -> Message:
            if message.micro_batch[2] == 0:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append(0)
                    raise
            return await echo(message)

        async with served(held) as server:
            async with linked(server.port) as first:
                asked = asyncio.create_task(first.request(ask(0)))
                await until(lambda: "client-0" in server.sessions.by_name)
                await until(lambda: server.sessions.by_name["client-0"].requests == 1)
            assert asked.exception() is not None
            async with linked(server.port) as second:
                assert (await second.request(ask(1))).header == {"index": 1}
            assert cancelled == [0]

    run(test)


def test_a_process_that_replaces_one_which_had_joined_is_back_when_it_has_joined_too() -> None:
    join = Message("join", "client-0", (0, 0, 0))

    async def test() -> None:
        async with served() as server:
            for _ in range(2):
                async with linked(server.port) as first:  # that has not joined: one for the other
                    await first.request(ask(1))
                await until(lambda: server.events[-1] == ("away", "client-0"))
            assert [event for event, _ in server.events] == ["back", "away", "back", "away"]
            async with linked(server.port) as first:
                await first.request(join)
            await until(lambda: len(server.events) == 6)
            async with linked(server.port) as second:
                await second.request(ask(1))
                assert len(server.events) == 6
                await second.request(join)
                assert server.events[6:] == [("back", "client-0")]

    run(test)


def test_nothing_is_kept_of_a_process_that_broke_the_protocol() -> None:
    async def test() -> None:
        async with served() as server:
            async with dialer(server.port).dial() as stream:
                await enter(stream)
                await stream.write(frames_of(1, [])[0])
                await stream.write(b"nonsense")
                await _last_words(stream)
            before = server.sessions.by_name["client-0"]
            await until(lambda: before.connection is None)
            assert before.over and not before.answers
            async with dialer(server.port).dial() as stream:
                await enter(stream)
                assert server.sessions.by_name["client-0"] is not before

    run(test)
