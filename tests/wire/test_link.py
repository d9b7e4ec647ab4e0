"""A local link hands messages over, coded or not, counts both ways, and may let others go first."""

from __future__ import annotations

import asyncio

import pytest
import torch

from splitllm.errors import PeerError
from splitllm.wire.codecs import CODECS, Packed, unpack
from splitllm.wire.coding import Coding
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


NAMES = [*CODECS, "topk:0.1"]


def training(step: int, labels_stay: bool) -> list[tuple[Message, Message]]:
    """The requests of a micro-batch and their replies, in the two ways a run can place its labels."""
    random = torch.Generator().manual_seed(step)
    hidden_TD, gradient_TD = torch.randn(2, 7, 40, generator=random)
    rows_ND, gradient_ND = torch.randn(2, 3, 40, generator=random)
    header = {"train": True, "lengths": [4, 3], "rows": [5, step % 2], "input_gradient": True}
    positions_N = torch.tensor([1, 3, 6], dtype=torch.int32)
    ask = Message("forward", "client-0", (step, 0, 0), header, {"hidden_TD": hidden_TD, "positions_N": positions_N})
    if not labels_stay:
        return [(ask, Message("forward", "cloud", (step, 0, 0), {"loss": 1.0}, {"gradient_TD": gradient_TD}))]
    return [
        (ask, Message("forward", "cloud", (step, 0, 0), tensors={"rows_ND": rows_ND})),
        (
            Message("backward", "client-0", (step, 0, 0), tensors={"gradient_ND": gradient_ND}),
            Message("backward", "cloud", (step, 0, 0), tensors={"gradient_TD": gradient_TD}),
        ),
    ]


def through_bytes(packed: dict[str, Packed]) -> tuple[dict[str, torch.Tensor], int]:
    """What arrives from afar: all that is left of a tensor is bytes, codec, dtype and shape."""
    arrived, crossed = {}, 0
    for name, one in packed.items():
        raw = bytearray(one.blob.numpy().tobytes())
        blob = torch.frombuffer(raw, dtype=torch.uint8)
        arrived[name], crossed = unpack(Packed(one.codec, one.dtype, one.shape, blob)), crossed + len(raw)
    return arrived, crossed


def same(found: Message, expected: dict[str, torch.Tensor]) -> bool:
    return list(found.tensors) == list(expected) and all(
        torch.equal(found.tensors[name], tensor) and found.tensors[name].dtype == tensor.dtype
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("labels_stay", [False, True])
@pytest.mark.parametrize(("up", "down"), [*zip(NAMES, NAMES, strict=True), ("none", "int4"), ("topk:0.1", "none")])
def test_a_local_link_delivers_bit_for_bit_what_a_remote_one_would(up: str, down: str, labels_stay: bool) -> None:
    here, there = Coding(up, down), Coding(up, down)
    at_hand: list[tuple[Message, Message]] = []

    async def handle(request: Message) -> Message:
        seen.append(request)
        return at_hand[0][1]

    link, seen, expected = LocalLink(handle, coding=(Coding(up), Coding("none", down))), [], Traffic()
    for step in (0, 1, 2, 2, 3):  # one of them again
        for ask, answer_to_it in training(step, labels_stay):
            at_hand[:] = [(ask, answer_to_it)]
            found = asyncio.run(link.request(ask))
            request, crossed = through_bytes(here.pack_request(ask))
            expected.up += crossed
            reply, crossed = through_bytes(there.pack_reply(ask, answer_to_it))
            expected.down += crossed
            assert same(seen[-1], request) and same(found, reply)
            assert (found.kind, found.sender, found.header) == (ask.kind, "cloud", answer_to_it.header)
    assert link.traffic == expected


def test_with_codec_none_both_ways_nothing_is_copied() -> None:
    async def echo(request: Message) -> Message:
        return request

    sent = message(1)
    assert asyncio.run(LocalLink(echo, coding=(Coding(), Coding())).request(sent)) is sent
