"""Who is drawn: chances that are a function of the seed, the round and the client, whoever else is there.

No generator is carried from draw to draw, so a server that was restarted draws the same again. Each client has a chance
of its own, and those with the lowest are drawn, so a client that comes takes at most one other's place, and one that
goes gives its place to one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True)
class Draw:
    """What a draw depends on.

    Attributes:
        seed: of the run.
        number: of the round, from 1.
        attempt: at this round, from 0: one that is repeated draws anew.
    """

    seed: int
    number: int
    attempt: int = 0


def chance(draw: Draw, client: str, purpose: str = "") -> float:
    """A number between 0 and 1, both excluded, independent and uniform over draws, clients and purposes."""
    key = draw.seed, draw.number, draw.attempt, client, purpose
    word = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    return ((word >> 12) + 0.5) / 2**52


def drawn(
    draw: Draw, clients: Sequence[str], count: int, weights: Mapping[str, float] | None = None, purpose: str = ""
) -> tuple[str, ...]:
    """So many of the clients, or all if there are fewer, without replacement: the first to be drawn first.

    The next to be drawn is each of those left with a probability in proportion to its weight (Efraimidis and Spirakis,
    2006: the first of exponential clocks that run at the rate of the weights).

    Args:
        draw: this one.
        clients: to draw from, in any order, each once.
        count: how many.
        weights: 0 or above; those without weight come last. All alike if there are none.
        purpose: of the draw, for several of one round.
    """

    def clock(client: str) -> tuple[float, float, str]:
        one = chance(draw, client, purpose)
        weight = 1.0 if weights is None else weights[client]
        return -math.log(one) / weight if weight > 0 else math.inf, one, client

    return tuple(sorted(clients, key=clock)[: max(count, 0)])


def poisson(draw: Draw, clients: Sequence[str], rate: float) -> tuple[str, ...]:
    """Each client independently with probability `rate`, in the order of `clients`: perhaps none.

    Accountants of differential privacy count on it (amplification by Poisson sampling). It holds only against those who
    cannot find out who was drawn: against anybody who has the seed nothing is amplified.
    """
    return tuple(client for client in clients if chance(draw, client) < rate)
