"""Which blocks each role holds, and whose adapter trains them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.recipe import (
    Recipe,
    client_cuts,
    goes_by_lanes,
    holders,
    lora_of,
    own_blocks,
    role_bounds,
    sharing,
    tier_bounds,
)

LAYERS = 6
RecipeWith = Callable[..., Recipe]
TREE = ("split.tiers={client: 3, edge: 1, cloud: 1}", "split.cuts=[2, 4]")


def test_a_client_may_be_cut_elsewhere_and_the_tier_above_begins_with_the_first(recipe_with: RecipeWith) -> None:
    recipe = recipe_with(*TREE, "split.client_cuts={client-0: 3, client-2: 1}")
    assert client_cuts(recipe) == [3, 2, 1]
    assert tier_bounds(recipe, LAYERS) == [(0, 3), (1, 4), (4, 6)]
    assert role_bounds(recipe, LAYERS) == {
        "client-0": (0, 3),
        "client-1": (0, 2),
        "client-2": (0, 1),
        "edge": (1, 4),
        "cloud": (4, 6),
    }


def test_blocks_that_clients_and_the_tier_above_hold_are_counted_for_all_of_them(recipe_with: RecipeWith) -> None:
    recipe = recipe_with(*TREE, "split.client_cuts={client-0: 3, client-2: 1}")
    assert holders(recipe, LAYERS) == [3, 2 + 1, 1 + 1, 1, 1, 1]
    assert holders(recipe_with(*TREE), LAYERS) == [3, 3, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("adapters", "own", "together"),
    [("shared", 0, [3, 3, 2, 1, 1, 1]), ("per_client", 6, [0] * 6), ("common", 3, [0, 0, 0, 1, 1, 1])],
)
def test_whose_adapter_trains_a_block(adapters: str, own: int, together: list[int], recipe_with: RecipeWith) -> None:
    recipe = recipe_with(*TREE, "split.client_cuts={client-0: 3}", f"lora.adapters={adapters}")
    assert own_blocks(recipe, LAYERS) == range(own)
    assert holders(recipe, LAYERS) == together


def test_who_holds_the_same_can_exchange_its_state(recipe_with: RecipeWith) -> None:
    assert [sharing(recipe_with(*TREE), name) for name in ("client-1", "edge")] == ["client", "edge"]
    for word in ("split.client_cuts={client-0: 3}", "lora.adapters=per_client", "lora.adapters=common"):
        assert sharing(recipe_with(*TREE, word), "client-1") == "client-1"


def test_clients_of_a_continuous_deployment_have_lanes(recipe_with: RecipeWith) -> None:
    assert goes_by_lanes(recipe_with(*TREE, "lora.adapters=per_client", "server.batching=continuous"))
    assert not goes_by_lanes(recipe_with(*TREE, "lora.adapters=per_client", "server.batching=synchronous"))


def test_a_clients_own_adapter_differs_in_what_is_said_of_it(recipe_with: RecipeWith) -> None:
    words = ("lora.adapters=per_client", "lora.rank=4", "lora.alpha=8", "lora.clients={client-1: {rank: 2}}")
    recipe = recipe_with(*TREE, *words)
    assert [(lora_of(recipe, client).rank, lora_of(recipe, client).alpha) for client in range(3)] == [
        (4, 8),
        (2, 8),
        (4, 8),
    ]


@given(st.data())
def test_every_block_is_held_once_on_the_way_of_every_client(data: st.DataObject) -> None:
    clients, edges = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    low = data.draw(st.integers(1, 5))
    high = data.draw(st.integers(low + 1, 7))
    names = ["client"] if clients == 1 else [f"client-{number}" for number in range(clients)]
    cuts = data.draw(st.dictionaries(st.sampled_from(names), st.integers(1, high - 1)))
    adapters = data.draw(st.sampled_from(["shared", "per_client", "common"]))
    tiers = {"client": clients, "edge": min(edges, clients), "cloud": 1}
    raw = {
        "model": {"base": "base"},
        "split": {"tiers": tiers, "cuts": [low, high], "client_cuts": cuts, "labels": "cloud"},
        "lora": {"adapters": adapters},
        "data": {"source": "rows"},
    }
    recipe = Recipe.model_validate(raw)
    layers = high + 1
    bounds = role_bounds(recipe, layers)
    for name, cut in zip(names, client_cuts(recipe), strict=True):
        assert bounds[name] == (0, cut) and cut == cuts.get(name, low)
    edge = tier_bounds(recipe, layers)[1]
    assert edge[0] == min(client_cuts(recipe)) and edge[1] == high == tier_bounds(recipe, layers)[2][0]
    deepest = max(client_cuts(recipe))
    assert len(own_blocks(recipe, layers)) == {"shared": 0, "per_client": layers, "common": deepest}[adapters]
    together = holders(recipe, layers)
    for block in range(layers):
        held = sum(start <= block < stop for start, stop in bounds.values())
        assert together[block] == (0 if block in own_blocks(recipe, layers) else held)
