"""What a server runs next: the batch that is composed of the requests of its tenants.

The rules of `compose`, in their order:

1. **Gradients first.** A gradient lets go of what its forward pass holds, so it goes before any activation, as in the
   1F1B schedule of PipeDream (arXiv 1806.03377). The two kinds are never in one batch.
2. **Nobody starves.** What has waited longer than `starve` is overdue and goes before any weight, the oldest first.
3. **Oldest first, with a weight.** Else the largest weight x waiting time goes first (Kleinrock's delay dependent
   priorities, 1964). Among tenants whose queues are equally long, and longer than a batch, waiting times become
   inversely proportional to the weights, and so, by Little's law, the requests served become proportional to them.
4. **The first is the head, the others fill up**, in the same order: those that tokens and memory leave room for, and
   whose lengths are so near that little becomes padding. Who does not fit is passed over, this time; the head never
   is.
5. **Memory.** If there is too little for the first, one that needs less may be the head, until the first is overdue:
   then no activations run before there is enough for it. What is under way ends, or is let go to run again, so there
   will be.
6. **Waiting for company.** A batch with room left, which holds all that is ready, waits if more is expected, until
   one of its requests has waited for `wait`. While anything else is ready, the device does not idle for company.

So an overdue request runs, counting batches of its kind, at the latest in the one after as many as there are older
overdue requests. With P requests under way at most, activations start within

    starve + P (L + D + P G)

of their arrival: L is the longest time of a batch of activations, G that of a batch of gradients, and D the longest
time until the gradient of what has run is here (0 where memory suffices). tests/policy/test_batching.py draws the
rules and proves the bound.

A batch is as wide as the longest of its rows, those that enter at a deeper cut layer included: its *positions* are
rows x longest, real and padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Key = tuple[int, int, int]


@dataclass(frozen=True)
class Request:
    """Rows of one tenant that are ready to run.

    Attributes:
        id: of the request, in order of arrival.
        tenant: who sent it.
        urgent: a gradient, which lets memory go; else activations, which take some.
        lengths: real tokens of each row; at least one row.
        entry: the first block that it runs, its cut layer.
        arrived: seconds, on the clock of `now`.
        bytes: of memory that it holds while it is under way.
        key: its step, client and number, which no other request of its kind has.
    """

    id: int
    tenant: str
    urgent: bool
    lengths: tuple[int, ...]
    entry: int
    arrived: float
    bytes: int
    key: Key

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """Rows of the batch that it takes."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of its longest row."""
        return max(self.lengths)

    @property
    def needs(self) -> int:
        """Bytes of memory that must be free for it to run."""
        return 0 if self.urgent else self.bytes


@dataclass(frozen=True)
class Budget:
    """What a batch may be.

    Attributes:
        tokens: positions of a batch, at most; a request that alone has more runs alone.
        bytes: of free memory.
        wait: seconds that a batch with room left may wait for company.
        starve: seconds after which a request is overdue.
        padding: the largest share of a batch's positions that may be padding which the requests do not have alone.
        overhead: cost of running one batch more, in positions (`cohort`).
    """

    tokens: int
    bytes: int
    wait: float
    starve: float
    padding: float = 0.25
    overhead: int = 0


