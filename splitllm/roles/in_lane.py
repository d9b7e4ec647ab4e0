"""A server's side of rounds in the lane of one client: what it brings goes to a hall that all lanes share.

Stands where a `Convener` does. Right above clients the lane takes part in the rounds of the server's hall; further up
its `round` only says that the step is to be committed: those servers average what halls bring them (`merging.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from splitllm.federated.averager import is_finite
from splitllm.recipe import intervals
from splitllm.roles.book import Arrival, Verdict
from splitllm.roles.hall import Hall
from splitllm.roles.participation import Participation
from splitllm.roles.rounds import Rounds
from splitllm.wire.message import Message

if TYPE_CHECKING:
    from splitllm.roles.server import Server


class InLane:
    """Of one generation of one lane.

    Args:
        server: of the lane.
        rounds: its part in rounds: the adapter that it trains for its client.
        hall: of the server right above clients; None further up.
    """

    def __init__(self, server: Server, rounds: Rounds, hall: Hall | None) -> None:
        self._server, self._rounds, self._hall = server, rounds, hall

    @property
    def _counts(self) -> Participation:
        assert self._rounds.participation is not None
        return self._rounds.participation

    def asked(self, step: int) -> frozenset[int] | None:
        """A step begins: whether this lane's client takes part in it, where that is decided here."""
        self._rounds.begin(step)
        if self._hall is None:
            return None
        self._counts.opened()
        return frozenset(client for client, name in self._counts.names.items() if self._hall.asks(name, step))

    def closed(self, client: int) -> None:
        """The child has come to the end of a step."""
        if self._hall is not None:
            self._counts.closed(client)

    def count(self, labels: Mapping[int, int], losses: Mapping[int, Sequence[Any]]) -> None:
        """What the client has done in a step that is about to be applied."""
        if self._hall is not None:
            self._counts.count(labels, losses)

    def follows(self, steps: int) -> bool:
        """Whether a round belongs to the step after which so many are done."""
        return self._rounds.due(steps) > 0

    async def hold(self, message: Message) -> Message:
        """Answer `round` of the child.

        Raises:
            DivergedError: nothing that anybody brought is finite.
            PeerError: a server above gave no answer of use.
        """
        server, rounds, steps = self._server, self._rounds, message.step
        verdict = Verdict(None, message.header.get("reports", []))
        weights: Mapping[str, Any] = message.header.get("weights", {})
        if self._hall is not None:
            arrival = await server.device.run(lambda: self._arrival(message))
            levels = len(intervals(rounds.recipe))
            weights = {str(client): [count] * levels for client, count in arrival.weights.items()}
            verdict = await self._hall.bring(arrival)
        if server.uplink is not None:
            header = {"weights": weights, "reports": verdict.reports}
            await server.uplink.request(server.message("round", message.micro_batch, header))
        else:
            assert server.top is not None
            server.top.observe_round(steps, verdict.reports)
        write = await server.device.run(lambda: self._go_on(steps, verdict))
        if write is not None:
            await asyncio.to_thread(write)
        value = {} if verdict.value is None else verdict.value
        tensors = {name: tensor for name, tensor in value.items() if rounds.concerns(name, message.sender)}
        void = self._hall is not None and verdict.value is None
        return server.message("round", message.micro_batch, {"void": void}, tensors)

    def _arrival(self, message: Message) -> Arrival:
        """What the client has, and what is trained for it here; as it is now."""
        rows = self._rounds.examples_in([message])
        ((client, examples),) = rows.items()
        value = dict(message.tensors)
        for tensors in self._rounds.values(self._rounds.due(message.step)):
            value |= {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}  # as what travels
        weights = {client: each[0] for client, each in self._counts.weights(rows).items()}
        spoiled = bool(message.header.get("spoiled")) or not is_finite(value)
        lesson = replace(self._counts.lesson(client))
        return Arrival(self._counts.names[client], message.step, value, weights, spoiled, examples, lesson)

    def _go_on(self, steps: int, verdict: Verdict) -> Callable[[], None] | None:
        if self._hall is not None and verdict.value is not None:
            self._rounds.take(verdict.value, self._rounds.due(steps), steps)
            self._counts.begin_anew()
        return self._server.commit(steps, self._server.generation)
