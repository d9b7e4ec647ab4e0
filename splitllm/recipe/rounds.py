"""When rounds are due, what they average, and who takes part in them.

Levels are those who average: 1 is the tier above the clients (or, of whole-model clients, their coordinator), and so on
up to the top. With `rounds.exchange` the tree is one site of several, and the highest level is that of all sites,
which another engine averages.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitllm.recipe.schema import Recipe

ONE_SHAPE = ("fedavg", "fedex", "ffa", "rolora", "trimmed_mean", "median")
"""Rules that need one rank and scale; the others take any."""
WITH_FROZEN = ("fedex", "flora")
"""Rules with an outcome that is added to frozen weights."""
ONLY_FACTORS = ("fedavg", "ffa", "rolora", "trimmed_mean", "median")
"""Rules whose outcome is a matrix A and a matrix B, which can be stepped towards."""

AT_ANY_PACE = ("fedavg", "ffa", "hetlora", "trimmed_mean", "median")
"""Rules whose outcome each can take when it comes to it."""


def goes_by_rounds(recipe: Recipe) -> bool:
    """Whether replicas train adapters of their own."""
    return recipe.rounds.replicas == "local"


def intervals(recipe: Recipe) -> list[int]:
    """Steps between the rounds of each level, bottom up; `replicas: local`."""
    rounds = recipe.rounds
    assert rounds.cloud_every is not None
    edge = rounds.cloud_every if rounds.edge_every is None else rounds.edge_every
    return [*(edge if isinstance(edge, tuple) else [edge] * between(recipe)), rounds.cloud_every]


def between(recipe: Recipe) -> int:
    """How many levels average below the highest."""
    return max(0, len(recipe.split.tiers) - 2) + (recipe.rounds.exchange is not None)


def level_due(recipe: Recipe, steps: int) -> int:
    """The highest level whose round is due after so many steps; 0: none. At the end of a run all are."""
    if not goes_by_rounds(recipe) or steps == 0:
        return 0
    if steps == recipe.train.steps:
        return len(intervals(recipe))
    return max((level for level, every in enumerate(intervals(recipe), 1) if steps % every == 0), default=0)


def side_that_trains(recipe: Recipe, step: int) -> str | None:
    """Which of the matrices A and B trains in a step, where it is one of them alone.

    `ffa`: B (arXiv 2403.12313); `rolora`: B and A by turns, from round to round of the top (arXiv 2502.01755).
    """
    if not goes_by_rounds(recipe) or recipe.rounds.rule not in ("ffa", "rolora"):
        return None
    turn = step // intervals(recipe)[-1] if recipe.rounds.rule == "rolora" else 0
    return "AB"[(turn + 1) % 2]


def rounds_line(recipe: Recipe) -> str:
    """Says in one line when rounds are held, and what they average."""
    rounds, names = recipe.rounds, list(recipe.split.tiers)[1:] or ["coordinator"]
    names += [] if rounds.exchange is None else ["other sites' tops"]
    held = [f"every {every} steps at the {name}" for name, every in zip(names, intervals(recipe), strict=True)]
    some = rounds.participation
    parts = [f"{rounds.rule} {' and '.join(held)}, weights: {rounds.weights}"]
    if some.policy != "all":
        wanted = f"{some.count}" if some.count is not None else f"{some.share:g}"
        asked = f", {some.over:g} times as many asked" if some.over != 1.0 else ""
        parts.append(f"{some.policy} {wanted} of the clients at a time{asked}")
    if some.deadline is not None:
        parts.append(f"waiting for at most {some.deadline:g} s")
    if rounds.buffer.size is not None:
        parts.append(f"{names[-1]} steps after {rounds.buffer.size} updates, and nobody waits for it")
    if rounds.secure.aggregate:
        parts.append("masked: the server right above clients sees sums alone")
    if rounds.privacy.clip is not None:
        parts.append(f"changes clipped to {rounds.privacy.clip:g}, noise {rounds.privacy.noise:g}")
    return "; ".join(parts)


def what_leaves_in_rounds(recipe: Recipe) -> str:
    """What a client sends of its adapter."""
    if recipe.rounds.secure.aggregate:
        return "its adapter in rounds, masked"
    return "its clipped change in rounds" if recipe.rounds.privacy.clip is not None else "its adapter in rounds"


def hides(recipe: Recipe) -> bool:
    """Whether clients send words that are summed, masked or with noise to come."""
    return goes_by_rounds(recipe) and (recipe.rounds.secure.aggregate or recipe.rounds.privacy.clip is not None)


def asked_at_once(recipe: Recipe, clients: int) -> int:
    """Of so many clients of a server, how many train until its next round, at most."""
    some = recipe.rounds.participation
    if some.policy in ("all", "poisson"):
        return clients
    goal = math.ceil(Fraction(str(some.share)) * clients) if some.count is None else some.count
    return min(max(goal, some.minimum), clients)


def clients_of_a_server(recipe: Recipe) -> tuple[int, int]:
    """How many the servers right above clients have, at least and at most."""
    clients, *servers = recipe.split.tiers.values()
    return clients // (servers or [1])[0], -(-clients // (servers or [1])[0])
