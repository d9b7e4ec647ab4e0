"""Oort: those clients that teach the model most in the shortest time (Lai et al., OSDI 2021).

A client is worth, at round R,

    (min(U, clip) - least U) / (clip - least U) + sqrt(0.1 ln(R) / last)

times (T / t)^alpha if it is slower than T. U is its utility, examples x sqrt(mean of squared losses); `clip` is a high
quantile of U, `last` the round in which it was last asked, t the seconds it took, T a percentile of those that all took
(`policy/history.py`).

Of those to be asked a part is *exploration*, which falls by a factor each round, to a floor: clients never asked, then
any. So everybody is asked in the long run. The others are drawn in proportion to their worth among all that are worth
nearly as much as the last of the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitllm.policy.history import History, Seen
from splitllm.policy.sampling import Draw, drawn


@dataclass(frozen=True)
class Settings:
    """Attributes of the algorithm, with the values of its authors.

    Attributes:
        explore: share of exploration in round 1.
        decay: what it is multiplied with each round.
        floor: below which it does not fall; above 0, or some may never be asked.
        alpha: how hard slowness is punished.
        clip: quantile of utilities that none is counted above.
        near: share of the last of the best's worth that puts a client among those to be drawn from.
        most: participations after which a client is explored only when nobody else is left; None for no limit.
    """

    explore: float = 0.9
    decay: float = 0.95
    floor: float = 0.2
    alpha: float = 2.0
    clip: float = 0.98
    near: float = 0.7
    most: int | None = None


def exploration(number: int, settings: Settings) -> float:
    """Share of exploration in a round."""
    return max(settings.floor, settings.explore * settings.decay ** (number - 1))


def preferred(history: History, clients: Sequence[str]) -> float:
    """T: seconds beyond which a client is worth less, by those of `clients` that were asked before."""
    took = sorted(history.clients[client].seconds for client in clients if client in history.clients)
    if not took or history.percentile >= 100:
        return math.inf
    return _quantile(took, history.percentile / 100)


def worth(history: History, clients: Sequence[str], number: int, settings: Settings) -> dict[str, float]:
    """Of those of `clients` that were asked before: 0 or above, by the formula."""
    known = {client: history.clients[client] for client in clients if client in history.clients}
    utilities = sorted(one.utility for one in known.values() if one.utility is not None)
    least, clip = (utilities[0], _quantile(utilities, settings.clip)) if utilities else (0.0, 0.0)
    slow = preferred(history, clients)

    def value(one: Seen) -> float:
        gain = 0.0
        if one.utility is not None:
            gain = (min(one.utility, clip) - least) / (clip - least) if clip > least else 1.0
        value = gain + math.sqrt(0.1 * math.log(number) / one.last)
        return value * (slow / one.seconds) ** settings.alpha if one.seconds > slow else value

    return {client: value(one) for client, one in known.items()}


def select(history: History, present: Sequence[str], count: int, draw: Draw, settings: Settings) -> tuple[str, ...]:
    """Whom to ask: so many, or all if there are fewer; first those for their worth, then those to explore."""
    count = min(count, len(present))
    tired = {client for client in present if _is_tired(history, client, settings)}
    values = worth(history, [client for client in present if client not in tired], draw.number, settings)
    exploited = _exploited(values, int(count * (1 - exploration(draw.number, settings))), draw, settings)
    left = [client for client in present if client not in exploited]
    new = [client for client in left if client not in history.clients]
    others = [client for client in left if client in history.clients and client not in tired]
    asked = list(exploited)
    for group in new, others, [client for client in left if client in tired]:
        asked += drawn(draw, group, count - len(asked), purpose="explore")
    return tuple(asked)


def _exploited(values: Mapping[str, float], count: int, draw: Draw, settings: Settings) -> tuple[str, ...]:
    count = min(count, len(values))
    if not count:
        return ()
    bar = sorted(values.values(), reverse=True)[count - 1] * settings.near
    return drawn(draw, [client for client, value in values.items() if value >= bar], count, values, "exploit")


def _is_tired(history: History, client: str, settings: Settings) -> bool:
    return settings.most is not None and client in history.clients and history.clients[client].times >= settings.most


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
