"""The tree of roles: names, parents, children, and which clients hang on whom."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import RecipeError
from splitllm.recipe import (
    DataRecipe,
    ModelRecipe,
    Recipe,
    SplitRecipe,
    children_of,
    clients_below,
    command_of,
    parent_of,
    role_names,
    tier_of,
)


def test_the_roles_are_a_tree(recipe_with) -> None:
    recipe = recipe_with("split.tiers={c: 5, edge: 3, hub: 2, cloud: 1}", "split.cuts=[1, 2, 3]")
    assert role_names(recipe) == {
        "c": ["c-0", "c-1", "c-2", "c-3", "c-4"],
        "edge": ["edge-0", "edge-1", "edge-2"],
        "hub": ["hub-0", "hub-1"],
        "cloud": ["cloud"],
    }
    assert [parent_of(recipe, f"c-{n}") for n in range(5)] == ["edge-0", "edge-0", "edge-1", "edge-1", "edge-2"]
    assert [parent_of(recipe, f"edge-{n}") for n in range(3)] == ["hub-0", "hub-0", "hub-1"]
    assert (parent_of(recipe, "hub-1"), parent_of(recipe, "cloud")) == ("cloud", None)
    assert (children_of(recipe, "hub-0"), children_of(recipe, "edge-2")) == (["edge-0", "edge-1"], ["c-4"])
    assert (children_of(recipe, "cloud"), children_of(recipe, "c-0")) == (["hub-0", "hub-1"], [])
    assert (tier_of(recipe, "c-4"), tier_of(recipe, "cloud")) == ((0, 4), (3, 0))
    commands = {"c-0": "client", "edge-2": "edge", "hub-0": "edge", "cloud": "cloud"}
    assert {name: command_of(recipe, name) for name in commands} == commands
    below = {name: clients_below(recipe, name) for name in ("cloud", "hub-0", "hub-1", "edge-1", "c-3")}
    assert below == {"cloud": [0, 1, 2, 3, 4], "hub-0": [0, 1, 2, 3], "hub-1": [4], "edge-1": [2, 3], "c-3": [3]}


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4).map(lambda counts: [*sorted(counts, reverse=True), 1]))
def test_every_role_but_the_top_is_a_child_of_its_parent_and_of_nobody_else(counts: list[int]) -> None:
    tiers = {f"t-{number}x": count for number, count in enumerate(counts)}
    split = SplitRecipe(tiers=tiers, cuts=tuple(range(1, len(counts))), labels="client")
    recipe = Recipe(model=ModelRecipe(base="b"), split=split, data=DataRecipe(source="x"))
    names = [name for tier in role_names(recipe).values() for name in tier]
    assert len(set(names)) == len(names) == sum(counts)
    for number, tier in enumerate(role_names(recipe).values()):
        assert [tier_of(recipe, name) for name in tier] == [(number, index) for index in range(len(tier))]
        owned = [clients_below(recipe, name) for name in tier]
        assert sorted(client for clients in owned for client in clients) == list(range(counts[0])) and all(owned)
    for name in names:
        assert all(parent_of(recipe, child) == name for child in children_of(recipe, name))
        parent = parent_of(recipe, name)
        assert parent is None or name in children_of(recipe, parent)


@pytest.mark.parametrize(
    "name", ["edge", "edge-2", "edge-00", "edge--1", "edge-\u0661", "cloud-0", "client", "", "x-0"]
)
def test_an_unknown_role_is_refused_with_the_known_ones(recipe_with, name: str) -> None:
    recipe = recipe_with("split.tiers.client=5")
    for ask in (tier_of, parent_of, children_of, clients_below):
        with pytest.raises(RecipeError) as caught:
            ask(recipe, name)
        known = "client-0 to client-4, edge-0, edge-1, cloud"
        assert str(caught.value) == f"name {name!r}: split.tiers has no such role; use one of {known}"
