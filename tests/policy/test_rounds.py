"""A round ends by its deadline, with enough or not at all, and counts nobody twice, whoever comes and goes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from splitllm.policy.participation import Asked, Rules
from splitllm.policy.rounds import Arrival, Closed, Round, Void, Waiting, arrive, begin, decide, leave
from splitllm.policy.sampling import Draw

NAMES = "abcdef"


@dataclass(frozen=True)
class Event:
    at: float
    kind: Literal["arrives", "leaves"]
    client: str


@dataclass(frozen=True)
class Played:
    """When it ended and how (never: infinity), and what became of each arrival, also of those after the end."""

    ended: float
    decision: Waiting | Closed | Void
    arrivals: tuple[tuple[Event, Arrival], ...]


@st.composite
def rounds(draw: st.DrawFn) -> Round:
    asked = NAMES[: draw(st.integers(1, 5))]
    goal = draw(st.integers(1, len(asked)))
    deadline = draw(st.sampled_from([5.0, 10.0, math.inf]))
    rules = Rules(minimum=draw(st.integers(1, goal)), deadline=deadline)
    return begin(rules, Asked(tuple(asked), goal), Draw(0, 3), 100.0)


@st.composite
def timelines(draw: st.DrawFn) -> list[Event]:
    gaps = st.sampled_from([0.5, 1.0, 3.0])
    kinds = st.sampled_from(["arrives", "arrives", "leaves"])
    now, events = 100.0, []
    for gap, kind, client in draw(st.lists(st.tuples(gaps, kinds, st.sampled_from(NAMES)), max_size=14)):
        now += gap
        events.append(Event(now, kind, client))
    return events


def play(this: Round, events: list[Event]) -> Played:
    """As a server does it: it decides after every event, and when the time comes that it was told to wait for."""
    arrivals = []
    ended, decision = math.inf, decide(this, this.began)
    for event in [*events, None]:
        now = event.at if event else math.inf
        if isinstance(decision, Waiting) and decision.until <= now and decision.until < math.inf:
            ended, decision = decision.until, decide(this, decision.until)
        if event is None:
            break
        if event.kind == "leaves":
            this = leave(this, [event.client])
        else:
            this, arrival = arrive(this, event.client, this.key, event.at)
            arrivals.append((event, arrival))
        if isinstance(decision, Waiting):
            decision = decide(this, event.at)
            ended = math.inf if isinstance(decision, Waiting) else event.at
    return Played(ended, decision, tuple(arrivals))


@given(rounds(), timelines())
def test_it_always_ends_by_the_deadline(this: Round, events: list[Event]) -> None:
    played = play(this, events)
    assert played.ended <= this.until
    assert not isinstance(played.decision, Waiting) or this.until == math.inf


@given(rounds(), timelines())
def test_without_a_deadline_it_waits_for_those_alone_that_have_not_left(this: Round, events: list[Event]) -> None:
    decision = play(this, events).decision
    if isinstance(decision, Waiting):
        gone = {event.client for event in events}
        assert decision.missing == tuple(client for client in this.asked if client not in gone)


@given(rounds(), timelines())
def test_it_closes_with_those_that_were_counted_each_once_and_enough(this: Round, events: list[Event]) -> None:
    played = play(this, events)
    counted = [event.client for event, arrival in played.arrivals if arrival.outcome == "counted"]
    assert len(set(counted)) == len(counted) and set(counted) <= set(this.asked)
    if isinstance(played.decision, Closed):
        assert sorted(counted) == list(played.decision.members)
        assert this.minimum <= len(counted) <= this.goal
    if isinstance(played.decision, Void):
        assert len(counted) < this.minimum
    if isinstance(played.decision, Closed | Void):
        assert set(played.decision.missing) == set(this.asked) - set(counted)


@given(rounds(), timelines())
def test_it_ends_neither_before_it_may_nor_after_it_must(this: Round, events: list[Event]) -> None:
    """By a second account of the rules: who has come and who has gone before each moment."""
    played = play(this, events)
    for at in sorted({this.began, *(event.at for event in events)}):
        before = [event for event in events if event.at <= at]
        came = {event.client for event in before if event.kind == "arrives"} & set(this.asked)
        gone = {event.client for event in before if event.kind == "leaves"} - came
        waited = set(this.asked) - came - gone
        done = len(came) >= this.goal or not waited or len(came) + len(waited) < this.minimum
        if at < played.ended:
            assert not done and at < this.until
        elif at == played.ended:
            assert done or at == this.until


@given(rounds(), timelines())
def test_who_comes_after_the_end_is_late_or_known(this: Round, events: list[Event]) -> None:
    played = play(this, events)
    counted: set[str] = set()
    for event, arrival in played.arrivals:
        expected = (
            "unasked"
            if event.client not in this.asked
            else "again"
            if event.client in counted
            else "late"
            if event.at > played.ended or event.at >= this.until
            else "counted"
        )
        assert arrival.outcome == expected
        assert bool(arrival.line) == (arrival.outcome in ("late", "unasked"))
        counted |= {event.client} if arrival.outcome == "counted" else set()


@given(rounds(), timelines())
def test_a_replay_decides_the_same(this: Round, events: list[Event]) -> None:
    assert play(this, events) == play(this, events)


def four(minimum: int = 2, goal: int = 3, deadline: float = 60.0) -> Round:
    rules = Rules(minimum=minimum, deadline=deadline)
    return begin(rules, Asked(("a", "b", "c", "d"), goal), Draw(0, 7, 1), 1000.0)


def counted(this: Round, clients: str, now: float = 1001.0) -> Round:
    for client in clients:
        this, arrival = arrive(this, client, this.key, now)
        assert arrival == Arrival("counted")
    return this


def test_the_goal_closes_it_and_the_fourth_is_late() -> None:
    this = counted(four(), "dba")
    assert decide(this, 1002.0) == Closed(("a", "b", "d"), ("c",))
    assert arrive(this, "c", this.key, 1002.0) == (
        this,
        Arrival("late", "round 7 was over when c arrived, 2.0 s after it began: its update is ignored"),
    )
    assert arrive(this, "a", this.key, 1002.0) == (this, Arrival("again"))


def test_until_then_it_waits_for_all_that_were_asked() -> None:
    assert decide(counted(four(), "ab"), 1059.9) == Waiting(1060.0, ("c", "d"))


def test_the_deadline_closes_it_with_the_minimum() -> None:
    this = counted(four(), "ab")
    assert decide(this, 1060.0) == Closed(("a", "b"), ("c", "d"))
    assert arrive(this, "c", this.key, 1060.0)[1].outcome == "late"  # even if nobody has looked at the clock before


def test_below_the_minimum_the_deadline_voids_it_and_says_who_was_missing() -> None:
    assert decide(leave(counted(four(), "a"), ["c"]), 1060.0) == Void(
        "round 7, attempt 2 is void and repeated: 1 of at least 2 clients arrived "
        "within the 60 s of rounds.participation.deadline; "
        "missing: b, c (left), d. Raise rounds.participation.deadline or lower "
        "rounds.participation.minimum if that happens often",
        ("b", "c", "d"),
    )


def test_when_the_minimum_cannot_be_met_any_more_it_is_void_at_once() -> None:
    this = counted(four(), "a")
    assert isinstance(decide(leave(this, ["b", "c"]), 1002.0), Waiting)
    void = decide(leave(this, ["b", "c", "d"]), 1002.0)
    assert isinstance(void, Void) and "and no more can; missing: b (left), c (left), d (left)" in void.line


def test_who_leaves_after_arriving_counts_and_so_does_who_comes_back_in_time() -> None:
    this = counted(leave(counted(four(), "ab"), ["a", "c", "stranger"]), "c")
    assert decide(this, 1002.0) == Closed(("a", "b", "c"), ("d",))


def test_without_a_deadline_it_ends_when_all_others_have_left() -> None:
    this = counted(four(goal=4, deadline=math.inf), "ab")
    assert decide(this, 1e9) == Waiting(math.inf, ("c", "d"))
    assert decide(leave(this, ["c", "d"]), 1e9) == Closed(("a", "b"), ("c", "d"))


def test_updates_for_other_rounds_do_not_count_for_this_one() -> None:
    this = four()
    for key, outcome in [((6, 0), "late"), ((7, 0), "late"), ((7, 2), "unasked"), ((8, 0), "unasked")]:
        same, arrival = arrive(this, "a", key, 1001.0)
        assert same == this and arrival.outcome == outcome and f"round {key[0]}, attempt {key[1] + 1}" in arrival.line


def test_who_has_joined_meanwhile_takes_part_in_the_next() -> None:
    this, arrival = arrive(four(), "newcomer", (7, 1), 1001.0)
    assert this == four()
    assert arrival == Arrival("unasked", "round 7 goes on without newcomer: take part in the next that asks")
