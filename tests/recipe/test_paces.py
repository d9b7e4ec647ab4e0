"""What rounds of clients at their own pace can be had with."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from splitllm.errors import RecipeError
from splitllm.recipe import Recipe, dump_recipe, rounds_line

LOCAL = ["rounds.replicas=local", "rounds.edge_every=2", "rounds.cloud_every=4"]
TREE = ["split.tiers={client: 4, edge: 2, cloud: 1}", "lora.adapters=common"]
PACED = [*LOCAL, *TREE, "server.batching=continuous"]


def test_several_servers_of_a_tier_may_train_what_is_common_where_rounds_average_them(recipe_with: Any) -> None:
    recipe_with(*PACED, "rounds.buffer={size: 2, discount: hinge, oldest: 3}")
    assert Recipe.model_validate(yaml.safe_load(dump_recipe(recipe_with(*PACED)))) == recipe_with(*PACED)
    with pytest.raises(RecipeError, match="which averages them"):
        recipe_with(*TREE, "server.batching=continuous")


def test_the_line_on_rounds_says_who_is_asked_and_waited_for(recipe_with: Any) -> None:
    some = "rounds.participation={policy: random, count: 1, over: 2.0, deadline: 5.0}"
    line = rounds_line(recipe_with(*PACED, some, "rounds.buffer.size=2"))
    assert "random 1 of the clients at a time, 2 times as many asked" in line
    assert "waiting for at most 5 s" in line
    assert "cloud steps after 2 updates, and nobody waits for it" in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            [*LOCAL, "rounds.participation.deadline=5.0"],
            "rounds.participation.deadline: 5.0 needs server.batching: cont",
        ),
        (
            [*LOCAL, "rounds.participation={policy: random, over: 1.3}"],
            "rounds.participation.over: 1.3 needs server.batc",
        ),
        ([*LOCAL, "rounds.buffer.size=1"], "rounds.buffer.size: 1 needs server.batching: continuous"),
        (["rounds.buffer.size=1"], "rounds.buffer: needs rounds.replicas: local"),
        ([*PACED, "lora.adapters=per_client"], "lora.adapters: per_client with server.batching: continuous"),
        (
            [*PACED, "lora.adapters=shared"],
            "above all clients are trained together)",
        ),
        ([*PACED, "rounds.rule=fedex"], "rounds.rule: fedex with server.batching: continuous"),
        ([*PACED, "rounds.rule=rolora"], "use fedavg, ffa, hetlora, trimmed_mean, median"),
        ([*PACED, "rounds.moments=average"], "rounds.moments: average needs rounds that all hold at one step"),
        (
            [*PACED, "rounds.weights=equal", "rounds.secure.aggregate=true"],
            "rounds.secure.aggregate: true needs rounds",
        ),
        ([*PACED, "rounds.weights=equal", "rounds.privacy.clip=1.0"], "rounds.privacy.clip: 1.0 needs rounds that all"),
        ([*PACED, "rounds.exchange=unix:/x"], "rounds.exchange: unix:/x needs rounds that all hold at one step"),
        ([*PACED, "lora.dora=true"], "lora.dora: true needs rounds that all hold at one step"),
        (
            [*PACED, "rounds.participation.over=1.3"],
            "rounds.participation.over: 1.3 with policy: all; use random or oort",
        ),
        ([*PACED, "rounds.buffer.size=3"], "rounds.buffer.size: 3 of the 2 servers below the top; use at most 2"),
        ([*PACED, "rounds.buffer.oldest=3"], "rounds.buffer.oldest: needs rounds.buffer.size; give that, too"),
        ([*PACED, "rounds.buffer.size=2", "rounds.rule=hetlora"], "of one shape, unlike hetlora; use fedavg"),
        ([*PACED, "wire.absent=drop"], "needs wire.absent: wait"),
        ([*PACED, "rounds.participation.over=0.5"], "a number of at least 1"),
    ],
)
def test_what_cannot_be_had_together_is_refused_by_name(recipe_with: Any, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_with(*overrides)
    assert words in str(refused.value)
