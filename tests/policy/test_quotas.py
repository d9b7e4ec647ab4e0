"""No tenant gets more than its quota, and whoever waits gets all of it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.policy.quotas import Limit, allowed_at, taken

amounts = st.integers(1, 50)
limits = st.builds(Limit, rate=st.integers(1, 20), burst=st.integers(1, 30))
streams = st.lists(st.tuples(amounts, st.floats(0, 5)), min_size=1, max_size=20)
Taken = list[tuple[float, int]]


def run(limit: Limit, stream: list[tuple[int, float]]) -> Taken:
    """Each request comes a pause after the one before, and runs as soon as it may: when, and how much."""
    buckets: dict[str, float] = {}
    now, ran = 100.0, []
    for amount, pause in stream:
        now = max(now + pause, allowed_at(buckets, {"tokens": limit}, {"tokens": amount}))
        buckets = taken(buckets, {"tokens": limit}, {"tokens": amount}, now)
        ran.append((now, amount))
    return ran


def test_drawn() -> None:
    """10 tokens a second, 20 at once: 15 leave 5, at 0.5 s there are the 10 that are asked for, and 30 leave a debt."""
    limit = {"tokens": Limit(rate=10, burst=20)}
    buckets = taken({}, limit, {"tokens": 15}, 0.0)
    assert allowed_at(buckets, limit, {"tokens": 5}) == 0.0
    assert allowed_at(buckets, limit, {"tokens": 10}) == 0.5
    buckets = taken(buckets, limit, {"tokens": 10}, 0.5)
    assert allowed_at(buckets, limit, {"tokens": 30}) == 2.5  # full
    buckets = taken(buckets, limit, {"tokens": 30}, 2.5)
    assert allowed_at(buckets, limit, {"tokens": 5}) == 4.0  # the debt of 10, and 5


@given(limits, streams)
def test_no_window_gets_more_than_rate_x_time_and_a_burst(limit: Limit, stream: list[tuple[int, float]]) -> None:
    ran = run(limit, stream)
    burst = max(limit.burst, *(amount for _, amount in ran))
    for first, (since, _) in enumerate(ran):
        for last, (until, _) in enumerate(ran[first:], first):
            total = sum(amount for _, amount in ran[first : last + 1])
            assert total <= limit.rate * (until - since) + burst + 1e-6


@given(limits, streams)
def test_it_is_a_bucket_that_fills_up(limit: Limit, stream: list[tuple[int, float]]) -> None:
    rate, burst, level = Fraction(limit.rate), Fraction(limit.burst), Fraction(limit.burst)
    before = now = Fraction(100)
    for (amount, pause), (ran, _) in zip(stream, run(limit, stream), strict=True):
        now += Fraction(pause)
        level = min(burst, level + rate * (now - before))
        missing = max(min(Fraction(amount), burst) - level, Fraction(0))
        before = now = now + missing / rate
        level += missing - amount
        assert ran == pytest.approx(float(now), abs=1e-6)


@given(limits, limits, amounts, amounts, st.floats(0, 5))
def test_every_resource_must_allow_it(tokens: Limit, size: Limit, some: int, many: int, pause: float) -> None:
    both, asked = {"tokens": tokens, "bytes": size}, {"tokens": some, "bytes": many}
    buckets = taken({}, both, asked, pause)
    single = [allowed_at(buckets, {name: limit}, asked) for name, limit in both.items()]
    assert allowed_at(buckets, both, asked) == max(single)


def test_what_has_no_limit_is_free() -> None:
    assert allowed_at({}, {}, {"tokens": 10**9}) == -math.inf
    assert taken({}, {}, {"tokens": 10**9}, 1.0) == {}


def test_a_newcomer_has_a_full_bucket() -> None:
    assert allowed_at({}, {"bytes": Limit(1, 10)}, {"bytes": 1000}) <= 0
