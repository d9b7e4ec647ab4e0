"""The state from which a run goes on: there always is one, it is the newest that all can have, and one of a kind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitllm.errors import CheckpointError
from splitllm.roles.recovery import Decision, Standing, State, decide, standings_from_json
from tests.grids import counts

TREE = {"cloud": None, "edge-0": "cloud", "edge-1": "cloud", "client-0": "edge-0", "client-1": "edge-0"} | {
    "client-2": "edge-1"
}
CLIENTS = [role for role in TREE if role.startswith("client")]
KEPT = 2


def tier(role: str) -> str:
    return role.split("-")[0]


def standing(role: str, *states: State | int) -> Standing:
    """Mere numbers are of one generation."""
    return Standing(
        tier(role), tuple((state, "7" if state else "new") if isinstance(state, int) else state for state in states)
    )


def branches(clients: set[str]) -> set[str]:
    """Clients with the roles above them."""
    edges = {str(TREE[client]) for client in clients}
    return {"cloud"} | edges | clients


@dataclass
class Journals:
    """Roles that commit: the top when all members are at the same step, every other once the role above it has.

    A journal holds states as they are known, and beside each what it truly is: whom every step before was made with.
    """

    members: set[str] = field(default_factory=lambda: set(TREE))
    generation: int = 7000
    kept: dict[str, list[tuple[State, str]]] = field(default_factory=lambda: {r: [((0, "new"), "")] for r in TREE})

    def newest(self, role: str) -> int:
        return self.kept[role][-1][0][0]

    def may_commit(self) -> list[str]:
        level = len({self.newest(role) for role in self.members}) == 1
        parents = {role: TREE[role] for role in sorted(self.members)}
        return [
            r for r, parent in parents.items() if (level if parent is None else self.newest(parent) > self.newest(r))
        ]

    def commit(self, role: str) -> None:
        step = self.newest(role) + 1
        made = self.kept[role][-1][1] + "|" + ",".join(sorted(self.members & set(CLIENTS)))
        self.kept[role] = [*self.kept[role], ((step, str(self.generation)), made)][-KEPT:]

    def standings(self, members: set[str]) -> dict[str, Standing]:
        kept = {role: [state for state, _ in reversed(self.kept[role])] for role in TREE if role in members}
        return {role: standing(role, *states) for role, states in kept.items()}

    def join(self, members: set[str]) -> Decision:
        """A generation of these begins, and all of them are in the same state."""
        decision = decide(self.standings(members))
        self.members, self.generation = members, self.generation + 1
        state = (decision.step, decision.origin)
        for role in members - set(decision.lacking):
            self.kept[role] = [entry for entry in self.kept[role] if entry[0][0] <= decision.step]
        for role in decision.lacking:
            donor = self.kept[decision.donors[tier(role)]]
            assert donor[-1][0] == state
            self.kept[role] = [*(entry for entry in self.kept[role] if entry[0][0] < decision.step), donor[-1]][-KEPT:]
        assert {self.kept[role][-1][0] for role in members} == {state}
        return decision


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whenever_roles_are_killed_they_have_a_newest_common_step(data: st.DataObject) -> None:
    journals = Journals()
    for _ in range(data.draw(st.integers(0, 40))):
        if data.draw(st.integers(0, 5)) == 0:  # somebody is killed: the generation is over
            journals.join(set(TREE))
        journals.commit(data.draw(st.sampled_from(journals.may_commit())))
    newest = [journals.newest(role) for role in TREE]
    assert max(newest) - min(newest) <= 1
    decision = journals.join(set(TREE))
    assert (decision.step, decision.donors, decision.lacking) == (min(newest), {}, ())


@pytest.mark.parametrize("count", counts(100, 600))
def test_whoever_leaves_and_returns_whenever_all_go_on_from_the_same_weights(count: int) -> None:
    @settings(max_examples=count)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        journals = Journals()
        for _ in range(data.draw(st.integers(0, 40))):
            if data.draw(st.integers(0, 4)) == 0:
                stays = data.draw(st.sets(st.sampled_from(CLIENTS), min_size=1))
                try:
                    journals.join(branches(stays))
                except CheckpointError:  # the only edge that still has the state is away: they wait for it
                    continue
                assert len({journals.kept[role][-1][1] for role in journals.members}) == 1, journals.kept
            journals.commit(data.draw(st.sampled_from(journals.may_commit())))
        journals.join(set(TREE))  # whoever was away returns
        assert len({kept[-1][1] for kept in journals.kept.values()}) == 1, journals.kept

    check()


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
    assert decide(standings) == Decision(9, "7", {"client": "client-1"}, ("client-0",))


def test_a_step_that_was_run_again_without_a_role_is_not_the_one_that_it_kept() -> None:
    before: State = (3, "7000")
    standings = {"cloud": standing("cloud", (4, "7002"), before), "client-0": standing("client-0", (4, "7001"), before)}
    standings["client-1"] = standing("client-1", (4, "7002"), before)
    assert decide(standings) == Decision(3, "7000", {}, ())
    standings["cloud"] = standing("cloud", (5, "7002"), (4, "7002"))
    assert decide(standings) == Decision(4, "7002", {"client": "client-1"}, ("client-0",))


def test_one_that_starts_from_another_adapter_gets_that_of_its_tier_or_nobody_starts() -> None:
    standings = {"cloud": standing("cloud", 0), "client-0": standing("client-0", (0, "c0ffee"))}
    with pytest.raises(CheckpointError) as error:
        decide(standings)
    for part in ("client-0: [0 of c0ffee]", "cloud: [0 of new]", "give all the same lora.start_from"):
        assert part in str(error.value)
    standings["client-1"] = standing("client-1", 0)
    assert decide(standings) == Decision(0, "new", {"client": "client-1"}, ("client-0",))


def test_the_only_role_of_a_tier_cannot_be_replaced() -> None:
    standings = {"cloud": standing("cloud", 9, 8), "edge": standing("edge", 0), "client-0": standing("client-0", 9, 8)}
    with pytest.raises(CheckpointError, match=r"edge: \[0\].*bring back the journals that are missing"):
        decide(standings)


@given(st.fixed_dictionaries(dict.fromkeys(TREE, steps)))
def test_standings_travel_unchanged(kept: dict[str, tuple[int, ...]]) -> None:
    standings = {role: standing(role, *steps) for role, steps in kept.items()}
    sent = json.dumps({role: one.to_json() for role, one in standings.items()})
    assert standings_from_json(json.loads(sent)) == standings
