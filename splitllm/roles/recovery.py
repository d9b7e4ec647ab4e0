"""From which step a run goes on when a role was lost: a decision over plain values.

Every role keeps what it was after the last two steps that it committed. A role opens step s only after it has committed
step s-1, and a step closes only when all have computed it: so two roles that take part are never more than one commit
apart, and there is a state that all of them kept. That one is the run's last common state; what came after it is run
again.

The number of a step does not tell which state it is: where a role may be left out (`wire.absent: drop`), a step that is
run again without it is another one. So a state is known by its step and its origin: the generation that committed it,
which has one step of each number, or, before the first step, what training starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitllm.errors import CheckpointError

State = tuple[int, str]
"""Steps done, and their origin: equal only where adapter and optimiser are."""


@dataclass(frozen=True)
class Standing:
    """What one role can go back to.

    Attributes:
        tier: name of its tier, whose roles hold the same adapter.
        states: that it kept.
    """

    tier: str
    states: tuple[State, ...]

    def to_json(self) -> list[Any]:
        """As it travels."""
        return [self.tier, [list(state) for state in self.states]]


@dataclass(frozen=True)
class Decision:
    """How the run goes on.

    Attributes:
        step, origin: of the state.
        donors: tier -> the role whose state is shared with those of its tier that lack it.
        lacking: the roles that lack it.
    """

    step: int
    origin: str
    donors: Mapping[str, str]
    lacking: tuple[str, ...]


def decide(standings: Mapping[str, Standing]) -> Decision:
    """The newest state that every role kept or, if there is none, that one role of every tier kept.

    The second happens where a role was away for many steps (`wire.absent: drop`) or lost its journal: its state is that
    of any other role of its tier.

    Args:
        standings: by role; at least one.

    Raises:
        CheckpointError: no state is left in every tier.
    """
    common = set.intersection(*(set(standing.states) for standing in standings.values()))
    if common:
        return Decision(*max(common), {}, ())
    by_tier: dict[str, set[State]] = {}
    for standing in standings.values():
        by_tier.setdefault(standing.tier, set()).update(standing.states)
    possible = set.intersection(*by_tier.values())
    if not possible:
        raise CheckpointError(_hopeless(standings))
    state = max(possible)
    lacking = tuple(sorted(name for name, standing in standings.items() if state not in standing.states))
    tiers = {standings[name].tier for name in lacking}
    donors = {tier: _donor(standings, tier, state) for tier in sorted(tiers)}
    return Decision(*state, donors, lacking)


def standings_from_json(value: Mapping[str, Sequence[Any]]) -> dict[str, Standing]:
    """As they travelled; `roles/checks.py` has looked at them."""
    return {
        name: Standing(str(tier), tuple((int(step), str(origin)) for step, origin in states))
        for name, (tier, states) in value.items()
    }


def _donor(standings: Mapping[str, Standing], tier: str, state: State) -> str:
    return min(name for name, standing in standings.items() if standing.tier == tier and state in standing.states)


def _hopeless(standings: Mapping[str, Standing]) -> str:
    numbers = [{step for step, _ in standing.states} for standing in standings.values()]
    alike = bool(set.intersection(*numbers))
    shown = {
        name: [f"{step} of {origin}" if alike else f"{step}" for step, origin in sorted(standing.states)]
        for name, standing in sorted(standings.items())
    }
    kept = ", ".join(f"{name}: [{', '.join(states)}]" for name, states in shown.items())
    why = "equal numbers are of another start or another run: give all the same lora.start_from, " if alike else ""
    lost = "bring back the journals that are missing, or start every role anew with another --output-dir"
    return f"there is no step whose state every tier still has ({kept}): {why}{lost}"
