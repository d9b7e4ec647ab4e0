"""Rounds that nobody waits in: how much an update counts that began from an older version.

A server's adapter has a version; each update is the difference that a child made from the version it had begun with.
Versions that have passed since are its staleness. The server buffers updates, and steps when there are `size` of them
(FedBuff, Nguyen et al., 2022). With s the discounts, p the weights and d the updates,

    adapter += scale x sum of share_i d_i,    share_i = p_i s_i / sum of p_j s_j,    scale = sum of p_j s_j / sum of p_j

which for equal weights is FedBuff's 1/K x sum of s_i d_i. Without `scale` it is an average in which only differences of
staleness count. FedAsync (Xie et al., 2019) instead mixes in each adapter as it arrives (`mixing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal


def constant(staleness: int) -> float:
    """Every update counts alike."""
    return 1.0


def polynomial(staleness: int, a: float = 0.5) -> float:
    """(1 + staleness)^-a: FedBuff's for its a of 1/2, and one of FedAsync's."""
    return float((1 + staleness) ** -a)


def hinge(staleness: int, a: float = 10.0, b: float = 4.0) -> float:
    """1 up to a staleness of b, 1 / (a (staleness - b) + 1) beyond."""
    return 1.0 if staleness <= b else 1 / (a * (staleness - b) + 1)


DISCOUNTS: dict[str, Callable[..., float]] = {"constant": constant, "polynomial": polynomial, "hinge": hinge}
"""Of a staleness from 0 on: from 1 down, never up. Other arguments are those of a recipe."""


def mixing(discount: float, alpha: float = 0.6) -> float:
    """FedAsync: the share a of an arriving adapter W' in (1 - a) W + a W'."""
    return alpha * discount


@dataclass(frozen=True)
class Contribution:
    """One update in the buffer.

    Attributes:
        child: who sent it.
        number: of this child's updates.
        staleness: versions.
        weight: tokens or examples, above 0.
    """

    child: str
    number: int
    staleness: int
    weight: float


@dataclass(frozen=True)
class Buffered:
    """What has arrived since the last step.

    Attributes:
        size: so many are a step.
        oldest: staleness above which an update is dropped; None if none is.
        version: of the server's adapter.
        inside: in the order of arrival.
        counted: child -> the last of its updates that was counted or dropped, in this step or an earlier one.
    """

    size: int
    oldest: int | None = None
    version: int = 0
    inside: tuple[Contribution, ...] = ()
    counted: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of an update: `counted`, `again` (known), `stale` (dropped) or `unknown` (of a version to come)."""

    kind: Literal["counted", "again", "stale", "unknown"]
    line: str = ""


@dataclass(frozen=True)
class Step:
    """Of the server.

    Attributes:
        shares: one for each update, in the order of `Buffered.inside`; they add up to 1.
        scale: what the weighted average is multiplied with.
    """

    shares: tuple[float, ...]
    scale: float


def contribute(
    buffer: Buffered, child: str, number: int, version: int, weight: float = 1.0
) -> tuple[Buffered, Outcome]:
    """The buffer after an update.

    Args:
        buffer: before, not yet full.
        child: who sent it.
        number: of this child's updates, from 0, one more for each: one that was sent again has that of the first time.
        version: of the server's adapter, from which the child began.
        weight: tokens or examples, above 0.
    """
    if number <= buffer.counted.get(child, -1):
        return buffer, Outcome("again")
    staleness = buffer.version - version
    if staleness < 0:
        line = (
            f"{child} began from version {version}, there are {buffer.version}: take the adapter anew and go on from it"
        )
        return buffer, Outcome("unknown", line)
    buffer = replace(buffer, counted={**buffer.counted, child: number})
    if buffer.oldest is not None and staleness > buffer.oldest:
        line = f"update {number} of {child} is {staleness} versions old, {buffer.oldest} are allowed: it is dropped"
        return buffer, Outcome("stale", line)
    return replace(buffer, inside=(*buffer.inside, Contribution(child, number, staleness, weight))), Outcome("counted")


def full(buffer: Buffered) -> bool:
    """Whether there is enough for a step."""
    return len(buffer.inside) >= buffer.size


def step(buffer: Buffered, discount: str = "polynomial", **settings: float) -> tuple[Buffered, Step]:
    """The buffer after a step, empty and a version further, and what the step counts each update for.

    Args:
        buffer: with at least one update.
        discount: a name of `DISCOUNTS`.
        settings: its other arguments.
    """
    inside = buffer.inside
    counts = [one.weight * DISCOUNTS[discount](one.staleness, **settings) for one in inside]
    shares = tuple(count / sum(counts) for count in counts)
    scale = sum(counts) / sum(one.weight for one in inside)
    return replace(buffer, version=buffer.version + 1, inside=()), Step(shares, scale)


def to_json(buffer: Buffered) -> dict[str, Any]:
    """For a journal."""
    return asdict(buffer)


def from_json(plain: Mapping[str, Any]) -> Buffered:
    """Of `to_json`."""
    return Buffered(**{**plain, "inside": tuple(Contribution(**one) for one in plain["inside"])})
