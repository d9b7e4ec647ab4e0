"""Training checkpoints: all that `--resume` needs, each written under a temporary name and then renamed.

`checkpoints/step-N/` holds `state.safetensors` (adapter and optimiser of every tier) and `state.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from splitllm.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class TrainingState:
    """A checkpoint's content.

    Attributes:
        step: optimiser steps done.
        recipe: the resolved recipe as plain values.
        data: fingerprint of every client's rows.
        totals: running sums of the run (tokens, seconds, bytes).
        tensors: adapter and optimiser state by name.
    """

    step: int
    recipe: dict[str, Any]
    data: str
    totals: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step}"


def save(folder: Path, state: TrainingState, keep: int) -> None:
    """Write a checkpoint whole or not at all, then drop all but the newest `keep` beside it.

    One that is there already is left alone: a step of a run has one state.
    """
    if folder.exists():
        return
    for unfinished in folder.parent.glob(".step-*.writing"):
        shutil.rmtree(unfinished)
    temporary = folder.with_name(f".{folder.name}.writing")
    temporary.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    save_file(tensors, temporary / "state.safetensors")
    described = {
        "format": FORMAT,
        "step": state.step,
        "recipe": state.recipe,
        "data": state.data,
        "totals": state.totals,
    }
    (temporary / "state.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    os.replace(temporary, folder)
    _flush(folder.parent)
    for old in _folders(folder.parent)[:-keep]:
        shutil.rmtree(old)


def newest(run_dir: Path) -> TrainingState | None:
    """The newest checkpoint of a run, or None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    folders = _folders(run_dir / "checkpoints")
    if not folders:
        return None
    folder = folders[-1]
    try:
        described: Mapping[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "state.safetensors")
        if described["format"] != FORMAT:
            raise CheckpointError(
                f"{folder}: format {described['format']}, this version reads {FORMAT}; "
                "resume with the version of splitllm that wrote it"
            )
        return TrainingState(
            int(described["step"]), described["recipe"], described["data"], dict(described["totals"]), tensors
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} cannot be read ({reason}): {_remedy(folders)}") from error


def _folders(parent: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in parent.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _remedy(folders: list[Path]) -> str:
    before = f"from {folders[-2]}" if len(folders) > 1 else "from the beginning"
    return f"delete it to resume {before}"


def _flush(path: Path) -> None:
    """Have the content of a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
