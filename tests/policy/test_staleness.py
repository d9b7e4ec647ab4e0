"""What is stale counts less, nothing counts twice, and shares add up to one."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.policy.staleness import (
    DISCOUNTS,
    Buffered,
    Contribution,
    Outcome,
    Step,
    constant,
    contribute,
    from_json,
    full,
    hinge,
    mixing,
    polynomial,
    step,
    to_json,
)

sent = st.tuples(st.sampled_from("xyz"), st.integers(0, 9), st.integers(0, 6), st.floats(0.1, 1e4))


def test_discounts_by_their_formulas() -> None:
    assert [constant(one) for one in (0, 9)] == [1.0, 1.0]
    assert [polynomial(one) for one in (0, 1, 3, 8)] == pytest.approx([1, 1 / math.sqrt(2), 1 / 2, 1 / 3])
    assert polynomial(3, a=2.0) == pytest.approx(1 / 16)
    assert [hinge(one) for one in (0, 4, 5, 6)] == pytest.approx([1, 1, 1 / 11, 1 / 21])
    assert hinge(3, a=1.0, b=2.0) == pytest.approx(1 / 2)
    assert mixing(polynomial(3)) == pytest.approx(0.3)


@given(st.sampled_from(sorted(DISCOUNTS)), st.integers(0, 1000))
def test_a_discount_begins_at_one_and_never_rises(name: str, staleness: int) -> None:
    rule = DISCOUNTS[name]
    assert rule(0) == 1 and 0 < rule(staleness + 1) <= rule(staleness)


def test_a_step_of_fedbuff() -> None:
    """Three updates of equal weight, 0, 3 and 8 versions old: (d1 + d2 / 2 + d3 / 3) / 3."""
    buffer = Buffered(size=3, version=8)
    for child, version in [("x", 8), ("y", 5), ("z", 0)]:
        assert not full(buffer)
        buffer, outcome = contribute(buffer, child, 0, version)
        assert outcome == Outcome("counted")
    assert full(buffer)
    after, found = step(buffer)
    assert [share * found.scale for share in found.shares] == pytest.approx([1 / 3, 1 / 6, 1 / 9])
    assert (after.version, after.inside, full(after)) == (9, (), False)


def test_tokens_weigh() -> None:
    inside = (Contribution("x", 0, 0, 300.0), Contribution("y", 0, 3, 100.0))
    _, found = step(Buffered(size=2, inside=inside))
    assert found.shares == pytest.approx((300 / 350, 50 / 350)) and found.scale == pytest.approx(350 / 400)
    assert step(Buffered(size=2, inside=inside), "hinge", a=1.0, b=2.0)[1] == found
    assert step(Buffered(size=2, inside=inside), "constant")[1] == Step((0.75, 0.25), 1.0)


def test_what_was_sent_again_counts_once_also_after_the_step() -> None:
    buffer, _ = contribute(Buffered(size=2), "x", 0, 0)
    assert contribute(buffer, "x", 0, 0) == (buffer, Outcome("again"))
    buffer, outcome = contribute(buffer, "x", 1, 0)  # the next update of the same child does count
    assert outcome.kind == "counted" and full(buffer)
    buffer, _ = step(buffer)
    assert contribute(buffer, "x", 1, 0) == (buffer, Outcome("again"))


def test_what_is_too_old_is_dropped_and_its_sender_is_told() -> None:
    buffer = Buffered(size=2, oldest=2, version=5)
    assert contribute(buffer, "x", 4, 3)[1] == Outcome("counted")
    buffer, outcome = contribute(buffer, "x", 4, 2)
    assert outcome == Outcome("stale", "update 4 of x is 3 versions old, 2 are allowed: it is dropped")
    assert buffer.inside == () and contribute(buffer, "x", 4, 5)[1] == Outcome("again")


def test_a_version_to_come_is_unknown() -> None:
    buffer = Buffered(size=2, version=5)
    line = "x began from version 6, there are 5: take the adapter anew and go on from it"
    assert contribute(buffer, "x", 0, 6) == (buffer, Outcome("unknown", line))


@given(st.lists(sent), st.sampled_from(sorted(DISCOUNTS)), st.none() | st.integers(0, 3), st.integers(1, 4))
def test_every_update_is_in_at_most_one_step_and_shares_add_up_to_one(
    stream: list[tuple[str, int, int, float]], rule: str, oldest: int | None, size: int
) -> None:
    buffer, used, accepted = Buffered(size, oldest), [], 0
    for child, number, version, weight in stream:
        buffer, outcome = contribute(buffer, child, number, version, weight)
        accepted += outcome.kind == "counted"
        buffer = from_json(json.loads(json.dumps(to_json(buffer))))  # restarted
        if full(buffer):
            inside = buffer.inside
            buffer, found = step(buffer, rule)
            assert math.fsum(found.shares) == pytest.approx(1) and 0 < found.scale <= 1
            assert all(one.staleness <= (oldest if oldest is not None else 99) for one in inside)
            used += [(one.child, one.number) for one in inside]
            per_token = sorted(
                (one.staleness, -share / one.weight) for one, share in zip(inside, found.shares, strict=True)
            )
            assert [one for _, one in per_token] == pytest.approx(sorted(one for _, one in per_token))
    assert len(set(used)) == len(used) == accepted - len(buffer.inside)
