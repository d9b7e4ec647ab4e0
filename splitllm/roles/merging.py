"""Rounds between servers whose clients go at their own pace: one brings what its clients made, the other averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from splitllm.errors import RejoinError
from splitllm.federated.rounds import Arithmetic, Tensors
from splitllm.roles.book import Arrival, Merged, Verdict
from splitllm.roles.outcomes import is_void, outcome_in
from splitllm.roles.together import answered
from splitllm.wire.link import Link
from splitllm.wire.message import Message


class Upward:
    """The rounds of the server above, as the one below asks for them.

    Args:
        uplink: to it.
        name: of the server below.
        arithmetic: of the rule.
    """

    def __init__(self, uplink: Link, name: str, arithmetic: Arithmetic) -> None:
        self._uplink, self._name, self._arithmetic = uplink, name, arithmetic

    async def merge(self, steps: int, weights: Mapping[int, float], version: int, value: Tensors) -> Merged | None:
        """Bring a value, and wait for what is made of it; None if nothing is. The same steps are counted once.

        Raises:
            PeerError: the answer is of no use.
        """
        header = {"weights": {str(client): count for client, count in weights.items()}, "version": version}
        while True:
            try:
                reply = await self._uplink.request(Message("merge", self._name, (steps, 0, 0), header, value))
            except RejoinError:  # the server above was restarted: it knows by the steps what it has counted
                continue
            if is_void(reply):
                return None
            now = answered(reply, "version", lambda found: isinstance(found, int) and found >= 0)
            return Merged(outcome_in(reply, value, self._arithmetic), now)


class Rounds(Protocol):
    """Where members bring what they have."""

    async def bring(self, arrival: Arrival) -> Verdict:
        """The answer comes when the round was held."""
        ...


class MergeDoor:
    """What the server above does with `merge`.

    Args:
        name: of that server.
        hall: its rounds.
        check: what the recipe allows.
        concerns: whether a tensor is of what a child or somebody below it holds.
    """

    def __init__(
        self, name: str, hall: Rounds, check: Callable[[Message], None], concerns: Callable[[str, str], bool]
    ) -> None:
        self._name, self._hall, self.check, self._concerns = name, hall, check, concerns

    async def handle(self, message: Message) -> Message:
        """Answer one request.

        Raises:
            DivergedError: nothing that anybody brought is finite.
        """
        weights = {int(client): float(count) for client, count in message.header["weights"].items()}
        version = int(message.header["version"])
        arrival = Arrival(message.sender, message.step, dict(message.tensors), weights, version=version)
        verdict = await self._hall.bring(arrival)
        header = {"void": verdict.value is None, "version": verdict.version}
        tensors = {n: tensor for n, tensor in (verdict.value or {}).items() if self._concerns(n, message.sender)}
        return Message("merge", self._name, message.micro_batch, header, tensors)
