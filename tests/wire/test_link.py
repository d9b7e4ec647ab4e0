"""A local link hands messages over, counts both ways, and may let others go first."""

from __future__ import annotations

import asyncio

import pytest
import torch

from splitllm.errors import PeerError
from splitllm.wire.link import LocalLink, Traffic
from splitllm.wire.message import Message


def message(number: int, size: int = 3) -> Message:
    return Message("forward", f"client-{number}", (0, number, 0), tensors={"x": torch.full((size,), float(number))})


async def answer(request: Message) -> Message:
    return Message("forward", "cloud", request.micro_batch, tensors={"y": request.tensors["x"][:1].double()})


@pytest.mark.parametrize("yields", [False, True])
def test_each_request_gets_its_own_reply_and_is_counted(yields: bool) -> None:
    link = LocalLink(answer, yields=yields)

    async def run() -> list[Message]:
        return await asyncio.gather(*(link.request(message(number)) for number in range(5)))

    replies = asyncio.run(run())
    assert [float(reply.tensors["y"]) for reply in replies] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert link.traffic == Traffic(up=5 * 3 * 4, down=5 * 8)


@pytest.mark.parametrize("yields", [False, True])
def test_the_handler_gets_the_message_itself(yields: bool) -> None:
    seen: list[Message] = []

    async def note(request: Message) -> Message:
        seen.append(request)
        return request

    sent = message(1)
    assert asyncio.run(LocalLink(note, yields=yields).request(sent)) is sent
    assert seen[0] is sent


def order_of(yields: bool) -> list[str]:
    order: list[str] = []

    async def note(request: Message) -> Message:
        order.append(f"handled {request.sender}")
        return request

    async def ask(number: int) -> None:
        order.append(f"asked client-{number}")
        await link.request(message(number))

    async def run() -> None:
        await asyncio.gather(ask(0), ask(1))

    link = LocalLink(note, yields=yields)
    asyncio.run(run())
    return order


def test_a_yielding_link_lets_others_ask_before_it_is_answered() -> None:
    asked, handled = ["asked client-0", "asked client-1"], ["handled client-0", "handled client-1"]
    assert order_of(yields=True) == [*asked, *handled]
    assert order_of(yields=False) == [asked[0], handled[0], asked[1], handled[1]]


@pytest.mark.parametrize("yields", [False, True])
def test_an_error_of_the_role_above_reaches_the_one_who_asked(yields: bool) -> None:
    async def refuse(_: Message) -> Message:
        raise PeerError("not now")

    link = LocalLink(refuse, yields=yields)
    with pytest.raises(PeerError, match="not now"):
        asyncio.run(link.request(message(0)))
    assert link.traffic == Traffic(up=12, down=0)
