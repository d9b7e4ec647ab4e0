"""The base model's checkpoint: given, or drawn at random for a study that needs no pretrained one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from splitllm.model.loading import Checkpoint, quiet_transformers
from splitllm.preflight import model_config
from splitllm.recipe import Recipe
from splitllm.roles.assembly import DTYPES
from splitllm.running.world import World


def open_base(recipe: Recipe, directory: Path, world: World) -> Checkpoint:
    """The checkpoint that every shard is read from.

    Args:
        recipe: `model` and `seed` are read.
        directory: of the run; weights that `model.random` asks for are drawn once and kept in `base/` there (what lies
            there before the run's recipe does is left over from a start that failed, and drawn again).
        world: rank 0 draws, the others wait.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    if recipe.model.random is None:
        return Checkpoint(recipe.model.base, recipe.model.revision)
    folder = base_folder(recipe, directory)
    if world.rank == 0 and not ((directory / "recipe.yaml").exists() and Path(folder).exists()):
        _draw(recipe, Path(folder))
    world.wait()
    return Checkpoint(folder)


def base_folder(recipe: Recipe, directory: Path) -> str:
    """The name under which Hugging Face loads the unsplit base."""
    return recipe.model.base if recipe.model.random is None else str(directory / "base")


def _draw(recipe: Recipe, folder: Path) -> None:
    temporary = folder.with_name(".base.writing")
    for leftover in (temporary, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    torch.manual_seed(recipe.seed)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(model_config(recipe), dtype=DTYPES[recipe.model.dtype])
        model.save_pretrained(temporary)
    os.replace(temporary, folder)
