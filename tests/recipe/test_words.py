"""What a recipe may say is what the code can do: every word of the schema has its row in a table, and the other way."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel
from transformers import SchedulerType

from splitllm.data.formats import FORMATS
from splitllm.deployment import bounds
from splitllm.errors import RecipeError
from splitllm.federated.aggregate import RULES
from splitllm.federated.outer import STEPS
from splitllm.federated.rounds import ANY_RANK
from splitllm.model import trainable
from splitllm.policy.participation import POLICIES
from splitllm.privacy import fixedpoint
from splitllm.recipe import load_recipe
from splitllm.recipe.rounds import ONE_SHAPE, ONLY_FACTORS, WITH_FROZEN
from splitllm.recipe.schema import (
    DataRecipe,
    ModelRecipe,
    OptimizerRecipe,
    OuterRecipe,
    ParticipationRecipe,
    RoundsRecipe,
    ScheduleRecipe,
    SecureRecipe,
)
from splitllm.roles.adapters import DTYPES
from splitllm.wire.codecs import CODECS, codec
from tests.tiny import write_recipe


@pytest.mark.parametrize(
    ("section", "key", "table"),
    [
        (RoundsRecipe, "rule", RULES),
        (OuterRecipe, "name", {"none", *STEPS}),
        (ParticipationRecipe, "policy", POLICIES),
        (SecureRecipe, "bits", fixedpoint._TYPES),
        (SecureRecipe, "bits", bounds._WORDS),
        (OptimizerRecipe, "name", trainable._OPTIMIZERS),
        (ModelRecipe, "dtype", DTYPES),
        (DataRecipe, "format", FORMATS),
    ],
)
def test_a_key_takes_the_words_of_its_table(section: type[BaseModel], key: str, table: Collection[Any]) -> None:
    assert set(get_args(section.model_fields[key].annotation)) == set(table)


def test_schedules_are_those_of_transformers() -> None:
    assert {*get_args(ScheduleRecipe.model_fields["name"].annotation)} <= {kind.value for kind in SchedulerType}


def test_every_rule_needs_one_shape_or_takes_any_rank() -> None:
    assert {*ONE_SHAPE} | ANY_RANK == {*RULES} and not {*ONE_SHAPE} & ANY_RANK
    assert {*ONLY_FACTORS} | {*WITH_FROZEN} <= {*RULES} and not {*ONLY_FACTORS} & {*WITH_FROZEN}


def test_a_recipe_takes_every_codec_and_no_other(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    for name in (*CODECS, "topk:0.05"):
        recipe = load_recipe(path, [f"wire.up={name}"])
        assert codec(recipe.wire.up).size((4, 4), torch.float32) > 0
    with pytest.raises(RecipeError):
        load_recipe(path, ["wire.up=int3"])
