"""Tenants, a device and a clock that jumps: every tenant has some requests under way, one after another for ever.

Activations arrive, run, are away for a while, come back as a gradient, run, and the tenant pauses before it sends anew.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from random import Random

from splitllm.policy.batching import Budget, Request, Run, compose

SMALLEST_MEMORY = 8
"""No request holds more."""


@dataclass(frozen=True)
class Tenant:
    """`at_once` requests of up to `rows` rows of up to `longest` tokens, after pauses of up to `pause` seconds."""

    weight: float
    at_once: int
    pause: float
    longest: int
    rows: int


@dataclass(frozen=True)
class Batch:
    """What ran when, out of what, and how much memory was free."""

    start: float
    end: float
    requests: tuple[Request, ...]
    ready: tuple[Request, ...]
    free: int

    @property
    def rows(self) -> int:
        return sum(one.rows for one in self.requests)

    @property
    def longest(self) -> int:
        return max(one.longest for one in self.requests)


@dataclass
class World:
    """Everything that happens follows from the seed and from what the policy decides."""

    tenants: list[Tenant]
    budget: Budget
    away: float
    seed: int
    batches: list[Batch] = field(default_factory=list)
    arrivals: int = 0

    def __post_init__(self) -> None:
        self._random = Random(self.seed)
        self._free = [(0.0, self.budget.bytes)]
        self._coming: list[tuple[float, int, Request]] = []
        self._ready: dict[int, Request] = {}
        self._drawn = 0
        self.weights = {f"tenant-{number}": tenant.weight for number, tenant in enumerate(self.tenants)}
        for name, tenant in zip(self.weights, self.tenants, strict=True):
            for _ in range(tenant.at_once):
                self._send(name, 0.0)

    def run(self, requests: int) -> list[Batch]:
        """Until so many have arrived and all that have arrived are done."""
        now = 0.0
        while self._coming or self._ready:
            self._arrive(now, requests)
            ready = tuple(self._ready.values())
            free = self._free[-1][1]
            more = bool(self._coming)
            decision = compose(ready, now, replace(self.budget, bytes=free), self.weights, more)
            if isinstance(decision, Run):
                now = self._execute(decision.ids, now, ready, free)
            else:
                now = max(now, min(decision.until, self._coming[0][0] if self._coming else math.inf))
                assert now < math.inf or not ready, "it waits for ever"
                if now == math.inf:
                    break
        return self.batches

    def least_free(self, since: float, until: float) -> int:
        """Bytes that were free at some time in between."""
        before = [free for time, free in self._free if time <= since]
        return min([before[-1], *(free for time, free in self._free if since < time < until)])

    def _arrive(self, now: float, requests: int) -> None:
        while self._coming and self._coming[0][0] <= now:
            arrived, _, request = heapq.heappop(self._coming)
            if request.urgent or self.arrivals < requests:
                self._ready[self.arrivals] = replace(request, id=self.arrivals, arrived=arrived)
                self.arrivals += 1

    def _execute(self, ids: Iterable[int], now: float, ready: tuple[Request, ...], free: int) -> float:
        requests = tuple(self._ready.pop(one) for one in ids)
        batch = Batch(now, now, requests, ready, free)
        end = now + 0.1 + 0.01 * batch.rows * batch.longest * self._random.uniform(0.5, 1.5)
        self.batches.append(replace(batch, end=end))
        taken = sum(one.bytes for one in requests)
        if requests[0].urgent:
            self._free.append((end, free + taken))
        else:
            self._free.append((now, free - taken))
        for one in requests:
            if one.urgent:
                self._send(one.tenant, end)
            else:
                self._push(end + self._random.uniform(0, self.away), replace(one, urgent=True))
        return end

    def _send(self, name: str, now: float) -> None:
        tenant = self.tenants[int(name.removeprefix("tenant-"))]
        rows = self._random.randint(1, tenant.rows)
        lengths = tuple(self._random.randint(1, tenant.longest) for _ in range(rows))
        held, entry = self._random.randint(1, SMALLEST_MEMORY), self._random.randint(0, 3)
        key = (self._drawn, 0, 0)
        request = Request(0, name, False, lengths, entry, 0.0, held, key)
        self._push(now + self._random.uniform(0, tenant.pause), request)

    def _push(self, time: float, request: Request) -> None:
        self._drawn += 1
        heapq.heappush(self._coming, (time, self._drawn, request))
