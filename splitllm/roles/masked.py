"""The phases before a round of masked words, as a server goes through them with those who take part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from splitllm.errors import PeerError
from splitllm.privacy.fixedpoint import Words
from splitllm.roles.hidden import Masking
from splitllm.roles.meeting import Meeting
from splitllm.roles.rounds import Rounds
from splitllm.wire.message import Message


class MaskedRounds:
    """Of one generation of a server.

    Args:
        rounds: the server's part in rounds; None where there are none.
        name: of the server.
        generation: the stretch of the run that its messages belong to.
    """

    def __init__(self, rounds: Rounds | None, name: str, generation: int) -> None:
        self._rounds, self._name, self._generation = rounds, name, generation
        self._steps = -1
        self._meeting: Meeting | None = None
        self._masking: Masking | None = None

    async def phase(self, message: Message) -> Message:
        """One message of a phase; answered when all who take part have sent theirs.

        Raises:
            PeerError: it breaks the protocol, or its sender takes no part.
        """
        if self._rounds is None or self._rounds.participation is None or self._rounds.hiding is None:
            raise PeerError(f"{message.sender} sent {message.kind}, where nothing is masked")
        if message.step != self._steps:
            self._begin(message, self._rounds)
        assert self._meeting is not None
        return await self._meeting.join(message)

    def total(self, messages: Sequence[Message]) -> Words:
        """The sum of this round, from what its members say of their masks at its end.

        Raises:
            PeerError: one of them breaks the protocol.
            VoidRoundError: too few are left.
        """
        if self._masking is None or any(message.step != self._steps for message in messages):
            raise PeerError(f"{messages[0].sender} sent round before its masks were agreed on")
        return self._masking.total(messages)

    def _begin(self, message: Message, rounds: Rounds) -> None:
        assert rounds.hiding is not None and rounds.participation is not None
        asked = rounds.participation.asked(message.step - 1)
        names = [rounds.names[client] for client in sorted(asked)]
        size = sum(tensor.numel() for tensor in rounds.summed_tensors(message.step).values())
        self._steps, self._meeting = message.step, Meeting(names, self._phase)
        self._masking = Masking(rounds.hiding.terms(message.step, message.generation, size), names)

    async def _phase(self, messages: list[Message]) -> Callable[[Message], Message]:
        assert self._masking is not None
        told = self._masking.phase(messages)
        return lambda message: Message(
            "secure", self._name, message.micro_batch, {"said": told[message.sender]}, generation=self._generation
        )
