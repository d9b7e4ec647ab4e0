"""Oort asks those that teach most in the shortest time, and never stops to explore."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.policy.history import History, Seen
from splitllm.policy.oort import Settings, exploration, preferred, select, worth
from splitllm.policy.sampling import Draw

CROWD = [f"client-{number}" for number in range(10)]
PLAIN = Settings()
seen = st.builds(Seen, st.none() | st.floats(0, 1e6), st.floats(0, 1e3), st.integers(1, 50), st.integers(0, 9))
histories = st.builds(History, st.dictionaries(st.sampled_from(CROWD), seen), st.floats(5, 100))


def test_worth_is_the_formula() -> None:
    """a has the least utility, b the most and the longest time, c is half-way."""
    known = {"a": Seen(10.0, 1.0, 5), "b": Seen(30.0, 4.0, 8), "c": Seen(20.0, 2.0, 2), "d": Seen(None, 1.0, 9)}
    bonus = {client: math.sqrt(0.1 * math.log(9) / one.last) for client, one in known.items()}
    history = History(known, percentile=50)
    assert preferred(history, "abcd") == 2.0
    assert worth(history, "abcdz", 9, PLAIN) == pytest.approx(
        {"a": bonus["a"], "b": (1 + bonus["b"]) * (2 / 4) ** 2, "c": 0.5 + bonus["c"], "d": bonus["d"]}
    )
    free = worth(replace(history, percentile=100), "abcd", 9, PLAIN)
    assert free["b"] == pytest.approx(1 + bonus["b"])  # nobody is slow


def test_utilities_are_clipped_at_a_quantile() -> None:
    """Of 100 clients the two with the most count as much as the third."""
    crowd = [str(number) for number in range(100)]
    history = History({client: Seen(float(number) ** 3, 1.0, 1) for number, client in enumerate(crowd)})
    found = worth(history, crowd, 1, PLAIN)
    assert found["99"] == found["98"] == 1.0 > found["97"]


def test_where_all_have_the_same_utility_speed_decides() -> None:
    history = History({"a": Seen(5.0, 1.0, 1), "b": Seen(5.0, 10.0, 1)})
    assert worth(history, "ab", 1, PLAIN) == pytest.approx({"a": 1.0, "b": 0.01})


@pytest.mark.parametrize(
    ("number", "share"), [(1, 0.9), (2, 0.855), (29, 0.9 * 0.95**28), (30, 0.9 * 0.95**29), (31, 0.2)]
)
def test_exploration_falls_to_its_floor(number: int, share: float) -> None:
    assert exploration(number, PLAIN) == pytest.approx(share)


@given(histories, st.integers(50, 99), st.sampled_from(CROWD), st.sampled_from(CROWD))
def test_more_utility_more_speed_and_a_longer_absence_are_never_worth_less(
    history: History, number: int, one: str, other: str
) -> None:
    values = worth(history, CROWD, number, PLAIN)
    assert all(0 <= value < math.inf for value in values.values())
    if one in values and other in values:
        good, bad = history.clients[one], history.clients[other]
        if (good.utility or 0) >= (bad.utility or 0) and good.seconds <= bad.seconds and good.last <= bad.last:
            assert values[one] >= values[other] or good.utility is None


def times(history: History, count: int, settings: Settings = PLAIN, rounds: int = 400) -> Counter[str]:
    """How often each is asked, long after the beginning."""
    return Counter(
        client
        for number in range(100, 100 + rounds)
        for client in select(history, CROWD, count, Draw(1, number), settings)
    )


def test_those_that_lose_much_and_are_fast_are_asked_more_often() -> None:
    good, bad = CROWD[:5], CROWD[5:]
    known = {client: Seen(100.0 if client in good else 10.0, 1.0 if client in good else 20.0, 90) for client in CROWD}
    found = times(History(known), 5)
    assert min(found[client] for client in good) > 3 * max(found[client] for client in bad)
    assert min(found[client] for client in bad) > 0


def test_who_is_worth_much_less_than_the_last_of_the_best_is_only_explored() -> None:
    """Worth 1, 8/9, 7/9 and so on: for two places, those above 0.7 x 8/9 are drawn from, the first most often."""
    known = {client: Seen(10.0 - number, 1.0, 10**6) for number, client in enumerate(CROWD)}
    found = times(History(known), 2, Settings(explore=0.0, floor=0.0))
    assert set(found) == set(CROWD[:4]) and found[CROWD[0]] > found[CROWD[3]]


def test_a_fifth_of_the_places_is_explored_for_ever() -> None:
    """Nine are known; the tenth, which never answers, is asked whenever a place is for exploration."""
    known = {client: Seen(100.0, 1.0, 90) for client in CROWD[:9]}
    assert times(History(known), 5)[CROWD[9]] == 400
    assert times(History(known), 1)[CROWD[9]] == 400  # one place: none is left for the known


def test_unknown_clients_are_explored_before_known_ones() -> None:
    known = {client: Seen(100.0, 1.0, 1) for client in CROWD[:6]}
    assert set(CROWD[6:]) <= set(select(History(known), CROWD, 8, Draw(0, 1), PLAIN))


def test_in_the_first_round_all_are_explored() -> None:
    assert {client: pytest.approx(200, abs=60) for client in CROWD} == Counter(
        client for seed in range(400) for client in select(History(), CROWD, 5, Draw(seed, 1), PLAIN)
    )


def test_who_has_taken_part_often_enough_rests_while_others_are_left() -> None:
    known = {client: Seen(float(number), 1.0, 1, times=number) for number, client in enumerate(CROWD)}
    settings = Settings(most=6)
    assert set(times(History(known), 6, settings)) == set(CROWD[:6])
    assert set(select(History(known), CROWD, 8, Draw(0, 9), settings)) > set(CROWD[:6])  # they alone do not suffice


@given(histories, st.lists(st.sampled_from(CROWD), unique=True), st.integers(0, 12), st.integers(51, 99), st.booleans())
def test_exactly_so_many_are_asked_each_once(
    history: History, present: list[str], count: int, number: int, limited: bool
) -> None:
    settings = Settings(most=4 if limited else None)
    found = select(history, present, count, Draw(0, number), settings)
    assert len(set(found)) == len(found) == min(count, len(present)) and set(found) <= set(present)
    assert found == select(history, present, count, Draw(0, number), settings)
