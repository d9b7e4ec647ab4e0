"""Over real gRPC a client gets what its quota says, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import torch

from splitllm.deployment.bounds import micro_batch_bytes
from splitllm.deployment.quota import Quotas, limits_of, metered
from splitllm.policy.quotas import Limit
from splitllm.preflight import prepare
from splitllm.recipe import load_recipe
from splitllm.roles.account import Account
from splitllm.wire.coding import Coding
from splitllm.wire.message import Message
from splitllm.wire.uplink import RemoteLink
from tests.tiny import write_recipe
from tests.wire.serving import linked, run, served

WIDTH, TOKENS = 8, 50
SLOW = {"tokens": Limit(rate=200.0, burst=200.0)}


def forward(client: int, index: int = 0, *, train: bool = True, sender: str = "client-0") -> Message:
    """50 tokens in two rows; 1,600 bytes of activations and 8 of positions."""
    header = {"lengths": [30, 20], "train": train, "input_gradient": True}
    hidden_TD = torch.zeros(TOKENS, WIDTH)
    tensors = {"hidden_TD": hidden_TD, "positions_N": torch.zeros(2, dtype=torch.int32)}
    return Message("forward", sender, (0 if train else -1, client, index), header, tensors)


def backward(client: int, index: int = 0) -> Message:
    return Message("backward", "client-0", (0, client, index), {}, {"gradient_ND": torch.zeros(2, WIDTH)})


async def answer(message: Message) -> Message:
    """As many bytes as a gradient has."""
    name, rows = ("gradient_TD", TOKENS) if message.kind == "forward" else ("rows_ND", 2)
    return Message(message.kind, "cloud", message.micro_batch, {}, {name: torch.zeros(rows, WIDTH)})


async def finished(link: RemoteLink, *messages: Message) -> float:
    """When all are answered."""
    await asyncio.gather(*map(link.request, messages))
    return time.monotonic()


def test_a_tenant_waits_for_its_own_quota_and_no_other_waits_with_it() -> None:
    """200 at once, and 200 of the 400 that are asked for after a second."""

    async def test() -> None:
        handler = metered(answer, Quotas({0: SLOW, 1: {}}), Account(), Coding())
        async with served(handler) as server, linked(server.port) as slow, linked(server.port, "client-1") as other:
            started = time.monotonic()
            slow_job = asyncio.create_task(finished(slow, *(forward(0, index) for index in range(8))))
            for index in range(40):
                await other.request(forward(1, index, sender="client-1"))
            assert not slow_job.done(), "2,000 tokens of the other one passed meanwhile"
            assert await slow_job - started >= 0.95

    run(test)


def test_a_tenant_is_a_client_also_where_an_edge_speaks_for_it() -> None:
    async def test() -> None:
        handler = metered(answer, Quotas({0: SLOW, 1: {}}), Account(), Coding())
        async with served(handler, room=9) as server, linked(server.port, "client-2") as edge:
            slow = asyncio.create_task(finished(edge, *(forward(0, index) for index in range(8))))
            await asyncio.sleep(0.1)
            await finished(edge, *(forward(1, index) for index in range(8)))
            assert not slow.done()
            await slow

    run(test)


def test_a_gradient_pays_without_waiting_and_the_next_forward_waits_for_it() -> None:
    """Its 64 bytes, and as many of the answer, are 0.64 s more at 200 bytes a second."""
    quotas = Quotas({0: {"bytes": Limit(rate=200.0, burst=3208.0)}})

    async def test() -> None:
        async with served(metered(answer, quotas, Account(), Coding())) as server, linked(server.port) as link:
            quotas.pay(0, {"bytes": 20_000})
            waiting = asyncio.create_task(finished(link, forward(0)))
            before = quotas._buckets[0]["bytes"]
            await link.request(backward(0, 1))
            assert not waiting.done()
            assert quotas._buckets[0]["bytes"] - before == pytest.approx(128 / 200)
            waiting.cancel()

    run(test)


def test_requests_of_one_client_keep_their_order() -> None:
    order: list[int] = []

    async def noted(message: Message) -> Message:
        order.append(message.micro_batch[2])
        return await answer(message)

    async def test() -> None:
        handler = metered(noted, Quotas({0: SLOW}), Account(), Coding())
        await asyncio.gather(*(handler(forward(0, index)) for index in range(6)))

    run(test)
    assert order == list(range(6))


def test_an_evaluation_pays_too() -> None:
    async def test() -> None:
        quotas = Quotas({0: {"tokens": Limit(rate=100.0, burst=50.0)}})
        handler = metered(answer, quotas, Account(), Coding())
        await handler(forward(0, train=False))
        assert quotas._seconds(0, {"tokens": 50}) > 0.2

    run(test)


def test_tokens_and_coded_bytes_are_in_the_account() -> None:
    account = Account()

    async def test() -> None:
        async with (
            served(
                metered(answer, Quotas({}), account, Coding("int8", "bf16")), coding=lambda: Coding("int8", "bf16")
            ) as (server),
            linked(server.port, coding=Coding("int8", "bf16")) as link,
        ):
            await link.request(forward(3))
            await link.request(backward(3))

    run(test)
    sizes = Coding("int8", "bf16")
    up = sum(packed.nbytes for message in (forward(3), backward(3)) for packed in sizes.pack_request(message).values())
    assert account.tokens == {3: TOKENS} and account.up == {3: up}
    assert account.down == {3: 2 * WIDTH * (TOKENS + 2)}


def test_limits_are_those_of_the_recipe_and_hold_the_largest_micro_batch(tmp_path: Path) -> None:
    words = [
        "server.quota={tokens_per_second: 10, bytes_per_second: 1e+9}",
        "server.tenants={client-1: {tokens_per_second: 500}}",
    ]
    plan = prepare(load_recipe(write_recipe(tmp_path), words), data=False)
    found = limits_of(plan, "edge")
    largest = plan.recipe.train.batch_size * plan.recipe.data.max_length
    size = Limit(1e9, 1e9)
    assert found == {
        0: {"tokens": Limit(10, largest), "bytes": size},
        1: {"tokens": Limit(500, 500), "bytes": size},
    }
    assert micro_batch_bytes(plan) < 1e9
    assert limits_of(prepare(load_recipe(tmp_path / "recipe.yaml"), data=False), "cloud") == {0: {}, 1: {}}


@pytest.mark.parametrize("kind", ["open", "close", "join"])
def test_what_is_no_micro_batch_is_free(kind: str) -> None:
    account = Account()

    async def test() -> None:
        handler = metered(answer, Quotas({0: {"tokens": Limit(1.0, 1.0)}}), account, Coding())
        async with asyncio.timeout(1):
            for _ in range(3):
                await handler(Message(kind, "client-0", (0, 0, 0)))  # type: ignore[arg-type]

    run(test)
    assert not account.tokens and not account.up
