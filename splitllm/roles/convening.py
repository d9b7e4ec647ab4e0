"""A server's side of a round that all its children hold together, at the end of a step.

Adapters go up as far as an average is due, and what all go on from comes down.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from splitllm.errors import VoidRoundError
from splitllm.federated.rounds import Tensors
from splitllm.roles.masked import MaskedRounds
from splitllm.roles.meeting import Meeting
from splitllm.roles.outcomes import Outcome, is_void, outcome_in
from splitllm.roles.rounds import Rounds, Weights
from splitllm.wire.message import Message

if TYPE_CHECKING:
    from splitllm.roles.server import Server

Reports = list[dict[str, Any]]


class Convener:
    """Of one generation of a server.

    Args:
        server: whose rounds these are.
        rounds: its part in them.
        children: the roles below that take part.
    """

    def __init__(self, server: Server, rounds: Rounds, children: Sequence[str]) -> None:
        self._server, self._rounds = server, rounds
        self._meeting, self._masking = Meeting(children, self._hold), MaskedRounds(rounds, server.message)

    def asked(self, step: int) -> frozenset[int] | None:
        """A step begins: who takes part in it, where that is decided here."""
        self._rounds.begin(step)
        if self._rounds.participation is None:
            return None
        self._rounds.participation.opened()
        return self._rounds.participation.asked(step)

    def closed(self, client: int) -> None:
        """A child has come to the end of a step; `client` is its number where it is a client."""
        if self._rounds.participation is not None:
            self._rounds.participation.closed(client)

    def count(self, labels: Mapping[int, int], losses: Mapping[int, Sequence[Any]]) -> None:
        """What clients have done in a step that is about to be applied."""
        if self._rounds.participation is not None:
            self._rounds.participation.count(labels, losses)

    def follows(self, steps: int) -> bool:
        """Whether a round belongs to the step after which so many are done."""
        return self._rounds.due(steps) > 0

    async def hold(self, message: Message) -> Message:
        """Answer `round`, or `secure`, of one child when all have sent theirs.

        Raises:
            PeerError: it breaks the protocol.
        """
        return await (self._masking.phase(message) if message.kind == "secure" else self._meeting.join(message))

    async def _hold(self, messages: list[Message]) -> Callable[[Message], Message]:
        server, rounds, steps = self._server, self._rounds, messages[0].step
        due, weights = rounds.due(steps), rounds.weights_in(messages)
        reports: Reports = [report for message in messages for report in message.header.get("reports", [])]
        averages, made = rounds.level <= due, Outcome(None, {}, 0)
        if averages:
            made = await server.device.run(lambda: self._average(messages, weights))
            reports.append(rounds.report(made))
            weights = rounds.of_used(weights, messages, made)
        else:
            await server.device.run(lambda: rounds.average_groups(weights, due))
        outcome = await self._outcome(messages, made, weights, reports)
        if averages and rounds.level == due:
            outcome = None if outcome is None else rounds.settled(outcome)
        if rounds.participation is not None and outcome is not None:
            rounds.participation.held(due, steps - 1, list(made.rejected), rounds.examples_in(messages))
        await self._go_on(steps, outcome, due)
        void, value = averages and outcome is None, outcome or {}

        def reply(message: Message) -> Message:
            tensors = {name: tensor for name, tensor in value.items() if rounds.concerns(name, message.sender)}
            return server.message("round", message.micro_batch, {"void": void}, tensors)

        return reply

    def _average(self, messages: list[Message], weights: Weights) -> Outcome:
        rounds, steps = self._rounds, messages[0].step
        if rounds.hiding is None:
            children = [(m.sender, rounds.clients_in(m), dict(m.tensors)) for m in messages]
            spoiled = [message.sender for message in messages if message.header.get("spoiled")]
            return rounds.average(children, weights, rounds.due(steps), spoiled)
        there = [m for m in messages if any(weights[client][0] > 0 for client in rounds.clients_in(m))]
        try:
            words = self._masking.total(there) if rounds.hiding.threshold else rounds.sum_of(there)
        except VoidRoundError as error:
            return Outcome(None, {}, 0, str(error))
        return rounds.average_hidden(words, weights, rounds.due(steps), steps)

    async def _outcome(
        self, messages: list[Message], made: Outcome, weights: Weights, reports: Reports
    ) -> Tensors | None:
        """What all go on from, asked above if it is due there; None where the round is void, or none of this level."""
        server, rounds, steps = self._server, self._rounds, messages[0].step
        own = None if made.combined is None else made.combined.value
        goes_up = rounds.level < rounds.due(steps)
        if goes_up and own is None:
            own = rounds.uncounted(messages)
        sent = dict(own) if goes_up and own is not None else {}
        if server.top is None:
            assert server.uplink is not None
            header = {"weights": weights, "reports": reports}
            reply = await server.uplink.request(server.message("round", messages[0].micro_batch, header, sent))
            if goes_up:
                return None if is_void(reply) else outcome_in(reply, sent, rounds.arithmetic)
        else:
            server.top.observe_round(steps, reports)
            if goes_up:
                assert server.top.elsewhere is not None, "no level is above a top but that of all sites"
                weight = math.fsum(each[-1] for each in weights.values())
                return await server.top.elsewhere.outcome(steps, weight, sent)
        return None if made.void or own is None else dict(own)

    async def _go_on(self, steps: int, outcome: Tensors | None, due: int) -> None:
        """Take what the round has made, if it counts, and commit the step that it belongs to."""

        def job() -> Callable[[], None] | None:
            if self._rounds.level <= due and outcome is not None:
                self._rounds.take(outcome, due, steps)
            return self._server.commit(steps, self._server.generation)

        write = await self._server.device.run(job)
        if write is not None:
            await asyncio.to_thread(write)
