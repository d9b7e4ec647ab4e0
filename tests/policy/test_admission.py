"""A client gets the largest batch size that there is memory for, or hears what is missing."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.policy.admission import MIB, Admitted, Refused, admit, admit_all

PRICES = {1: 100 * MIB, 2: 150 * MIB, 4: 250 * MIB, 8: 450 * MIB}


@pytest.mark.parametrize(("free", "batch_size"), [(1000, 8), (450, 8), (449, 4), (250, 4), (150, 2), (100, 1)])
def test_the_largest_that_fits(free: int, batch_size: int) -> None:
    assert admit(PRICES, free * MIB, wanted=8) == Admitted(batch_size, PRICES[batch_size])


def test_never_more_than_wanted() -> None:
    assert admit(PRICES, 1000 * MIB, wanted=5) == Admitted(4, PRICES[4])


def test_a_refusal_names_the_numbers_and_the_remedies() -> None:
    refused = admit(PRICES, 120 * MIB + 1, wanted=8, smallest=2)
    assert refused == Refused(
        150 * MIB,
        120 * MIB + 1,
        "a client of batch size 2 needs 150.0 MiB of the server's memory, 120.0 MiB are left: "
        "raise server.memory_mib by 30, set a smaller data.max_length, or train.activation_checkpointing: true",
    )


def test_a_batch_size_without_a_price_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="from 3 to 3"):
        admit(PRICES, 1000 * MIB, wanted=3, smallest=3)


prices = st.dictionaries(st.integers(1, 16), st.integers(0, 10 * MIB), min_size=1)


@given(prices, st.integers(-MIB, 10 * MIB), st.integers(1, 16), st.integers(1, 16))
def test_admitted_is_affordable_and_refused_is_not(prices: dict[int, int], free: int, first: int, second: int) -> None:
    smallest, wanted = sorted((first, second))
    possible = {size: price for size, price in prices.items() if smallest <= size <= wanted}
    if not possible:
        return
    outcome = admit(prices, free, wanted, smallest)
    if isinstance(outcome, Admitted):
        assert outcome.bytes == possible[outcome.batch_size] <= free
        assert all(price > free for size, price in possible.items() if size > outcome.batch_size)
    else:
        assert outcome.needed == min(possible.values()) > free == outcome.free


@given(st.integers(0, 10 * MIB), st.integers(-MIB, 10 * MIB))
def test_raising_the_budget_by_what_the_refusal_says_is_enough(price: int, free: int) -> None:
    refused = admit({1: price}, free, wanted=1)
    if isinstance(refused, Refused):
        found = re.search(r"by (\d+),", refused.line)
        assert found and admit({1: price}, free + int(found[1]) * MIB, wanted=1) == Admitted(1, price)


@given(prices, st.integers(0, 10 * MIB), st.integers(0, 10 * MIB))
def test_more_memory_never_gives_a_smaller_batch(prices: dict[int, int], free: int, more: int) -> None:
    def size(budget: int) -> int:
        outcome = admit(prices, budget, wanted=16)
        return outcome.batch_size if isinstance(outcome, Admitted) else 0

    assert size(free) <= size(free + more)


def linear(fixed: int, row: int) -> Callable[[int, int], int]:
    """Client N costs so much, and N + 1 times so much a row."""
    return lambda client, rows: fixed + row * rows * (client + 1)


def test_where_all_fit_all_get_what_they_want() -> None:
    assert admit_all(linear(10, 0), [0, 1, 2], 30, 8) == dict.fromkeys([0, 1, 2], Admitted(8, 10))


def test_what_is_left_is_shared_alike_and_the_first_get_a_row_more() -> None:
    """2 rows each take 2 x (20 + 40) of 170; of the 50 left, a row more of client 0 takes 10, one of client 1 20."""
    assert admit_all(linear(20, 10), [0, 1], 170, 8) == {0: Admitted(5, 70), 1: Admitted(4, 100)}


def test_nobody_gets_a_second_row_before_all_have_one_for_which_there_is_memory() -> None:
    found = admit_all(lambda client, rows: 10 * rows, [0, 1, 2, 3], 35, 8)
    assert found == {**dict.fromkeys([0, 1, 2], Admitted(1, 10)), 3: found[3]}
    assert isinstance(found[3], Refused) and (found[3].needed, found[3].free) == (10, 5)


def test_without_memory_everybody_is_refused() -> None:
    assert all(isinstance(one, Refused) for one in admit_all(linear(1, 1), [0, 1], -5, 8).values())


@given(
    st.integers(0, 50),
    st.integers(0, 20),
    st.lists(st.integers(0, 6), unique=True, max_size=6),
    st.integers(-10, 500),
    st.integers(1, 12),
)
def test_all_together_stay_within_the_budget_and_nothing_more_would_fit(
    fixed: int, row: int, clients: list[int], free: int, wanted: int
) -> None:
    price = linear(fixed, row)
    found = admit_all(price, clients, free, wanted)
    assert list(found) == clients
    inside = {client: one for client, one in found.items() if isinstance(one, Admitted)}
    assert all(one.bytes == price(client, one.batch_size) for client, one in inside.items())
    left = free - sum(one.bytes for one in inside.values())
    assert left >= 0 or not inside
    sizes = {one.batch_size for one in inside.values()}
    assert not sizes or max(sizes) - min(sizes) <= 1
    if sizes and max(sizes) < wanted:  # one row more for all does not fit
        assert sum(price(client, min(sizes) + 1) for client in inside) > free
    for client in found.keys() - inside.keys():
        before = sum(price(other, 1) for other in clients[: clients.index(client)] if other in inside)
        assert price(client, 1) > free - before
