"""Draws are fair, the same whenever they are repeated, and hardly moved by who comes and goes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.policy.sampling import Draw, chance, drawn, poisson

draws = st.builds(Draw, st.integers(0, 2**40), st.integers(1, 10**6), st.integers(0, 3))
crowds = st.lists(st.text("abc-0", min_size=1, max_size=4), unique=True, max_size=12)
ROUNDS = [Draw(0, number) for number in range(1, 4001)]


def test_a_chance_is_the_same_on_every_machine() -> None:
    assert chance(Draw(0, 1), "client-0") == 0.2976894244232623


def test_chances_of_different_keys_differ() -> None:
    keys = [Draw(0, 1), Draw(1, 1), Draw(0, 2), Draw(0, 1, 1)]
    values = {chance(draw, client, purpose) for draw in keys for client in ("a", "b") for purpose in ("", "x")}
    assert len(values) == 16


def test_chances_are_uniform() -> None:
    tenths = Counter(int(10 * chance(draw, "a")) for draw in ROUNDS)
    assert sum((tenths[one] - 400) ** 2 / 400 for one in range(10)) < 27.9  # chi-square, 9 degrees of freedom, 0.1 %


@given(draws, crowds, st.integers(-1, 15), st.randoms())
def test_exactly_so_many_are_drawn_each_once_whatever_their_order(
    draw: Draw, crowd: list[str], count: int, rng
) -> None:
    found = drawn(draw, crowd, count)
    assert len(set(found)) == len(found) == max(0, min(count, len(crowd))) and set(found) <= set(crowd)
    shuffled = rng.sample(crowd, len(crowd))
    assert drawn(draw, shuffled, count) == found


@given(draws, crowds.filter(bool), st.integers(0, 12))
def test_a_client_that_comes_takes_at_most_one_place(draw: Draw, crowd: list[str], count: int) -> None:
    *before, newcomer = crowd
    old, new = set(drawn(draw, before, count)), set(drawn(draw, crowd, count))
    assert new - old <= {newcomer} or len(old) < count
    assert len(old - new) <= (newcomer in new)
    assert poisson(draw, before, 0.5) == tuple(one for one in poisson(draw, crowd, 0.5) if one != newcomer)


def test_each_is_drawn_equally_often() -> None:
    times = Counter(client for draw in ROUNDS for client in drawn(draw, "abcde", 2))
    assert all(times[client] == pytest.approx(1600, abs=4 * (4000 * 0.4 * 0.6) ** 0.5) for client in "abcde")


def test_the_first_is_drawn_in_proportion_to_its_weight_and_the_second_among_the_others() -> None:
    weights = {"a": 5.0, "b": 3.0, "c": 2.0, "d": 0.0}
    pairs = Counter(drawn(draw, "abcd", 2, weights) for draw in ROUNDS)
    for (first, second), times in pairs.items():
        share = weights[first] / 10 * weights[second] / (10 - weights[first])
        assert times == pytest.approx(4000 * share, abs=4 * (4000 * share) ** 0.5)


def test_who_has_no_weight_comes_last() -> None:
    assert all(drawn(draw, "abc", 3, {"a": 0.0, "b": 1e-300, "c": 1.0})[2] == "a" for draw in ROUNDS[:100])


def test_poisson_draws_each_at_the_rate_and_apart_from_the_others() -> None:
    found = [poisson(draw, "ab", 0.3) for draw in ROUNDS]
    assert Counter(found)[("a", "b")] == pytest.approx(4000 * 0.09, abs=75)
    assert sum("a" in one for one in found) == pytest.approx(1200, abs=120)
    assert poisson(ROUNDS[0], "ab", 1.0) == ("a", "b") and poisson(ROUNDS[0], "ab", 0.0) == ()
