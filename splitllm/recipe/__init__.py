"""What the user asks for: the recipe, read from YAML with overrides. Loads no torch."""

from splitllm.recipe.addresses import host_and_port
from splitllm.recipe.digest import fingerprint, start_digest
from splitllm.recipe.loading import (
    changed_keys,
    dump_recipe,
    load_recipe,
    what_leaves_in_a_deployment,
    what_leaves_the_device,
)
from splitllm.recipe.roles import children_of, clients_below, parent_of, role_in_tier, role_names, tier_of
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
    WireRecipe,
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
    "WireRecipe",
    "changed_keys",
    "children_of",
    "clients_below",
    "dump_recipe",
    "fingerprint",
    "host_and_port",
    "load_recipe",
    "parent_of",
    "role_in_tier",
    "role_names",
    "start_digest",
    "tier_of",
    "what_leaves_in_a_deployment",
    "what_leaves_the_device",
]
