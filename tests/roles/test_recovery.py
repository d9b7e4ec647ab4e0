"""The step from which a run goes on: there always is one, and it is the newest that all can have."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitllm.errors import CheckpointError
from splitllm.roles.recovery import Decision, Standing, decide, standings_from_json

TREE = {"cloud": None, "edge-0": "cloud", "edge-1": "cloud", "client-0": "edge-0", "client-1": "edge-0"} | {
    "client-2": "edge-1"
}
KEPT = 2


def tier(role: str) -> str:
    return role.split("-")[0]


def standing(role: str, *steps: int) -> Standing:
    return Standing(tier(role), steps)


class Journals:
    """Roles that commit: the top when all are at the same step, every other once the role above it has."""

    def __init__(self) -> None:
        self.kept = {role: [0] for role in TREE}

    def may_commit(self) -> list[str]:
        newest = {role: max(steps) for role, steps in self.kept.items()}
        level = len(set(newest.values())) == 1
        return [r for r, parent in TREE.items() if (level if parent is None else newest[parent] > newest[r])]

    def commit(self, role: str) -> None:
        self.kept[role] = [*self.kept[role], max(self.kept[role]) + 1][-KEPT:]

    def standings(self) -> dict[str, Standing]:
        return {role: standing(role, *reversed(steps)) for role, steps in self.kept.items()}

    def go_back(self, step: int) -> None:
        self.kept = {role: [kept for kept in steps if kept <= step] for role, steps in self.kept.items()}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whenever_roles_are_killed_they_have_a_newest_common_step(data: st.DataObject) -> None:
    journals = Journals()
    for _ in range(data.draw(st.integers(0, 40))):
        if data.draw(st.integers(0, 5)) == 0:  # somebody is killed: the generation is over
            decision = decide(journals.standings())
            journals.go_back(decision.step)
        journals.commit(data.draw(st.sampled_from(journals.may_commit())))
    decision = decide(journals.standings())
    newest = [max(steps) for steps in journals.kept.values()]
    assert max(newest) - min(newest) <= 1
    assert decision == Decision(min(newest), {}, ())
    journals.go_back(decision.step)
    assert all(max(steps) == decision.step for steps in journals.kept.values())


steps = st.sets(st.integers(0, 6), min_size=1, max_size=3).map(lambda found: tuple(sorted(found, reverse=True)))


@given(st.fixed_dictionaries(dict.fromkeys(TREE, steps)))
def test_whoever_lacks_the_step_gets_it_from_its_tier_or_the_roles_are_named(kept: dict[str, tuple[int, ...]]) -> None:
    standings = {role: standing(role, *steps) for role, steps in kept.items()}
    held = {tier(role): {s for r in TREE if tier(r) == tier(role) for s in kept[r]} for role in TREE}
    possible, common = set.intersection(*held.values()), set.intersection(*map(set, kept.values()))
    if not possible:
        with pytest.raises(CheckpointError) as error:
            decide(standings)
        text = str(error.value)
        assert "\n" not in text and all(f"{role}: {sorted(steps)}" in text for role, steps in kept.items())
        return
    decision = decide(standings)
    assert decision.step == max(common or possible)
    assert decision.lacking == tuple(sorted(role for role in TREE if decision.step not in kept[role]))
    assert set(decision.donors) == {tier(role) for role in decision.lacking}
    for of_tier, donor in decision.donors.items():
        assert tier(donor) == of_tier and decision.step in kept[donor]


def test_one_that_was_away_for_long_gets_the_state_of_another_of_its_tier() -> None:
    standings = {"cloud": standing("cloud", 9, 8), "client-0": standing("client-0", 3, 2)}
    standings |= {"client-1": standing("client-1", 9, 8), "client-2": standing("client-2", 9, 8)}
    assert decide(standings) == Decision(9, {"client": "client-1"}, ("client-0",))


def test_the_only_role_of_a_tier_cannot_be_replaced() -> None:
    standings = {"cloud": standing("cloud", 9, 8), "edge": standing("edge", 0), "client-0": standing("client-0", 9, 8)}
    with pytest.raises(CheckpointError, match=r"edge: \[0\].*bring back the journals that are missing"):
        decide(standings)


@given(st.fixed_dictionaries(dict.fromkeys(TREE, steps)))
def test_standings_travel_unchanged(kept: dict[str, tuple[int, ...]]) -> None:
    standings = {role: standing(role, *steps) for role, steps in kept.items()}
    sent = json.dumps({role: one.to_json() for role, one in standings.items()})
    assert standings_from_json(json.loads(sent)) == standings
