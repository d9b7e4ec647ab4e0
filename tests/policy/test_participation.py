"""So many are asked as the rules say, never too few, and everybody in the long run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.policy.history import History, Seen
from splitllm.policy.oort import Settings
from splitllm.policy.participation import POLICIES, Asked, Rules, TooFew, select, wanted
from splitllm.policy.sampling import Draw

CROWD = [f"client-{number}" for number in range(20)]
draws = st.builds(Draw, st.integers(0, 99), st.integers(1, 99), st.integers(0, 3))
rules = st.builds(
    Rules,
    policy=st.sampled_from(sorted(POLICIES)),
    share=st.sampled_from([0.01, 0.1, 0.3, 0.5, 1.0]),
    count=st.none() | st.integers(1, 25),
    over=st.sampled_from([1.0, 1.1, 1.3, 2.0]),
    minimum=st.integers(1, 6),
)
crowds = st.lists(st.sampled_from(CROWD), unique=True)
seen = st.builds(Seen, st.none() | st.floats(0, 100), st.floats(0, 60), st.integers(1, 50), st.integers(0, 9))
histories = st.builds(History, st.dictionaries(st.sampled_from(CROWD), seen))


@pytest.mark.parametrize(
    ("share", "count", "minimum", "there", "goal"),
    [
        (0.1, None, 1, 30, 3),
        (0.1, None, 1, 31, 4),
        (0.07, None, 1, 100, 7),
        (0.01, None, 1, 5, 1),
        (0.01, None, 3, 5, 3),
        (1.0, None, 1, 7, 7),
        (1.0, 4, 1, 7, 4),
        (1.0, 9, 1, 7, 7),
    ],
)
def test_the_goal(share: float, count: int | None, minimum: int, there: int, goal: int) -> None:
    rules = Rules("random", share, count, minimum=minimum)
    assert wanted(rules, there) == goal
    found = select(rules, [f"client-{number}" for number in range(there)], Draw(0, 1))
    assert isinstance(found, Asked) and len(found.clients) == goal


@pytest.mark.parametrize("policy", ["random", "oort"])
@pytest.mark.parametrize(("over", "asked"), [(1.0, 10), (1.1, 11), (1.25, 13), (1.3, 13), (3.0, 20)])
def test_more_are_asked_than_are_wanted(policy: str, over: float, asked: int) -> None:
    found = select(Rules(policy, count=10, over=over), CROWD, Draw(0, 1))
    assert isinstance(found, Asked) and (len(found.clients), found.goal) == (asked, 10)


def test_poisson_asks_so_many_on_average_if_a_count_is_given() -> None:
    found = [select(Rules("poisson", count=5), CROWD, Draw(0, number)) for number in range(1, 401)]
    sizes = [len(one.clients) for one in found if isinstance(one, Asked)]
    assert sum(sizes) / 400 == pytest.approx(5, abs=0.4) and max(sizes) > 8


def test_oort_goes_by_what_is_known_and_by_its_settings() -> None:
    known = History({client: Seen(float(client == CROWD[7]), 1.0, 90) for client in CROWD})
    rules = Rules("oort", count=1, oort=Settings(explore=0.0, floor=0.0))
    assert {select(rules, CROWD, Draw(0, number), known) for number in range(100, 130)} == {Asked((CROWD[7],), 1)}


def test_all_are_all() -> None:
    assert select(Rules("all", share=0.1, over=1.3), CROWD, Draw(0, 1)) == Asked(tuple(CROWD), 20)


def test_with_too_few_no_round_begins_and_the_remedy_is_said() -> None:
    assert select(Rules(minimum=3), ["client-1", "client-4"], Draw(0, 7)) == TooFew(
        "round 7 cannot begin: 2 of the at least 3 clients of rounds.participation.minimum "
        "are there (client-1, client-4): "
        "start more clients, or lower rounds.participation.minimum"
    )
    none = select(Rules(), [], Draw(0, 7))
    assert isinstance(none, TooFew) and "(nobody)" in none.line


def test_poisson_that_draws_too_few_is_drawn_again() -> None:
    found = [select(Rules("poisson", 0.2, minimum=4), CROWD, Draw(0, 1, attempt)) for attempt in range(50)]
    failed = [one for one in found if isinstance(one, TooFew)]
    assert failed and len(failed) < 50 and all(one.redraw and "were drawn" in one.line for one in failed)


@given(rules, crowds, draws, histories)
def test_what_is_asked_is_within_the_rules(rules: Rules, crowd: list[str], draw: Draw, history: History) -> None:
    found = select(rules, crowd, draw, history)
    if isinstance(found, TooFew):
        assert found.redraw == (len(crowd) >= rules.minimum) and (not found.redraw or rules.policy == "poisson")
        return
    assert found.clients == tuple(one for one in crowd if one in found.clients)  # each once, in their order
    assert rules.minimum <= found.goal <= len(found.clients) <= len(crowd)
    if rules.policy in ("random", "oort"):
        most = -(-int(rules.over * 10) * found.goal // 10)
        assert found.goal == wanted(rules, len(crowd)) and len(found.clients) == min(most, len(crowd))


@given(rules, crowds, draws, histories, st.randoms())
def test_the_same_is_decided_again_whatever_the_order(
    rules: Rules, crowd: list[str], draw: Draw, history: History, rng
) -> None:
    first, second = (select(rules, one, draw, history) for one in (crowd, rng.sample(crowd, len(crowd))))
    if isinstance(first, Asked):
        assert isinstance(second, Asked)
        assert (set(first.clients), first.goal) == (set(second.clients), second.goal)


@given(crowds.filter(lambda crowd: len(crowd) > 4), draws)
def test_another_attempt_or_round_asks_others(crowd: list[str], draw: Draw) -> None:
    later = [Draw(draw.seed, draw.number, draw.attempt + more) for more in range(40)]
    assert len({select(Rules("random", count=2), crowd, one) for one in later}) > 1


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_everybody_is_asked_in_the_long_run(policy: str) -> None:
    """Also the slow ones and those without utility, whom Oort knows."""
    known = {client: Seen(float(number), 1 + 10.0 * number, 1) for number, client in enumerate(CROWD)}
    asked: set[str] = set()
    for number in range(100, 300):
        found = select(Rules(policy, share=0.1), CROWD, Draw(0, number), History(known))
        asked |= set(found.clients) if isinstance(found, Asked) else set()
    assert asked == set(CROWD)
