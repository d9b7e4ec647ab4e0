"""What is remembered of clients, and how the pacer moves."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.policy.history import History, Report, Seen, from_json, recorded, to_json, utility

reports = st.builds(Report, st.floats(allow_nan=True), st.floats(allow_nan=True))
closed = st.lists(st.tuples(st.dictionaries(st.sampled_from("abc"), reports), st.sets(st.sampled_from("de"))))


def test_utility_is_examples_times_the_root_of_the_mean_square() -> None:
    losses = [3.0, 4.0, 0.0, 5.0]
    assert utility(4, sum(loss**2 for loss in losses) / 4) == pytest.approx(4 * math.sqrt(50 / 4))
    assert utility(0, 1.0) == 0


@pytest.mark.parametrize("mean_square", [math.nan, math.inf, -1.0])
def test_a_loss_that_is_no_number_has_no_utility(mean_square: float) -> None:
    assert utility(3, mean_square) == 0.0


def test_what_comes_is_remembered_and_so_is_what_does_not_come() -> None:
    first = recorded(History(), 1, {"a": Report(7.0, 2.0)}, ["b"], waited=60.0)
    assert first.clients == {"a": Seen(7.0, 2.0, 1, 1), "b": Seen(None, 60.0, 1, 0)}
    second = recorded(first, 2, {"b": Report(5.0, 50.0)}, ["a"], waited=40.0)
    assert second.clients == {"a": Seen(7.0, 40.0, 2, 1), "b": Seen(5.0, 50.0, 2, 1)}


def test_a_round_is_recorded_once() -> None:
    history = recorded(History(), 4, {"a": Report(7.0, 2.0)})
    assert recorded(history, 4, {"a": Report(9.0, 2.0)}) is history is recorded(history, 3, {})


def of(utilities: list[float], percentile: float = 30.0) -> float:
    history = History(percentile=percentile)
    for number, one in enumerate(utilities, 1):
        history = recorded(history, number, {"a": Report(one, 1.0)}, window=2, pace=5.0)
    return history.percentile


@pytest.mark.parametrize(
    ("utilities", "percentile"),
    [
        ([10, 10, 10], 30),  # not yet two windows
        ([10, 10, 10, 10], 35),  # flat: slower clients are let in
        ([10, 10, 11, 11], 35),  # a tenth is flat
        ([10, 10, 12, 12], 30),
        ([1, 1, 6, 6], 25),  # five times more: fewer of them
        ([10, 10, 10, 10, 10], 35),  # once a window
        ([10, 10, 10, 10, 10, 10], 40),
    ],
)
def test_the_pacer(utilities: list[float], percentile: float) -> None:
    assert of(utilities) == percentile


def test_the_pacer_stays_within_its_bounds() -> None:
    assert of([10] * 100) == 100 and of([6.0**number for number in range(40)]) == 5


def test_utility_beyond_all_bounds_does_not_stop_the_pacer() -> None:
    assert of([1.7e308] * 8) == 45
    both = recorded(History(), 1, {"a": Report(1.7e308, 1.0), "b": Report(1.7e308, 1.0)})
    assert math.isfinite(both.recent[0])


@given(closed)
def test_it_survives_a_journal_whatever_clients_report(rounds: list[tuple[dict[str, Report], set[str]]]) -> None:
    history = History()
    for number, (reports, missing) in enumerate(rounds, 1):
        history = recorded(history, number, reports, missing, waited=9.0, window=2)
    text = json.dumps(to_json(history), allow_nan=False)
    assert from_json(json.loads(text)) == history
    assert len(history.recent) <= 4 and sum(one.times for one in history.clients.values()) == sum(
        len(reports) for reports, _ in rounds
    )
