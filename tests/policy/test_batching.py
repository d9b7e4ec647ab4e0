"""What a server runs next: the rules are drawn; random streams of requests keep them, and none starves."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitllm.policy.batching import Budget, Request, Run, Wait, compose
from tests.policy.drawing import PLAIN, device_of
from tests.policy.world import Batch, Tenant, World

ONE_ROW = replace(PLAIN, tokens=8)
TWO_ROWS = replace(PLAIN, tokens=16)


def assert_drawn(drawing: str, budget: Budget, **weights: float) -> None:
    ran, drawn = device_of(drawing, budget, weights)
    assert ran == drawn


def test_the_oldest_goes_first_and_of_equally_old_ones_the_lowest_number() -> None:
    assert_drawn(
        """
        tick    0   1   2   3
        alice   A8  C8  .   .
        bob     B8  .   .   .
        device  A   B   C   .
        """,
        ONE_ROW,
    )


def test_all_that_fit_run_in_one_batch() -> None:
    assert_drawn(
        """
        tick    0   1   2   3
        alice   A8  C8  .   .
        bob     B8  D8  .   .
        carol   .   E8  .   .
        device  AB  CD  E   .
        """,
        TWO_ROWS,
    )


def test_gradients_go_before_activations_and_never_with_them() -> None:
    assert_drawn(
        """
        tick    0   1   2   3   4
        alice   A8  .   a8  .   .
        bob     B8  .   b8  .   .
        carol   .   .   C8  .   .
        dave    .   D8  E8  .   .
        device  AB  D   ab  CE  .
        """,
        TWO_ROWS,
    )


@pytest.mark.parametrize(
    ("weight", "device"),
    [
        (1, "A   B   C   D   E   ."),
        (1.5, "A   B   C   D   E   ."),  # tick 3: D has waited 3, E 1.5 x 2; D has the lower number
        (2, "A   B   C   E   D   ."),  # tick 3: D has waited 3, E 2 x 2
        (3, "A   B   E   C   D   ."),  # tick 2: C has waited 2, E 3 x 1
    ],
)
def test_waiting_counts_as_often_as_the_weight_says(weight: float, device: str) -> None:
    assert_drawn(
        f"""
        tick    0   1   2   3   4   5
        ann     A8  .   .   .   .   .
        ben     B8  .   .   .   .   .
        cleo    C8  .   .   .   .   .
        dora    D8  .   .   .   .   .
        bob     .   E8  .   .   .   .
        device  {device}
        """,
        ONE_ROW,
        bob=weight,
    )


def test_who_is_overdue_goes_before_any_weight_the_oldest_first() -> None:
    """From tick 4 on A and B have waited longer than 3."""
    assert_drawn(
        """
        tick    0   1   2   3   4   5   6   7   8
        carol   C8  E8  G8  .   .   .   .   .   .
        dave    D8  F8  H8  .   .   .   .   .   .
        alice   A8  .   .   .   .   .   .   .   .
        bob     B8  .   .   .   .   .   .   .   .
        device  C   D   E   F   A   B   G   H   .
        """,
        replace(ONE_ROW, starve=3),
        carol=100,
        dave=100,
    )


def test_rows_of_like_length_run_together_and_the_others_are_only_passed_over() -> None:
    """B beside A: 6 of 16 positions would be padding. D beside A and C: 4 of 24. At tick 1 B is the oldest."""
    assert_drawn(
        """
        tick    0    1   2   3
        alice   A8   E8  .   .
        bob     B2   .   .   .
        carol   C8   F8  .   .
        dave    D4   .   .   .
        device  ACD  B   EF  .
        """,
        PLAIN,
    )


@pytest.mark.parametrize(("padding", "device"), [(0.24, "A   B   ."), (0.25, "AB  .   .")])
def test_the_share_of_padding_may_be_as_large_as_its_bound(padding: float, device: str) -> None:
    """Together, 4 of 16 positions."""
    assert_drawn(
        f"""
        tick    0   1   2
        alice   A8  .   .
        bob     B4  .   .
        device  {device}
        """,
        replace(PLAIN, padding=padding),
    )


def test_without_padding_only_rows_of_one_length_run_together() -> None:
    assert_drawn(
        """
        tick    0   1   2
        alice   A8  .   .
        bob     B7  .   .
        carol   C8  .   .
        device  AC  B   .
        """,
        replace(PLAIN, padding=0.0),
    )


def test_a_request_with_more_positions_than_a_batch_may_have_runs_alone() -> None:
    assert_drawn(
        """
        tick    0   1   2   3   4
        alice   A8  .   .   .   .
        bob     B40 .   .   .   .
        carol   C8  .   .   .   .
        device  AC  B   .   .   .
        """,
        TWO_ROWS,
    )


def test_a_batch_with_room_waits_for_company_but_only_while_nothing_else_is_ready() -> None:
    """Each in turn: it is not worth more than 2 ticks; it is full; no more is expected; F cannot run beside E."""
    assert_drawn(
        """
        tick    0   1   2   3   4   5   6   7   8   9   10  11  12
        alice   A8  .   .   .   B8  .   .   D8  .   E8  .   .   .
        bob     .   .   .   .   .   C8  .   .   .   F2  .   .   .
        more    y   y   y   y   y   y   y   n   y   y   y   y   y
        device  -   -   A   .   -   BC  .   D   .   E   -   F   .
        """,
        replace(TWO_ROWS, wait=2),
    )


def test_what_is_overdue_does_not_wait_for_company() -> None:
    assert_drawn(
        """
        tick    0   1   2
        alice   A8  .   .
        more    y   y   y
        device  -   A   .
        """,
        replace(TWO_ROWS, wait=2, starve=1),
    )


def test_too_little_memory_lets_small_ones_go_first_until_the_large_one_is_overdue() -> None:
    """Of 10 bytes A takes 6, C and D 2 each. From tick 5 on B has waited longer than 3: E would fit, but B is first."""
    assert_drawn(
        """
        tick    0     1     2     3     4     5     6     7     8     9     10
        alice   A8:6  .     .     .     .     a8    .     .     .     .     .
        bob     .     B8:8  .     .     .     .     .     .     .     .     .
        carol   .     C8:2  .     .     .     .     .     c8    .     .     .
        dave    .     .     D8:2  E8:2  .     .     .     .     .     d8    .
        device  A     C     D     -     -     a     -     c     B     d     E
        """,
        replace(ONE_ROW, bytes=10, starve=3),
    )


def request(number: int, **given: object) -> Request:
    plain = Request(number, "alice", False, (8,), 0, 0.0, 1, (0, 0, number))
    return replace(plain, **given)  # type: ignore[arg-type]


def test_rows_that_enter_deeper_come_later_and_else_by_step_client_and_number() -> None:
    ready = [
        request(0, entry=4, key=(0, 0, 0)),
        request(1, entry=2, key=(0, 2, 0)),
        request(2, entry=2, key=(0, 1, 1)),
        request(3, entry=2, key=(0, 1, 0)),
    ]
    assert compose(ready, 1.0, PLAIN, {}, more=False) == Run((3, 2, 1, 0))


def test_it_says_until_when_and_for_how_many_bytes_it_waits() -> None:
    assert compose([], 1.0, PLAIN, {}, more=True) == Wait(math.inf)
    assert compose([request(0, arrived=0.5)], 1.0, replace(PLAIN, wait=2), {}, more=True) == Wait(2.5)
    assert compose([request(0, bytes=7)], 1.0, replace(PLAIN, bytes=4), {}, more=True) == Wait(math.inf, lacking=3)


def test_gradients_need_no_memory() -> None:
    gradients = [request(0, bytes=7, urgent=True), request(1, bytes=7, urgent=True)]
    assert compose(gradients, 1.0, replace(PLAIN, bytes=-2), {}, more=False) == Run((0, 1))


@given(st.floats(0, 1e6), st.floats(1e-9, 10), st.floats(1e-9, 10))
def test_asked_again_at_the_time_it_named_it_runs(arrived: float, wait: float, starve: float) -> None:
    budget = replace(PLAIN, wait=wait, starve=starve)
    decision = compose([request(0, arrived=arrived)], arrived, budget, {}, more=True)
    until = decision.until if isinstance(decision, Wait) else arrived
    assert compose([request(0, arrived=arrived)], until, budget, {}, more=True) == Run((0,))


worlds = st.builds(
    World,
    tenants=st.lists(
        st.builds(
            Tenant,
            weight=st.sampled_from([0.0, 0.1, 1.0, 3.0, 1000.0]),
            at_once=st.integers(1, 3),
            pause=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
            longest=st.sampled_from([1, 8, 40]),
            rows=st.integers(1, 2),
        ),
        min_size=1,
        max_size=5,
    ),
    budget=st.builds(
        Budget,
        tokens=st.sampled_from([1, 16, 64, 1000]),
        bytes=st.sampled_from([8, 10, 20, 1000]),
        wait=st.sampled_from([0.0, 0.5, 5.0]),
        starve=st.sampled_from([0.0, 1.0, 10.0, 100.0]),
        padding=st.sampled_from([0.0, 0.25, 1.0]),
    ),
    away=st.sampled_from([0.0, 0.3, 3.0]),
    seed=st.integers(0, 2**32),
)


@settings(max_examples=60)
@given(worlds)
def test_every_request_runs_once(world: World) -> None:
    world.run(120)
    ran = [one.id for batch in world.batches for one in batch.requests]
    assert sorted(ran) == list(range(world.arrivals))


@settings(max_examples=60)
@given(worlds)
def test_every_batch_is_of_one_kind_gradients_first_and_within_the_budget(world: World) -> None:
    for batch in world.run(120):
        assert {one.urgent for one in batch.requests} == {any(one.urgent for one in batch.ready)}
        assert sum(one.bytes for one in batch.requests if not one.urgent) <= batch.free
        positions = batch.rows * batch.longest
        alone = sum(one.rows * one.longest for one in batch.requests)
        assert positions - alone <= world.budget.padding * positions
        assert positions <= world.budget.tokens or len(batch.requests) == 1


@settings(max_examples=60)
@given(worlds)
def test_the_device_idles_only_for_company_or_for_memory(world: World) -> None:
    for batch, before in zip(world.run(120)[1:], world.batches, strict=False):
        since = max(before.end, min(one.arrived for one in batch.ready))
        for_memory = any(not one.urgent and one.bytes > world.least_free(since, batch.start) for one in batch.ready)
        assert batch.start <= since + world.budget.wait or for_memory


def overdue(batch: Batch, budget: Budget) -> list[Request]:
    """Of the kind that runs, those that should run first, the oldest first."""
    urgent = batch.requests[0].urgent
    late = [one for one in batch.ready if one.urgent == urgent and batch.start > one.arrived + budget.starve]
    return sorted(late, key=lambda one: (one.arrived, one.id))


@settings(max_examples=100)
@given(worlds)
def test_an_overdue_request_runs_within_as_many_batches_as_older_ones_were_overdue(world: World) -> None:
    world.run(150)
    for urgent in (True, False):
        batches = [batch for batch in world.batches if batch.requests[0].urgent == urgent]
        for index, batch in enumerate(batches):
            for older, request in enumerate(overdue(batch, world.budget)):
                soon = batches[index : index + older + 1]
                assert any(request in later.requests for later in soon)


@settings(max_examples=100)
@given(worlds)
def test_activations_start_within_the_bound_of_their_arrival(world: World) -> None:
    batches = world.run(150)
    under_way = sum(tenant.at_once for tenant in world.tenants)
    longest = max((batch.end - batch.start for batch in batches if not batch.requests[0].urgent), default=0.0)
    gradients = max((batch.end - batch.start for batch in batches if batch.requests[0].urgent), default=0.0)
    bound = world.budget.starve + under_way * (longest + world.away + under_way * gradients)
    waits = [batch.start - one.arrived for batch in batches for one in batch.requests if not one.urgent]
    assert max(waits) <= bound + 1e-6


def test_a_tenant_of_no_weight_in_a_crowd_waits_until_it_is_overdue_and_no_longer() -> None:
    crowd = [Tenant(weight=1000.0, at_once=2, pause=0.0, longest=8, rows=1) for _ in range(9)]
    nobody = Tenant(weight=0.0, at_once=1, pause=0.0, longest=8, rows=1)
    world = World([*crowd, nobody], replace(ONE_ROW, starve=30.0), away=0.0, seed=1)
    waits = [
        batch.start - one.arrived
        for batch in world.run(4000)
        for one in batch.requests
        if one.tenant == "tenant-9" and not one.urgent
    ]
    assert sum(seconds > 30.0 for seconds in waits) > 10
    assert max(waits) < 31.0


@pytest.mark.parametrize("weights", [(1, 2, 4, 8), (0.5, 0.5, 3, 1)])
@pytest.mark.parametrize(("padding", "tolerance"), [(1.0, 0.1), (0.25, 0.25)])
def test_served_tokens_are_proportional_to_the_weights_where_queues_are_long(
    weights: tuple[float, ...], padding: float, tolerance: float
) -> None:
    """Whoever is served sends the next at once: each has 64 ready, of which a batch takes about 8."""
    random, budget = Random(1), replace(PLAIN, tokens=128, padding=padding)
    by_tenant = {f"tenant-{number}": float(weight) for number, weight in enumerate(weights)}
    served = dict.fromkeys(by_tenant, 0)
    senders = [tenant for tenant in by_tenant for _ in range(64)]
    ready: dict[int, Request] = {}
    numbers = count()
    for tick in range(900):
        for number, tenant in zip(numbers, senders, strict=False):
            length = random.randint(1, 32)
            ready[number] = request(number, tenant=tenant, lengths=(length,), arrived=float(tick), bytes=0)
        decision = compose(list(ready.values()), float(tick), budget, by_tenant, more=False)
        assert isinstance(decision, Run)
        batch = [ready.pop(one) for one in decision.ids]
        senders = [one.tenant for one in batch]
        for one in batch if tick > 300 else []:
            served[one.tenant] += one.tokens
    shares = {tenant: tokens / sum(served.values()) for tenant, tokens in served.items()}
    assert shares == pytest.approx({t: w / sum(weights) for t, w in by_tenant.items()}, rel=tolerance)
