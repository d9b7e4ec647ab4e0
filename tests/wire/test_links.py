"""What every link promises: the same suite over a local one, gRPC without TLS, and gRPC with mutual TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import torch

from splitllm.errors import DivergedError, PeerError, RejoinError
from splitllm.wire.certificates import Credentials, load_credentials
from splitllm.wire.codecs import DTYPES
from splitllm.wire.coding import Coding
from splitllm.wire.envelopes import reply_envelope, request_values
from splitllm.wire.frames import Envelope, FrameType, frames_bytes
from splitllm.wire.issuing import issue
from splitllm.wire.link import Handler, Link, LocalLink
from splitllm.wire.message import Message
from splitllm.wire.uplink import RemoteLink
from tests.wire.serving import echo, linked, run, served

Open = Callable[..., AbstractAsyncContextManager[Link]]
KINDS_OF_LINK = ("local", "plain", "mtls")


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Credentials]:
    directory: Path = tmp_path_factory.mktemp("certs")
    issue(directory, ["cloud", "client-0"])
    return {name: load_credentials(directory, name) for name in ("cloud", "client-0")}


@pytest.fixture(params=KINDS_OF_LINK)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_link(kind: str, credentials: dict[str, Credentials]) -> Open:
    @asynccontextmanager
    async def opened(
        handler: Handler = echo, *, up: str = "none", down: str = "none", room: int = 8
    ) -> AsyncIterator[Link]:
        if kind == "local":
            yield LocalLink(handler, yields=True, coding=(Coding(up, down), Coding(up, down)))
            return
        above, here = (credentials["cloud"], credentials["client-0"]) if kind == "mtls" else (None, None)
        async with (
            served(handler, credentials=above, room=room, coding=lambda: Coding(up, down)) as server,
            linked(server.port, credentials=here, coding=Coding(up, down)) as link,
        ):
            yield link

    return opened


def ask(index: int = 0, kind: str = "forward", **tensors: torch.Tensor) -> Message:
    return Message(kind, "client-0", (3, 0, index), {"index": index}, tensors, generation=5)  # type: ignore[arg-type]


def test_each_request_gets_its_own_reply_whatever_the_order_of_the_answers(open_link: Open) -> None:
    waiting: dict[int, asyncio.Event] = {index: asyncio.Event() for index in range(6)}
    order: list[int] = []

    async def backwards(message: Message) -> Message:
        index = message.micro_batch[2]
        if index < 5:
            await waiting[index + 1].wait()
        order.append(index)
        waiting[index].set()
        return Message("forward", "cloud", message.micro_batch, {}, {"x": message.tensors["x"] * 10})

    async def test() -> None:
        async with open_link(backwards) as link:
            replies = await asyncio.gather(*(link.request(ask(n, x=torch.tensor([float(n)]))) for n in range(6)))
        assert [float(reply.tensors["x"]) for reply in replies] == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
        assert order == [5, 4, 3, 2, 1, 0]

    run(test)


def test_request_and_reply_arrive_with_all_that_they_say(open_link: Open) -> None:
    seen: list[Message] = []
    header = {"text": "ä", "numbers": [1, 2.5, None, True], "deep": {"a": [{}]}}

    async def note(message: Message) -> Message:
        seen.append(message)
        return Message("close", "cloud", message.micro_batch, header)

    async def test() -> None:
        async with open_link(note) as link:
            sent = Message("close", "client-0", (7, 2, 1), header, {}, generation=9)
            reply = await link.request(sent)
        assert seen == [sent]
        assert (reply.kind, reply.sender, reply.micro_batch, reply.header) == ("close", "cloud", (7, 2, 1), header)

    run(test)


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    found = {str(dtype): (torch.randn(5, 3, generator=random) * 3).to(dtype) for dtype in DTYPES}
    found["large"] = torch.randn(3 * 2**20 // 8 + 1, generator=random, dtype=torch.float64)
    found |= {"empty": torch.zeros(0, 7), "scalar": torch.tensor(2.5), "bits": torch.tensor([-0.0, 1e-45, 3.4e38])}
    found["slice"] = torch.randn(6, 4, generator=random).T[1:]
    return found


def test_tensors_arrive_bit_for_bit_and_aligned(open_link: Open, kind: str) -> None:
    sent, seen = tensors_of_all_kinds(), {}

    async def note(message: Message) -> Message:
        seen.update(message.tensors)
        return await echo(message)

    async def test() -> None:
        async with open_link(note) as link:
            reply = await link.request(ask(**sent))
        for arrived in (seen, dict(reply.tensors)):
            assert list(arrived) == list(sent)
            for name, tensor in sent.items():
                found = arrived[name]
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
                same = found.contiguous().flatten().view(torch.uint8) if tensor.dim() else found.view(1)
                bits = tensor.contiguous().flatten().view(torch.uint8) if tensor.dim() else tensor.view(1)
                assert torch.equal(same, bits), name
                assert kind == "local" or found.numel() == 0 or found.data_ptr() % 64 == 0, name

    run(test)


def test_traffic_is_what_crossed(open_link: Open, kind: str) -> None:
    async def double(message: Message) -> Message:
        return Message("forward", "cloud", message.micro_batch, {"loss": 1.0}, {"y": message.tensors["x"].double()})

    async def test() -> None:
        sent = ask(x=torch.zeros(300_000))
        async with open_link(double) as link:
            assert (link.traffic.up, link.traffic.down) == (0, 0)
            reply = await link.request(sent)
            if kind == "local":
                assert (link.traffic.up, link.traffic.down) == (1_200_000, 2_400_000)
                return
            packed = Coding().pack_request(sent)
            up = frames_bytes(Envelope(FrameType.REQUEST, 1, request_values(sent, []), packed))
            down = frames_bytes(reply_envelope(1, reply, Coding().pack_reply(sent, reply)))
            assert (link.traffic.up, link.traffic.down) == (up, down)

    run(test)


@pytest.mark.parametrize("error", [RejoinError, DivergedError, PeerError])
def test_an_error_reaches_the_one_who_asked(open_link: Open, error: type[Exception]) -> None:
    async def fail(message: Message) -> Message:
        raise error(f"because of {message.micro_batch[2]}")

    async def test() -> None:
        async with open_link(fail) as link:
            with pytest.raises(error, match=r"^because of 4$"):
                await link.request(ask(4))

    run(test)


def test_a_passing_state_leaves_the_link_as_it_was(open_link: Open) -> None:
    async def fail_once(message: Message) -> Message:
        if message.micro_batch[2] == 0:
            raise RejoinError("join again")
        return await echo(message)

    async def test() -> None:
        async with open_link(fail_once) as link:
            found = await asyncio.gather(*(link.request(ask(n)) for n in range(3)), return_exceptions=True)
            assert [type(one) for one in found] == [RejoinError, Message, Message]
            assert (await link.request(ask(9))).header == {"index": 9}

    run(test)


def test_a_slow_answer_does_not_hold_up_others(open_link: Open) -> None:
    async def test() -> None:
        over = asyncio.Event()

        async def slow_first(message: Message) -> Message:
            if message.micro_batch[2] == 0:
                await over.wait()
            return await echo(message)

        async with open_link(slow_first) as link:
            slow = asyncio.create_task(link.request(ask(0)))
            await asyncio.gather(*(link.request(ask(n)) for n in range(1, 30)))
            assert not slow.done()
            over.set()
            assert (await slow).header == {"index": 0}

    run(test)


def test_a_request_that_is_cancelled_disturbs_no_other(open_link: Open) -> None:
    async def test() -> None:
        begun, over = asyncio.Event(), asyncio.Event()

        async def slow_first(message: Message) -> Message:
            if message.micro_batch[2] == 0:
                begun.set()
                await over.wait()
            return await echo(message)

        async with open_link(slow_first) as link:
            cancelled = asyncio.create_task(link.request(ask(0)))
            await begun.wait()
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert (await link.request(ask(1))).header == {"index": 1}
            over.set()
            found = await asyncio.gather(*(link.request(ask(n)) for n in range(2, 40)))
            assert [reply.header["index"] for reply in found] == list(range(2, 40))

    run(test)


@pytest.mark.parametrize("kind", ["plain", "mtls"], indirect=True)  # in a local link nothing waits
def test_gradients_overtake_activations_that_wait(open_link: Open) -> None:
    async def test() -> None:
        order: list[tuple[str, int]] = []
        go = asyncio.Event()

        async def note(message: Message) -> Message:
            order.append((message.kind, message.micro_batch[2]))
            await go.wait()
            return await echo(message)

        async with open_link(note, room=2) as link:
            forwards = [asyncio.create_task(link.request(ask(n, x=torch.zeros(10_000)))) for n in range(6)]
            while len(order) < 2:
                await asyncio.sleep(0.01)
            backward = asyncio.create_task(link.request(ask(0, "backward")))
            await asyncio.sleep(0)
            go.set()
            await asyncio.gather(backward, *forwards)
        assert order[2] == ("backward", 0)

    run(test)


CODECS = ["none", "bf16", "fp16", "int8", "int4", "topk:0.1"]


def micro_batch(step: int) -> tuple[Message, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    hidden_TD, gradient_TD = torch.randn(2, 9, 48, generator=random)
    header = {"train": True, "lengths": [5, 4], "rows": [step % 2, 7], "input_gradient": True}
    positions_N = torch.tensor([0, 3, 8], dtype=torch.int32)
    tensors = {"hidden_TD": hidden_TD, "positions_N": positions_N}
    return Message("forward", "client-0", (step, 0, 0), header, tensors), gradient_TD


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_delivers_what_it_delivers_at_hand(open_link: Open, codec: str) -> None:
    arrived: list[torch.Tensor] = []

    async def test() -> None:
        async def answer(message: Message) -> Message:
            arrived.append(message.tensors["hidden_TD"])
            gradient_TD = micro_batch(message.step)[1]
            return Message("forward", "cloud", message.micro_batch, {"loss": 1.0}, {"gradient_TD": gradient_TD})

        async with open_link(answer, up=codec, down=codec) as link:
            for step in (0, 1, 2, 2, 3):
                arrived.append((await link.request(micro_batch(step)[0])).tensors["gradient_TD"])
        at_hand = LocalLink(answer, coding=(Coding(codec, codec), Coding(codec, codec)))
        found, arrived[:] = list(arrived), []
        for step in (0, 1, 2, 2, 3):
            arrived.append((await at_hand.request(micro_batch(step)[0])).tensors["gradient_TD"])
        assert len(found) == 10 and all(torch.equal(a, b) for a, b in zip(found, arrived, strict=True))

    run(test)


@pytest.mark.parametrize("codec", ["none", "int8", "int4", "topk:0.1"])
def test_labels_that_stay_with_the_client_travel_no_other_way(open_link: Open, codec: str) -> None:
    """Rows come down, their gradient goes up in a second request, that of the cut comes down; coded as at hand."""
    random = torch.Generator().manual_seed(2)
    rows_ND, gradient_ND = torch.randn(2, 3, 48, generator=random)

    async def test() -> None:
        arrived: list[torch.Tensor] = []

        async def answer(message: Message) -> Message:
            arrived.extend(message.tensors.values())
            gradient_TD = micro_batch(message.step)[1]
            down = {"rows_ND": rows_ND} if message.kind == "forward" else {"gradient_TD": gradient_TD}
            return Message(message.kind, "cloud", message.micro_batch, {}, down)

        async def steps(link: Link) -> list[torch.Tensor]:
            arrived.clear()
            for step in (0, 1, 1, 2):
                asked = micro_batch(step)[0]
                arrived.append((await link.request(asked)).tensors["rows_ND"])
                back = Message("backward", "client-0", asked.micro_batch, {}, {"gradient_ND": gradient_ND})
                arrived.append((await link.request(back)).tensors["gradient_TD"])
            return list(arrived)

        async with open_link(answer, up=codec, down=codec) as link:
            found = await steps(link)
        expected = await steps(LocalLink(answer, coding=(Coding(codec, codec), Coding(codec, codec))))
        assert len(found) == 4 * 5 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    run(test)


@pytest.mark.parametrize("kind", ["plain", "mtls"], indirect=True)  # a local link has no end
def test_a_link_that_is_closed_answers_nothing_more(open_link: Open) -> None:
    async def test() -> None:
        async def never(message: Message) -> Message:
            await asyncio.Event().wait()
            return message

        async with open_link(never) as link:
            asked = [asyncio.create_task(link.request(ask(n))) for n in range(3)]
            await asyncio.sleep(0.05)
        for one in asked:
            with pytest.raises(PeerError, match=r"^the link to cloud is closed$"):
                await one
        with pytest.raises(PeerError, match=r"^the link to cloud is closed$"):
            await link.request(ask(9))

    run(test)


def test_bytes_are_counted_for_the_client_whose_lane_they_are_of(open_link: Open, kind: str) -> None:
    if kind == "local":
        pytest.skip("a local link has no lanes")

    async def test() -> None:
        async with open_link() as link:
            assert isinstance(link, RemoteLink)
            asked = [Message("forward", "edge", (0, client, 0), {}, {"x": torch.zeros(500)}) for client in (0, 1, 1)]
            await asyncio.gather(*map(link.request, asked))
            mine, other = link.of_client[0], link.of_client[1]
            assert (mine.up + other.up, mine.down + other.down) == (link.traffic.up, link.traffic.down)
            assert 2000 < mine.up < other.up < 2.1 * mine.up and 2000 < mine.down < other.down < 2.1 * mine.down

    run(test)
