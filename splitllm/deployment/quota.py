"""What a client may have of a server in a second, and what it has had: on the way of every micro-batch's request."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

from splitllm.deployment.bounds import micro_batch_bytes
from splitllm.plan import Plan
from splitllm.policy.quotas import Limit, allowed_at, taken
from splitllm.recipe import TenantRecipe, client_names, clients_below
from splitllm.roles.account import Account
from splitllm.wire.coding import Coding
from splitllm.wire.link import Handler
from splitllm.wire.message import Message

BURST_SECONDS = 1.0
"""What a client may have at once after a pause; its largest micro-batch in any case."""


class Quotas:
    """The buckets of all clients of a server.

    Args:
        limits: client -> resource -> its limit; a client without any never waits.
        clock: seconds.
    """

    def __init__(self, limits: Mapping[int, Mapping[str, Limit]], clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._buckets: dict[int, dict[str, float]] = {}
        self._queues: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def wait(self, client: int, amounts: Mapping[str, float]) -> None:
        """Take these amounts as soon as the client's buckets allow it; its requests keep their order."""
        if not self._limits.get(client):
            return
        async with self._queues[client]:
            while (seconds := self._seconds(client, amounts)) > 0:
                await asyncio.sleep(seconds)
            self.pay(client, amounts)

    def pay(self, client: int, amounts: Mapping[str, float]) -> None:
        """Take them now, into debt if need be: what comes later waits the longer."""
        if limits := self._limits.get(client):
            self._buckets[client] = taken(self._buckets.get(client, {}), limits, amounts, self._clock())

    def _seconds(self, client: int, amounts: Mapping[str, float]) -> float:
        return allowed_at(self._buckets.get(client, {}), self._limits[client], amounts) - self._clock()


def limits_of(plan: Plan, name: str) -> dict[int, dict[str, Limit]]:
    """Client -> its limits at server `name`, of all clients below it."""
    server, clients = plan.recipe.server, client_names(plan.recipe)
    largest = {"tokens": plan.recipe.train.batch_size * plan.recipe.data.max_length, "bytes": micro_batch_bytes(plan)}
    found = {}
    for client in clients_below(plan.recipe, name):
        own = server.tenants.get(clients[client], TenantRecipe())
        rates = {
            "tokens": own.tokens_per_second or server.quota.tokens_per_second,
            "bytes": own.bytes_per_second or server.quota.bytes_per_second,
        }
        found[client] = {
            one: Limit(rate, max(rate * BURST_SECONDS, largest[one])) for one, rate in rates.items() if rate is not None
        }
    return found


def metered(answer: Handler, quotas: Quotas, account: Account, coding: Coding) -> Handler:
    """Answers micro-batches within the quota of their clients, whoever sent them up, and keeps their account.

    A forward waits; a gradient does not, since it lets memory go, and neither do answers: they are paid for by the next
    forward.

    Args:
        answer: of the server.
        quotas: of its clients.
        account: of them.
        coding: as on the links to its children; tells how large tensors are there.
    """

    async def within(message: Message) -> Message:
        if message.kind not in ("forward", "backward"):
            return await answer(message)
        client, nbytes = message.micro_batch[1], coding.request_bytes(message)
        if message.kind == "forward":
            tokens = sum(message.header["lengths"])
            account.asked(client, tokens, nbytes)
            await quotas.wait(client, {"tokens": tokens, "bytes": nbytes})
        else:
            account.asked(client, 0, nbytes)
            quotas.pay(client, {"bytes": nbytes})
        reply = await answer(message)
        nbytes = coding.reply_bytes(message, reply)
        account.answered(client, nbytes)
        quotas.pay(client, {"bytes": nbytes})
        return reply

    return within
