"""A synchronous step as batches: the same whatever arrives when, and the cheapest there is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.policy.batching import Budget, Request, cohort
from tests.policy.drawing import PLAIN


def requests_of(rows: Sequence[Sequence[int]], held: Sequence[int] | None = None, cuts: str = "") -> list[Request]:
    """One of every client: its lengths, bytes and entry; client 0 is id 0."""
    bytes_of = held or [1] * len(rows)
    entries = [int(cut) for cut in cuts] or [0] * len(rows)
    return [
        Request(number, f"client-{number}", False, tuple(lengths), entry, 0.0, taken, (5, number, 0))
        for number, (lengths, taken, entry) in enumerate(zip(rows, bytes_of, entries, strict=True))
    ]


@pytest.mark.parametrize(
    ("overhead", "batches"),
    [
        (0, [(0, 4), (1,), (2,), (3, 5)]),  # 2 | 3 3 | 7 | 8 8: no padding
        (1, [(0, 2, 4), (1, 3, 5)]),  # 2 3 3 | 7 8 8: each joined with one position of padding, and one batch less
        (4, [(0, 2, 4), (1, 3, 5)]),
        (20, [(0, 1, 2, 3, 4, 5)]),  # 17 positions of padding
    ],
)
def test_padding_is_traded_for_batches(overhead: int, batches: list[tuple[int, ...]]) -> None:
    requests = requests_of([[8], [2], [7], [3], [8], [3]])
    assert cohort(requests, replace(PLAIN, overhead=overhead)) == batches


def test_tokens_and_memory_bound_a_batch_and_what_is_over_them_runs_alone() -> None:
    free = replace(PLAIN, overhead=100)
    requests = requests_of([[8], [9, 9, 9], [8], [8]], held=[3, 9, 3, 3])
    assert cohort(requests, replace(free, tokens=16)) == [(0,), (1,), (2, 3)]
    assert cohort(requests, replace(free, bytes=6)) == [(0,), (1,), (2, 3)]


def test_rows_that_enter_deeper_come_later() -> None:
    requests = requests_of([[8], [8], [8], [8]], cuts="4224")
    assert cohort(requests, replace(PLAIN, overhead=100)) == [(1, 2, 0, 3)]


def test_nobody_is_no_batch() -> None:
    assert cohort([], PLAIN) == []


budgets = st.builds(
    Budget,
    tokens=st.integers(1, 60),
    bytes=st.integers(1, 12),
    wait=st.just(0.0),
    starve=st.just(math.inf),
    overhead=st.integers(0, 20),
)
mixed = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 5)), min_size=1, max_size=9
).map(lambda drawn: requests_of([lengths for lengths, _ in drawn], [held for _, held in drawn]))
alike = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(lambda lengths: requests_of([[n] for n in lengths]))


@given(mixed, budgets, st.randoms())
def test_neither_numbers_nor_times_of_arrival_matter(requests: list[Request], budget: Budget, random: Random) -> None:
    def keys(cohort_: list[Request]) -> list[list[tuple[int, int, int]]]:
        by_id = {one.id: one.key for one in cohort_}
        return [[by_id[one] for one in batch] for batch in cohort(cohort_, budget)]

    arrived = random.sample(requests, len(requests))
    again = [replace(one, id=number, arrived=random.random()) for number, one in enumerate(arrived)]
    assert keys(again) == keys(requests)


@given(mixed, budgets)
def test_every_request_is_in_one_batch_and_every_batch_within_the_budget(
    requests: list[Request], budget: Budget
) -> None:
    batches = cohort(requests, budget)
    assert sorted(one for batch in batches for one in batch) == [one.id for one in requests]
    assert all(allowed([requests[one] for one in batch], budget) for batch in batches)
    lowest = [min(requests[one].key for one in batch) for batch in batches]
    assert lowest == sorted(lowest)


def allowed(batch: Sequence[Request], budget: Budget) -> bool:
    return len(batch) == 1 or (positions(batch) <= budget.tokens and sum(one.bytes for one in batch) <= budget.bytes)


def positions(batch: Sequence[Request]) -> int:
    return sum(one.rows for one in batch) * max(one.longest for one in batch)


def cost(batches: Sequence[Sequence[Request]], budget: Budget) -> float:
    """Infinite if a batch is over the budget."""
    if not all(allowed(batch, budget) for batch in batches):
        return math.inf
    return sum(budget.overhead + positions(batch) for batch in batches)


def cuts_of(line: list[Request]) -> Iterator[list[list[Request]]]:
    """Every way to cut a line."""
    yield [line]
    for end in range(1, len(line)):
        for rest in cuts_of(line[end:]):
            yield [line[:end], *rest]


def groupings_of(requests: list[Request]) -> Iterator[list[list[Request]]]:
    """Every way to make groups of a set."""
    if not requests:
        yield []
        return
    first, others = requests[0], requests[1:]
    for groups in groupings_of(others):
        yield [[first], *groups]
        for at, group in enumerate(groups):
            yield [*groups[:at], [first, *group], *groups[at + 1 :]]


def chosen(requests: list[Request], budget: Budget) -> float:
    return cost([[requests[one] for one in batch] for batch in cohort(requests, budget)], budget)


@given(mixed, budgets)
def test_no_other_batches_of_neighbours_cost_less(requests: list[Request], budget: Budget) -> None:
    line = sorted(requests, key=lambda one: (one.longest, one.entry, one.tenant, one.key))
    assert chosen(requests, budget) == min(cost(batches, budget) for batches in cuts_of(line))


@given(alike, budgets)
def test_no_other_batches_at_all_cost_less_where_rows_and_bytes_are_equal(
    requests: list[Request], budget: Budget
) -> None:
    assert chosen(requests, budget) == min(cost(batches, budget) for batches in groupings_of(requests))
