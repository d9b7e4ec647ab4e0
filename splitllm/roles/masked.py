"""What clients hide in a round, as a server goes through it with those who take part.

What one of them sends is looked at before it waits for the others: so who breaks the protocol is refused alone, and is
waited for as anybody whose process is lost.
"""

from __future__ import annotations

from collections.abc import Callable

from splitllm.errors import PeerError
from splitllm.privacy.fixedpoint import Words
from splitllm.roles.hidden import WORDS, Masking
from splitllm.roles.meeting import Meeting
from splitllm.roles.rounds import Rounds
from splitllm.wire.message import Message


class MaskedRounds:
    """Of one generation of a server.

    Args:
        rounds: the server's part in rounds.
        name: of the server.
        generation: the stretch of the run that its messages belong to.
    """

    def __init__(self, rounds: Rounds, name: str, generation: int) -> None:
        self._rounds, self._name, self._generation = rounds, name, generation
        self._steps = -1
        self._meeting: Meeting | None = None
        self._masking: Masking | None = None

    async def phase(self, message: Message) -> Message:
        """One message of a phase; answered when all who take part have sent theirs.

        Raises:
            PeerError: it breaks the protocol, or its sender takes no part.
        """
        if self._rounds.hiding is None or self._rounds.hiding.threshold is None:
            raise PeerError(f"{message.sender} sent {message.kind}, where nothing is masked")
        if message.step != self._steps:
            self._begin(message)
        assert self._masking is not None and self._meeting is not None
        self._masking.take(message)
        return await self._meeting.join(message)

    def look(self, message: Message) -> None:
        """At what one client brings to `round` itself.

        Raises:
            PeerError: it breaks the protocol, or its sender takes no part and brings something.
        """
        hiding, steps = self._rounds.hiding, message.step
        if hiding is None:
            return
        found = message.tensors[WORDS].numel() if WORDS in message.tensors else 0
        size = self._size(steps) if hiding.threshold is None and message.sender in self._asked(steps) else 0
        if found != size:
            raise PeerError(f"{message.sender} sent round with {found} words, where {size} are due")
        if hiding.threshold is not None and message.sender in self._asked(steps):
            if self._masking is None or steps != self._steps:
                raise PeerError(f"{message.sender} sent round before its masks were agreed on")
            self._masking.take(message)

    def total(self) -> Words:
        """The sum of this round, when all of `round` was looked at.

        Raises:
            VoidRoundError: too few are left.
        """
        assert self._masking is not None, "nobody comes so far without"
        return self._masking.total()

    def _asked(self, steps: int) -> list[str]:
        """Those who take part in the round after so many steps."""
        assert self._rounds.participation is not None
        return [self._rounds.names[client] for client in sorted(self._rounds.participation.asked(steps - 1))]

    def _size(self, steps: int) -> int:
        """Words of each."""
        return sum(tensor.numel() for tensor in self._rounds.summed_tensors(steps).values())

    def _begin(self, message: Message) -> None:
        assert self._rounds.hiding is not None
        steps, names = message.step, self._asked(message.step)
        self._steps, self._meeting = steps, Meeting(names, self._phase)
        self._masking = Masking(self._rounds.hiding.terms(steps, message.generation, self._size(steps)), names)

    async def _phase(self, messages: list[Message]) -> Callable[[Message], Message]:
        assert self._masking is not None
        told = self._masking.told(messages[0].header["phase"])
        return lambda message: Message(
            "secure", self._name, message.micro_batch, {"said": told[message.sender]}, generation=self._generation
        )
