"""What does not go with tiers that train in full is refused in one line; what does has the blocks of these tiers."""

from __future__ import annotations

import pytest

from splitllm.errors import RecipeError
from splitllm.recipe import full_blocks
from tests.recipe.conftest import MakeRecipe

EDGE = "train.full_tiers=[edge]"
WRONG = [
    (["train.full_tiers=[client]"], "'client' is the clients' tier, which trains adapters; use some of edge, cloud"),
    (["train.full_tiers=[fog]"], "'fog' is not a tier of split.tiers; use some of edge, cloud"),
    ([EDGE, "split={tiers: {client: 2}, labels: client}"], "with one tier there is none; leave it out"),
    ([EDGE, "lora.tiers=[client, edge]"], "'edge' is in lora.tiers, too; leave it out of one of the two"),
    ([EDGE, "quantization={edge: nf4}"], "trains weights, and quantization.edge rounds them; leave one of the two"),
    ([EDGE, "model.dtype=bfloat16"], "use model.dtype: float32 with train.mixed_precision: bf16, or leave"),
    ([EDGE, "lora.adapters=per_client"], "trains one copy for all clients, and lora.adapters is per_client; use"),
    ([EDGE, "rounds={replicas: local, cloud_every: 2}"], "is not averaged in rounds, which are of adapters; use"),
    ([EDGE, "split.client_cuts={client-1: 1}"], "needs blocks that one tier alone holds, and with split.client_cuts"),
    ([EDGE, "server.zero.stage=3"], "trains what server.zero.stage: 3 holds frozen; use server.zero.stage: 1 or 2"),
    ([EDGE, "server.fsdp=true"], "trains what server.fsdp holds frozen; use server.zero.stage: 1 or 2"),
]


@pytest.mark.parametrize(("overrides", "expected"), WRONG, ids=[" ".join(each) for each, _ in WRONG])
def test_what_does_not_go_with_it_is_refused(recipe_with: MakeRecipe, overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_with(*overrides)
    found = [problem for problem in refused.value.problems if problem.startswith("train.full_tiers: ")]
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("words", "blocks"),
    [
        ([], set()),
        ([EDGE], {2, 3}),
        (["train.full_tiers=[edge, cloud]", "quantization={client: nf4}"], {2, 3, 4, 5}),
        ([EDGE, "lora.tiers=[client]", "server.zero={stage: 2, offload_optimizer: cpu}"], {2, 3}),
    ],
)
def test_blocks_are_those_of_the_tiers(recipe_with: MakeRecipe, words: list[str], blocks: set[int]) -> None:
    assert full_blocks(recipe_with(*words), 6) == blocks
