"""A meeting ends for all children alike, whoever comes last, and also when it ends in an error."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import PeerError
from splitllm.roles.meeting import Meeting
from splitllm.wire.message import Message

CHILDREN = ["client-0", "client-1", "client-2", "client-3"]
Reply = Callable[[Message], Message]
SECONDS = 5.0  # after which a child that still waits has been forgotten


def message(sender: str, step: int = 0) -> Message:
    return Message("open", sender, (step, 0, 0))


async def listing(messages: list[Message]) -> Reply:
    """Every child learns in which order the messages were put."""
    names = [message.sender for message in messages]
    return lambda message: Message("open", "cloud", message.micro_batch, {"order": names, "to": message.sender})


async def together(meeting: Meeting, senders: list[str], step: int = 0) -> list[Message | BaseException]:
    joins = (meeting.join(message(sender, step)) for sender in senders)
    return await asyncio.wait_for(asyncio.gather(*joins, return_exceptions=True), SECONDS)


@given(st.permutations(CHILDREN), st.permutations(CHILDREN))
def test_the_order_of_arrival_does_not_matter(first: list[str], second: list[str]) -> None:
    async def run() -> None:
        meeting = Meeting(CHILDREN, listing)
        for step, senders in enumerate([first, second]):
            replies = await together(meeting, senders, step)
            assert [reply.header["to"] for reply in replies] == senders
            assert all(reply.header["order"] == CHILDREN and reply.step == step for reply in replies)

    asyncio.run(run())


def test_nothing_is_settled_before_all_are_there() -> None:
    async def run() -> None:
        meeting = Meeting(CHILDREN, listing)
        waiting = [asyncio.ensure_future(meeting.join(message(sender))) for sender in CHILDREN[:-1]]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await meeting.join(message(CHILDREN[-1]))
        assert len(await asyncio.wait_for(asyncio.gather(*waiting), SECONDS)) == 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (message("stranger"), r"stranger is not a child here \(children: client-0, client-1, client-2, client-3\)"),
        (message("client-0"), "client-0 sent open twice in step 0"),
        (message("client-1", step=4), "client-1 is at step 4, the others at {0}"),
    ],
    ids=["stranger", "twice", "other step"],
)
def test_who_breaks_the_protocol_is_refused_and_the_others_go_on(wrong: Message, reason: str) -> None:
    async def run() -> None:
        meeting = Meeting(CHILDREN, listing)
        first = asyncio.ensure_future(meeting.join(message("client-0")))
        await asyncio.sleep(0)
        with pytest.raises(PeerError, match=reason):
            await meeting.join(wrong)
        replies = await together(meeting, CHILDREN[1:])
        assert all(isinstance(reply, Message) for reply in [*replies, await first])

    asyncio.run(run())


@pytest.mark.parametrize("suspends", [False, True])
@pytest.mark.parametrize("error", [PeerError("no"), RuntimeError("out of memory"), KeyError("x")])
def test_an_error_reaches_every_child_and_the_next_step_can_meet(error: Exception, suspends: bool) -> None:
    failing = [True]

    async def settle(messages: list[Message]) -> Reply:
        if suspends:
            await asyncio.sleep(0)
        if failing.pop() if failing else False:
            raise error
        return await listing(messages)

    async def run() -> None:
        meeting = Meeting(CHILDREN, settle)
        assert await together(meeting, CHILDREN) == [error] * len(CHILDREN)
        assert all(isinstance(reply, Message) for reply in await together(meeting, CHILDREN, step=1))

    asyncio.run(run())


@pytest.mark.filterwarnings("error")
def test_an_only_child_gets_the_error_once(caplog: pytest.LogCaptureFixture) -> None:
    async def settle(_: list[Message]) -> Reply:
        raise PeerError("no")

    async def run() -> None:
        with pytest.raises(PeerError, match="no"):
            await Meeting(CHILDREN[:1], settle).join(message("client-0"))

    gc.collect()  # what other tests left behind
    caplog.clear()
    asyncio.run(run())
    gc.collect()
    assert not caplog.records  # asyncio reports an error that nobody took


def test_a_child_that_gives_up_does_not_take_the_others_with_it() -> None:
    async def run() -> None:
        meeting = Meeting(CHILDREN, listing)
        tasks = [asyncio.ensure_future(meeting.join(message(sender))) for sender in CHILDREN[:-1]]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        await meeting.join(message(CHILDREN[-1]))
        replies = await asyncio.wait_for(asyncio.gather(*tasks[1:]), SECONDS)
        assert [reply.header["to"] for reply in replies] == CHILDREN[1:-1]

    asyncio.run(run())
