"""A link over real gRPC survives a network that breaks: every question is answered, and computed once."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from splitllm.errors import PeerError, RejoinError
from splitllm.wire.message import Message
from tests.grids import counts
from tests.wire.serving import echo, linked, raises, relayed, run, served, until

RELAY = Path(__file__).resolve().parents[2] / "scripts" / "relay.py"


def ask(index: int = 0, **tensors: torch.Tensor) -> Message:
    return Message("forward", "client-0", (0, 0, index), {"index": index}, tensors)


def test_a_drop_while_a_request_is_computed_costs_nothing() -> None:
    async def test() -> None:
        calls: list[int] = []
        begun, go = asyncio.Event(), asyncio.Event()

        async def slow(message: Message) -> Message:
            calls.append(message.micro_batch[2])
            begun.set()
            await go.wait()
            return await echo(message)

        async with served(slow) as server, relayed(server.port) as relay:
            states: list[str] = []
            async with linked(relay.listen[1], states=states) as link:
                asked = asyncio.create_task(link.request(ask(1)))
                await begun.wait()
                relay.drop()
                await until(lambda: server.events[-1] == ("away", "client-0"))
                go.set()
                assert (await asked).header == {"index": 1}
                assert calls == [1]
                assert states[0] == states[-1] == "connected" and len(states) == 3
                assert server.events == [("back", "client-0"), ("away", "client-0"), ("back", "client-0")]

    run(test)


def test_an_answer_that_was_lost_with_the_connection_is_not_computed_again() -> None:
    async def test() -> None:
        calls: list[int] = []
        begun = asyncio.Event()

        async def while_away(message: Message) -> Message:
            calls.append(message.micro_batch[2])
            begun.set()
            await until(lambda: server.events[-1] == ("away", "client-0"))
            if message.micro_batch[2] == 1:
                raise RejoinError("because")
            return await echo(message)

        async with served(while_away) as server, relayed(server.port) as relay, linked(relay.listen[1]) as link:
            for index in (0, 1):
                asked = asyncio.create_task(link.request(ask(index)))
                await begun.wait()
                begun.clear()
                relay.refuse(0.2)
                if index == 1:
                    assert await raises(asked, RejoinError) == "because"
                else:
                    assert (await asked).header == {"index": 0}
            assert calls == [0, 1]

    run(test)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_drop_amid_a_message_of_several_frames(direction: str) -> None:
    async def test() -> None:
        calls: list[int] = []
        large = torch.randn(3 * 2**20)

        async def answer(message: Message) -> Message:
            calls.append(message.micro_batch[2])
            tensors = {"x": large} if direction == "down" else {}
            whole = torch.equal(message.tensors["x"], large) if direction == "up" else True
            return Message("forward", "cloud", message.micro_batch, {"whole": whole}, tensors)

        async with served(answer) as server, relayed(server.port) as relay, linked(relay.listen[1]) as link:
            await link.welcome()
            relay.up.rate = relay.down.rate = 40e6  # 12 MiB in 0.3 s
            way = getattr(relay, direction)
            asked = asyncio.create_task(link.request(ask(0, x=large if direction == "up" else large[:1])))
            await until(lambda: way.delivered > 3 * 2**20)
            relay.drop()
            relay.up.rate = relay.down.rate = None
            reply = await asked
            assert reply.header["whole"] and (direction == "up" or torch.equal(reply.tensors["x"], large))
            assert calls == [0] and relay.accepted == 2

    run(test)


@pytest.mark.parametrize("count", counts(120, 300))
def test_requests_through_a_random_drop_for_every_sixth_are_each_computed_once(count: int) -> None:
    chance = random.Random(3)

    async def test() -> None:
        calls: Counter[int] = Counter()

        async def answer(message: Message) -> Message:
            index = message.micro_batch[2]
            calls[index] += 1
            await asyncio.sleep(0.01 * (index % 3))
            size = 400_000 if index % 10 == 0 else 5
            return Message("forward", "cloud", message.micro_batch, {}, {"y": message.tensors["x"][:1].repeat(size)})

        async with served(answer, room=4) as server, relayed(server.port) as relay, linked(relay.listen[1]) as link:

            async def disturb() -> None:
                while drops["made"] < count // 6:
                    await asyncio.sleep(chance.uniform(0.0, 0.03))
                    drops["made"] += bool(relay._open)
                    relay.drop()

            async def one(index: int) -> None:
                if index % 25 == 0:  # so that some are asked late
                    await until(lambda: drops["made"] > index // 7, 60)
                size = 600_000 if index % 10 == 5 else 5
                reply = await link.request(ask(index, x=torch.full((size,), float(index))))
                assert float(reply.tensors["y"][0]) == index
                if index % 10 == 0:
                    assert reply.tensors["y"].shape == (400_000,) and bool((reply.tensors["y"] == index).all())

            drops = {"made": 0}
            disturbing = asyncio.create_task(disturb())
            await asyncio.gather(*(one(index) for index in range(count)))
            await disturbing
            assert calls == Counter(range(count))
            await link.request(ask(count, x=torch.zeros(1)))
            assert len(server.sessions.by_name["client-0"].answers) <= 2

    run(test, 90)


def test_a_cut_longer_than_keepalive_heals_by_itself() -> None:
    async def test() -> None:
        calls: list[int] = []

        async def note(message: Message) -> Message:
            calls.append(message.micro_batch[2])
            return await echo(message)

        command = [sys.executable, str(RELAY), "--listen", "127.0.0.1:0"]
        async with served(note, keepalive=0.15) as server:
            command += ["--to", f"127.0.0.1:{server.port}"]
            relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            try:
                assert relay.stdin is not None and relay.stdout is not None
                port = int(relay.stdout.readline().rpartition(":")[2])
                states: list[str] = []
                async with linked(port, keepalive=0.15, states=states) as link:
                    await link.request(ask(0))
                    relay.stdin.write("cut 4\n")
                    relay.stdin.flush()
                    await asyncio.sleep(2.5)  # longer than a silent peer is waited for
                    assert (await link.request(ask(1))).header == {"index": 1}
                    assert calls == [0, 1] and states[0] == states[-1] == "connected" and len(states) >= 3, states
            finally:
                relay.kill()
                relay.communicate()
        assert ("away", "client-0") in server.events

    run(test)


def test_requests_that_are_cancelled_keep_no_place() -> None:
    """The session above drops their answers, since the child says that it has them: nothing will come."""

    async def test() -> None:
        begun, go = asyncio.Event(), asyncio.Event()

        async def held(message: Message) -> Message:
            if message.micro_batch[2] < 100:
                begun.set()
                await go.wait()
            return await echo(message)

        async with served(held, room=2) as server, linked(server.port) as link:
            for index in range(6):
                begun.clear()
                go.clear()
                asked = asyncio.create_task(link.request(ask(index)))
                await begun.wait()
                asked.cancel()
                other = asyncio.create_task(link.request(ask(100 + index)))  # says that the first is of no use
                assert (await other).header == {"index": 100 + index}
                assert link.under_way == 0
                go.set()
                await until(
                    lambda: all(answer.done() for answer in server.sessions.by_name["client-0"].answers.values())
                )
            many = [asyncio.create_task(link.request(ask(n, x=torch.zeros(600_000)))) for n in range(200, 220)]
            await until(lambda: link.under_way > 0)
            for one in many:  # one is being written, others wait
                one.cancel()
            assert (await link.request(ask(300))).header == {"index": 300}

    run(test)


def test_a_server_that_was_restarted_has_all_join_again() -> None:
    async def test() -> None:
        begun = asyncio.Event()

        async def never(message: Message) -> Message:
            begun.set()
            await asyncio.Event().wait()
            return message

        async with served(never) as server, linked(server.port) as link:
            asked = [asyncio.create_task(link.request(ask(index))) for index in range(3)]
            await begun.wait()
            await server.listener.stop(0)
            async with served(echo, port=server.port):
                for one in asked:
                    assert await raises(one, RejoinError) == "cloud was restarted; join again"
                assert (await link.request(ask(7))).header == {"index": 7}

    run(test)


def test_a_link_waits_for_a_server_that_comes_up_later() -> None:
    async def test() -> None:
        async with served() as server:
            port = server.port
        states: list[str] = []
        async with linked(port, states=states) as link:
            asked = asyncio.create_task(link.request(ask(1)))
            await asyncio.sleep(0.4)
            assert len(states) == 1 and "refused" in states[0], "told once, not with every attempt"
            async with served(port=port):
                assert (await asked).header == {"index": 1}
                assert states[-1] == "connected"

    run(test)


def test_goodbye_ends_the_stream_in_good_order() -> None:
    async def test() -> None:
        async with served() as server:
            async with linked(server.port, goodbye=True) as link:
                await link.request(ask(1))
            await until(lambda: len(server.events) == 3)
            assert server.events == [("back", "client-0"), ("left", "client-0"), ("away", "client-0")]
            assert not server.sessions.by_name["client-0"].answers and not server.sessions.refused
            assert "closed" in await raises(link.request(ask(2)))

    run(test)


def test_closing_a_link_fails_what_still_waits() -> None:
    async def test() -> None:
        async def never(message: Message) -> Message:
            await asyncio.Event().wait()
            return message

        async with served(never) as server, linked(server.port) as link:
            asked = asyncio.create_task(link.request(ask()))
            await link.welcome()
            await link.close()
            assert await raises(asked) == "the link to cloud is closed"

    run(test)


def test_a_request_that_cannot_travel_fails_alone() -> None:
    async def test() -> None:
        async with served() as server, linked(server.port) as link:
            too_much = Message("forward", "client-0", (0, 0, 0), {"text": "x" * 600_000})
            assert "at most" in await raises(link.request(too_much), PeerError)
            assert (await link.request(ask(1))).header == {"index": 1}

    run(test)


def test_what_ends_the_run_reaches_every_child() -> None:
    async def test() -> None:
        async with served() as server, linked(server.port) as one, linked(server.port, "client-1") as other:
            await asyncio.gather(one.welcome(), other.welcome())
            await until(lambda: len(server.events) == 2)
            server.sessions.tell_all(PeerError("the disk is full"))
            for link in (one, other):
                assert await raises(link.failed) == "the disk is full"
                assert await raises(link.request(ask())) == "the disk is full"

    run(test)
