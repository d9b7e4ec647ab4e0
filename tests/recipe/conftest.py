"""A recipe of three tiers, with overrides."""

from collections.abc import Callable
from pathlib import Path

import pytest

from splitllm.recipe import Recipe, load_recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def recipe_with(tmp_path_factory: pytest.TempPathFactory) -> MakeRecipe:
    path: Path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(
        "model: {base: base}\n"
        "split: {tiers: {client: 4, edge: 2, cloud: 1}, cuts: [2, 4], labels: client}\n"
        "data: {source: rows.jsonl}\n"
    )
    return lambda *overrides: load_recipe(path, overrides)
