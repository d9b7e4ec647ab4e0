"""From which step a run goes on when a role was lost: a decision over plain numbers.

Every role keeps what it was after the last two steps that it committed. A role opens step s only after it has committed
step s-1, and a step closes only when all have computed it: so two roles are never more than one commit apart, and there
is a step that all of them kept. That one is the run's last common step; what came after it is run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitllm.errors import CheckpointError


@dataclass(frozen=True)
class Standing:
    """What one role can go back to.

    Attributes:
        tier: name of its tier, whose roles hold the same adapter.
        steps: the numbers of steps after which its state is kept.
    """

    tier: str
    steps: tuple[int, ...]

    def to_json(self) -> list[Any]:
        """As it travels."""
        return [self.tier, list(self.steps)]


@dataclass(frozen=True)
class Decision:
    """How the run goes on.

    Attributes:
        step: steps done.
        donors: tier -> the role whose state is shared with those of its tier that lack that step.
        lacking: the roles that lack it.
    """

    step: int
    donors: Mapping[str, str]
    lacking: tuple[str, ...]


def decide(standings: Mapping[str, Standing]) -> Decision:
    """The newest step that every role kept or, if there is none, that one role of every tier kept.

    The second happens where a role was away for many steps (`wire.absent: drop`) or lost its journal: its state is that
    of any other role of its tier.

    Args:
        standings: by role; at least one.

    Raises:
        CheckpointError: no step is left in every tier.
    """
    common = set.intersection(*(set(standing.steps) for standing in standings.values()))
    if common:
        return Decision(max(common), {}, ())
    by_tier: dict[str, set[int]] = {}
    for standing in standings.values():
        by_tier.setdefault(standing.tier, set()).update(standing.steps)
    possible = set.intersection(*by_tier.values())
    if not possible:
        raise CheckpointError(_hopeless(standings))
    step = max(possible)
    lacking = tuple(sorted(name for name, standing in standings.items() if step not in standing.steps))
    tiers = {standings[name].tier for name in lacking}
    donors = {tier: _donor(standings, tier, step) for tier in sorted(tiers)}
    return Decision(step, donors, lacking)


def standings_from_json(value: Mapping[str, Sequence[Any]]) -> dict[str, Standing]:
    """As they travelled; `roles/checks.py` has looked at them."""
    return {name: Standing(str(tier), tuple(int(step) for step in steps)) for name, (tier, steps) in value.items()}


def _donor(standings: Mapping[str, Standing], tier: str, step: int) -> str:
    return min(name for name, standing in standings.items() if standing.tier == tier and step in standing.steps)


def _hopeless(standings: Mapping[str, Standing]) -> str:
    kept = ", ".join(f"{name}: {sorted(standing.steps)}" for name, standing in sorted(standings.items()))
    return (
        f"there is no step whose state every tier still has ({kept}): bring back the journals that are missing, or "
        "start every role anew with another --output-dir"
    )
