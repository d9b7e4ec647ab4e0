"""How much a tenant may send: a token bucket for each resource (tokens a second, bytes a second).

A bucket holds at most a burst and fills at the tenant's rate; a request takes its amount out. A request larger than the
burst needs a full bucket and leaves a debt, which the tenant pays by waiting. So over any time the tenant gets at most

    rate x time + the larger of the burst and its largest request.

A bucket is one number, the time at which it is full again (as in the generic cell rate algorithm, ITU-T I.371): nothing
has to be filled up as time goes by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Buckets = Mapping[str, float]
"""Of one tenant: resource -> seconds, the time at which its bucket is full (again). One that is missing is full."""


@dataclass(frozen=True)
class Limit:
    """On one resource.

    Attributes:
        rate: so much a second, above 0.
        burst: so much at once, above 0, after a pause.
    """

    rate: float
    burst: float


def allowed_at(buckets: Buckets, limits: Mapping[str, Limit], amounts: Mapping[str, float]) -> float:
    """When a request of these amounts may run: seconds, on the clock of `taken`; in the past if it may run now.

    Args:
        buckets: of the tenant.
        limits: by resource; what has none is free.
        amounts: by resource, what the request takes.
    """
    return max(
        (_enough_at(buckets, one, limits[one], amount) for one, amount in amounts.items() if one in limits),
        default=-math.inf,
    )


def taken(buckets: Buckets, limits: Mapping[str, Limit], amounts: Mapping[str, float], now: float) -> dict[str, float]:
    """The buckets after a request that ran `now`, which is not before `allowed_at`."""
    return {one: max(_full_at(buckets, one), now) + amounts.get(one, 0) / limit.rate for one, limit in limits.items()}


def _enough_at(buckets: Buckets, resource: str, limit: Limit, amount: float) -> float:
    return _full_at(buckets, resource) - max(limit.burst - amount, 0) / limit.rate


def _full_at(buckets: Buckets, resource: str) -> float:
    return buckets.get(resource, -math.inf)
