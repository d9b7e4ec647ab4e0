"""What the user asks for: the recipe, read from YAML with overrides. Loads no torch."""

from splitllm.recipe.loading import changed_keys, dump_recipe, load_recipe, what_leaves_the_device
from splitllm.recipe.schema import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimizerRecipe,
    PartitionRecipe,
    Recipe,
    ScheduleRecipe,
    SplitRecipe,
    TrainRecipe,
)

__all__ = [
    "DataRecipe",
    "LoraRecipe",
    "ModelRecipe",
    "OptimizerRecipe",
    "PartitionRecipe",
    "Recipe",
    "ScheduleRecipe",
    "SplitRecipe",
    "TrainRecipe",
    "changed_keys",
    "dump_recipe",
    "load_recipe",
    "what_leaves_the_device",
]
