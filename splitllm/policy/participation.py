"""Who is asked to take part in a round.

Of N that are there, the goal is a count or a share of N, rounded up, and at least the minimum. So that the round need
not wait for the slowest, more than the goal may be asked (Bonawitz et al., "Towards federated learning at scale", 2019,
ask 130 %): it closes when the goal has arrived (`policy/rounds.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from splitllm.policy import oort
from splitllm.policy.history import History
from splitllm.policy.sampling import Draw, drawn, poisson
from splitllm.recipe.rounds import goal, rounded_up


@dataclass(frozen=True)
class Rules:
    """Of the rounds of a server.

    Attributes:
        policy: a name of `POLICIES`.
        share: of the clients there whose updates a round wants, above 0, at most 1; with `poisson` the rate of each.
        count: of clients whose updates a round wants, instead of a share; at least 1.
        over: how many are asked for each that is wanted, at least 1, by `random` and `oort`.
        minimum: of clients, at least 1; a round with fewer is void.
        deadline: seconds from a round's beginning after which nobody is waited for.
        oort: settings of that policy.
    """

    policy: str = "all"
    share: float = 1.0
    count: int | None = None
    over: float = 1.0
    minimum: int = 1
    deadline: float = math.inf
    oort: oort.Settings = field(default_factory=oort.Settings)


@dataclass(frozen=True)
class Asked:
    """These take part, in the order in which they were present; the round closes with `goal` of them."""

    clients: tuple[str, ...]
    goal: int


@dataclass(frozen=True)
class TooFew:
    """No round can begin.

    Attributes:
        line: who is there, how many are missing, and the remedy.
        redraw: enough are there, but too few were drawn: the next attempt may do, at once. Else someone has to come.
    """

    line: str
    redraw: bool = False


def select(rules: Rules, present: Sequence[str], draw: Draw, history: History | None = None) -> Asked | TooFew:
    """Who is asked. Whoever comes later is asked in the next round at the earliest.

    Args:
        rules: of the rounds.
        present: clients that could take part; their order decides nothing but that of the answer.
        draw: round and attempt.
        history: what is known of the clients, for `oort`; nothing if there is none.
    """
    there = tuple(dict.fromkeys(present))
    if len(there) < rules.minimum:
        return TooFew(
            f"round {draw.number} cannot begin: {len(there)} of the at least {rules.minimum} clients of "
            f"rounds.participation.minimum are there ({', '.join(there) or 'nobody'}): start more clients, or lower "
            "rounds.participation.minimum"
        )
    asked = POLICIES[rules.policy](rules, there, draw, history or History())
    if len(asked.clients) < rules.minimum:
        return TooFew(
            f"round {draw.number} cannot begin: {len(asked.clients)} of {len(there)} clients were drawn, "
            f"rounds.participation.minimum is {rules.minimum}: it is drawn again; raise rounds.participation.share if "
            "that happens often",
            redraw=True,
        )
    return Asked(tuple(client for client in there if client in set(asked.clients)), asked.goal)


def wanted(rules: Rules, there: int) -> int:
    """Clients whose updates a round wants, if so many are there, at least the minimum."""
    return goal(rules.share, rules.count, rules.minimum, there)


def _all(rules: Rules, there: Sequence[str], draw: Draw, history: History) -> Asked:
    return Asked(tuple(there), len(there))


def _random(rules: Rules, there: Sequence[str], draw: Draw, history: History) -> Asked:
    found = wanted(rules, len(there))
    return Asked(drawn(draw, there, rounded_up(rules.over, found)), found)


def _poisson(rules: Rules, there: Sequence[str], draw: Draw, history: History) -> Asked:
    rate = rules.share if rules.count is None else rules.count / len(there)
    asked = poisson(draw, there, rate)
    return Asked(asked, len(asked))


def _oort(rules: Rules, there: Sequence[str], draw: Draw, history: History) -> Asked:
    found = wanted(rules, len(there))
    return Asked(oort.select(history, there, rounded_up(rules.over, found), draw, rules.oort), found)


POLICIES: dict[str, Callable[[Rules, Sequence[str], Draw, History], Asked]] = {
    "all": _all,
    "random": _random,
    "poisson": _poisson,
    "oort": _oort,
}
"""`all` that are there; `random`, so many of them; `poisson`, each with a probability; `oort`, those that help most.

With `poisson` and a minimum above 1, draws that are too small are thrown away: an accountant has to count each attempt.
"""