@dataclass(frozen=True)
class Run:
    """Run these requests as one batch: ids in the order of their rows, those that enter deeper later."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Wait:
    """Run nothing; ask again at `until`, or as soon as a request arrives or memory is freed.

    Attributes:
        until: seconds, on the clock of `now`; infinite if time alone changes nothing.
        lacking: bytes that the first to run lacks; 0 if it is not memory that is waited for.
    """

    until: float = math.inf
    lacking: int = 0


Decision = Run | Wait


def compose(ready: Sequence[Request], now: float, budget: Budget, weights: Mapping[str, float], more: bool) -> Decision:
    """The next batch, by the rules above.

    Args:
        ready: all requests that could run, in any order.
        now: seconds.
        budget: its bytes are those that are free now.
        weights: of the tenants; 1 for those that have none.
        more: other requests are expected soon.
    """
    if not ready:
        return Wait()
    order = _in_order(ready, now, budget, weights)
    head = _head(order, now, budget)
    if head is None:
        return Wait(lacking=order[0].needs - budget.bytes)
    batch, size = _filled(head, order, budget)
    deadline = min(request.arrived for request in batch) + min(budget.wait, budget.starve)
    if more and now < deadline and len(batch) == len(ready) and size.has_room(budget):
        return Wait(deadline)
    return Run(_in_rows(batch))


def cohort(requests: Sequence[Request], budget: Budget) -> list[tuple[int, ...]]:
    """All requests of a synchronous step as batches, whatever the order and the times of their arrival.

    Sorted by length, neighbours share a batch such that positions and overhead add up to the least that tokens and
    bytes allow. Where all requests have equally many rows and bytes, no other batches would cost less; else no others
    of neighbours. A request that alone is over the budget is a batch of its own.

    Args:
        requests: of one kind, each with a key of its own.
        budget: its bytes must be those that every such cohort finds free, or the batches depend on the moment.

    Returns:
        Ids in the order of their rows, batch after batch, the one with the lowest key first.
    """
    line = sorted(requests, key=lambda request: (request.longest, request.entry, request.tenant, request.key))
    best = [(0, 0)]  # by the number of requests: what they cost, and how many of them are before the last batch
    for end in range(1, len(line) + 1):
        best.append(min(_endings(line, end, best, budget)))
    batches, end = [], len(line)
    while end:
        start = best[end][1]
        batches.append(line[start:end])
        end = start
    batches.sort(key=lambda batch: min(request.key for request in batch))
    return [_in_rows(batch) for batch in batches]


@dataclass(frozen=True)
class _Size:
    """Of a batch; `alone` are the positions that its requests would have one by one."""

    rows: int = 0
    longest: int = 0
    alone: int = 0
    needs: int = 0

    @property
    def positions(self) -> int:
        return self.rows * self.longest

    def joined(self, request: Request) -> _Size:
        rows, longest = request.rows, request.longest
        return _Size(
            self.rows + rows, max(self.longest, longest), self.alone + rows * longest, self.needs + request.needs
        )

    def within(self, budget: Budget) -> bool:
        return self.positions <= budget.tokens and _affordable(self.needs, budget)

    def is_dense(self, budget: Budget) -> bool:
        return self.positions - self.alone <= budget.padding * self.positions

    def has_room(self, budget: Budget) -> bool:
        """For one row more."""
        return (self.rows + 1) * self.longest <= budget.tokens


def _in_order(ready: Sequence[Request], now: float, budget: Budget, weights: Mapping[str, float]) -> list[Request]:
    """Those of the kind that is due, the first to run first."""

    def rank(request: Request) -> tuple[bool, float, int]:
        overdue = _overdue(request, now, budget)
        weighted = weights.get(request.tenant, 1.0) * (now - request.arrived)
        return not overdue, request.arrived if overdue else -weighted, request.id

    urgent = any(request.urgent for request in ready)
    return sorted((request for request in ready if request.urgent == urgent), key=rank)


def _overdue(request: Request, now: float, budget: Budget) -> bool:
    return now > request.arrived + budget.starve


def _affordable(needs: int, budget: Budget) -> bool:
    return needs <= max(budget.bytes, 0)


def _head(order: Sequence[Request], now: float, budget: Budget) -> Request | None:
    """The first for which there is memory, unless one before it is overdue."""
    for request in order:
        if _affordable(request.needs, budget):
            return request
        if _overdue(request, now, budget):
            return None
    return None


def _filled(head: Request, order: Sequence[Request], budget: Budget) -> tuple[list[Request], _Size]:
    """The head, and whoever fits beside it."""
    batch, size = [head], _Size().joined(head)
    for request in order:
        larger = size.joined(request)
        if request is not head and larger.within(budget) and larger.is_dense(budget):
            batch.append(request)
            size = larger
    return batch, size


def _endings(
    line: Sequence[Request], end: int, best: Sequence[tuple[int, int]], budget: Budget
) -> Iterator[tuple[int, int]]:
    """Every last batch that the first `end` requests can have: what all then cost, and where it starts."""
    size = _Size()
    for start in reversed(range(end)):
        size = size.joined(line[start])
        if start < end - 1 and not size.within(budget):
            return  # it only grows
        yield best[start][0] + budget.overhead + size.positions, start


def _in_rows(batch: Sequence[Request]) -> tuple[int, ...]:
    return tuple(request.id for request in sorted(batch, key=lambda r: (r.entry, r.key, r.id)))
