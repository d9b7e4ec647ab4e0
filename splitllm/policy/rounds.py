"""A round under way: who has arrived, and whether it waits, closes or is void.

1. It closes as soon as the goal has arrived. What comes after that is late and ignored, and its sender hears so.
2. At the deadline it closes with those that have arrived, if they are at least the minimum; else it is void.
3. Who has left is not waited for: if all others have arrived, it closes; if the minimum cannot be met any more, it is
   void at once. If one that has left arrives all the same before the end, it counts.
4. Void means that nothing of it counts: nobody's adapter changes, and the next attempt draws anew among those that
   are there then.

So with a deadline every round ends; without one it waits for all that were asked and have not left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from splitllm.policy.participation import Asked, Rules
from splitllm.policy.sampling import Draw


@dataclass(frozen=True)
class Round:
    """Under way.

    Attributes:
        key: number of the round and of the attempt at it.
        asked: who may take part.
        goal: so many close it.
        minimum: fewer do not.
        began: seconds.
        until: seconds, the deadline; infinite without one.
        arrived: whose updates count, in the order of arrival.
        left: who is not waited for.
    """

    key: tuple[int, int]
    asked: tuple[str, ...]
    goal: int
    minimum: int
    began: float
    until: float = math.inf
    arrived: tuple[str, ...] = ()
    left: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Waiting:
    """Ask again at `until`, or as soon as somebody arrives or leaves. `missing` are those that are waited for."""

    until: float
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Closed:
    """The average is over `members`; `missing` were asked and are not in it. Both are in the order of `asked`."""

    members: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Void:
    """The round is repeated; `line` says why, and who was missing."""

    line: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Arrival:
    """What becomes of an update.

    Attributes:
        outcome: `counted`; `again`, it was counted before; `late`, its round is over; `unasked`, nobody wants it.
        line: for the sender, where it is late or was not asked.
    """

    outcome: Literal["counted", "again", "late", "unasked"]
    line: str = ""


def begin(rules: Rules, asked: Asked, draw: Draw, now: float) -> Round:
    """The round of those that were asked."""
    key = draw.number, draw.attempt
    return Round(key, asked.clients, asked.goal, rules.minimum, now, now + rules.deadline)


def decide(this: Round, now: float) -> Waiting | Closed | Void:
    """What is to be done, by the rules above."""
    arrived = set(this.arrived)
    missing = tuple(client for client in this.asked if client not in arrived)
    expected = tuple(client for client in missing if client not in this.left)
    enough = len(arrived) >= this.minimum
    possible = len(arrived) + len(expected) >= this.minimum
    if len(arrived) < this.goal and now < this.until and expected and possible:
        return Waiting(this.until, expected)
    if enough:
        return Closed(tuple(client for client in this.asked if client in arrived), missing)
    return Void(_line(this, missing, now), missing)


def arrive(this: Round, client: str, key: tuple[int, int], now: float) -> tuple[Round, Arrival]:
    """The round after an update that a client sent for the round `key`; nobody counts twice."""
    number, attempt = key
    if key > this.key:
        return this, Arrival("unasked", f"round {number}, attempt {attempt + 1} has not begun: send what was asked for")
    if key < this.key:
        return this, Arrival("late", f"round {number}, attempt {attempt + 1} is over: take part in the next that asks")
    if client not in this.asked:
        return this, Arrival("unasked", f"round {number} goes on without {client}: take part in the next that asks")
    if client in this.arrived:
        return this, Arrival("again")
    if not isinstance(decide(this, now), Waiting):
        after = f"{now - this.began:.1f} s after it began"
        return this, Arrival("late", f"round {number} was over when {client} arrived, {after}: its update is ignored")
    return replace(this, arrived=(*this.arrived, client)), Arrival("counted")


def leave(this: Round, clients: Sequence[str]) -> Round:
    """The round after some have gone; what they have sent before counts."""
    return replace(this, left=this.left.union(clients))


def _line(this: Round, missing: Sequence[str], now: float) -> str:
    number, attempt = this.key
    who = ", ".join(f"{client} (left)" if client in this.left else client for client in missing)
    when = (
        f"within the {this.until - this.began:g} s of rounds.participation.deadline"
        if now >= this.until
        else "and no more can"
    )
    return (
        f"round {number}, attempt {attempt + 1} is void and repeated: {len(this.arrived)} of at least {this.minimum} "
        f"clients arrived {when}; missing: {who}. Raise rounds.participation.deadline or lower "
        "rounds.participation.minimum if that happens often"
    )
