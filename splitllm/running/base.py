"""The base model's checkpoint: given, or drawn at random for a study that needs no pretrained one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from splitllm.checkpoint import writing
from splitllm.model.families import set_dropouts
from splitllm.model.loading import Checkpoint, quiet_transformers
from splitllm.preflight import model_config
from splitllm.recipe import Recipe
from splitllm.roles.adapters import DTYPES
from splitllm.running.world import World

BASE, BASE_UNFINISHED = "base", ".base.writing"
MARKER = ".drawn-by-splitllm"  # in a folder of weights that were drawn, and may be drawn again


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
        return _opened(recipe, recipe.model.base)
    folder = base_folder(recipe, directory)
    if world.rank == 0 and not ((directory / "recipe.yaml").exists() and Path(folder).exists()):
        _draw(recipe, Path(folder))
    world.wait()
    return _opened(recipe, folder)


def _opened(recipe: Recipe, name: str) -> Checkpoint:
    checkpoint = Checkpoint(name, recipe.model.revision if recipe.model.random is None else None)
    if recipe.model.dropout is not None:
        set_dropouts(checkpoint.config, recipe.model.dropout)
    return checkpoint


def base_folder(recipe: Recipe, directory: Path) -> str:
    """The name under which Hugging Face loads the unsplit base."""
    return recipe.model.base if recipe.model.random is None else str(directory / BASE)


def is_drawn(folder: Path) -> bool:
    """Whether a run drew the weights in this folder, and not somebody else."""
    return (folder / MARKER).exists()


def _draw(recipe: Recipe, folder: Path) -> None:
    temporary = folder.with_name(BASE_UNFINISHED)
    for leftover in (temporary, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / MARKER).touch()
    torch.manual_seed(recipe.seed)
    with quiet_transformers(), writing(temporary):
        model = AutoModelForCausalLM.from_config(model_config(recipe), dtype=DTYPES[recipe.model.dtype])
        model.save_pretrained(temporary)
    os.replace(temporary, folder)
