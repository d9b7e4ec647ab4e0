"""What a generation of the run is, as plain data, and what a role has to do with it.

A *generation* is the stretch of a run between two recoveries (`gate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from splitllm.roles.recovery import Decision, Standing
from splitllm.roles.together import Tensors, answered, are_texts, is_count
from splitllm.wire.message import Message


class Past(Protocol):
    """What a role can go back to."""

    def standing(self) -> Standing:
        """The states that are kept."""
        ...

    def restore(self, step: int) -> None:
        """Be as after `step` steps; what came later is forgotten."""
        ...

    def state(self) -> Tensors:
        """Adapter and optimiser as they are."""
        ...

    def adopt(self, step: int, origin: str, tensors: Mapping[str, Any]) -> None:
        """Be as another role of the tier is in that state."""
        ...

    def adapter(self) -> Tensors:
        """The role's part of the adapter, by the names that an adapter file has."""
        ...

    def final_adapter(self) -> Tensors:
        """The same when the run ends, or this lane of it."""
        ...

    def closing_words(self) -> dict[str, Any]:
        """What is told of the role at the end of the run."""
        ...

    def mark_finished(self) -> None:
        """The run is complete, and stays so when the process ends."""
        ...


@dataclass(frozen=True)
class Begun:
    """A generation as the top describes it.

    Attributes:
        number: of the generation.
        decision: from which step it goes on, and who needs another's state.
        evaluated: whether the evaluation due at that step is already recorded.
    """

    number: int
    decision: Decision
    evaluated: bool

    def header(self) -> dict[str, Any]:
        """As it travels."""
        decision = self.decision
        return {
            "generation": self.number,
            "step": decision.step,
            "origin": decision.origin,
            "donors": dict(decision.donors),
            "lacking": list(decision.lacking),
            "evaluated": self.evaluated,
        }

    @classmethod
    def from_reply(cls, reply: Message) -> Begun:
        """As it travelled.

        Raises:
            PeerError: it is none.
        """
        donors = answered(reply, "donors", lambda value: isinstance(value, dict) and are_texts(value.values()))
        lacking = answered(reply, "lacking", lambda value: isinstance(value, list) and are_texts(value))
        origin = answered(reply, "origin", lambda value: isinstance(value, str))
        decision = Decision(answered(reply, "step", is_count), origin, dict(donors), tuple(lacking))
        evaluated = answered(reply, "evaluated", lambda value: isinstance(value, bool))
        return cls(answered(reply, "generation", is_count), decision, evaluated)


@dataclass(frozen=True)
class Summit:
    """What the top adds to its gate.

    Attributes:
        begin: told of the step from which a generation goes on; tells whether its evaluation is recorded.
        evaluated: told of the clients' losses of an evaluation.
        finish: told of every role's closing words and of the whole adapter.
        first: number of the first generation.
    """

    begin: Callable[[int], bool]
    evaluated: Callable[[int, Mapping[int, Any]], None]
    finish: Callable[[Mapping[str, Any], Tensors], None]
    first: int
