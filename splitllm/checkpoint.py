"""Training checkpoints: all that `--resume` needs, each written under a temporary name and then renamed.

`checkpoints/step-N/` holds `state.safetensors` (adapter and optimiser of every tier) and `state.json`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

    Raises:
        CheckpointError: something else lies where it belongs.
        OSError: it cannot be written, for want of space say.
    """
    if _is_whole(folder):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is no checkpoint, but lies where one belongs: move it away, then resume")
    for unfinished in folder.parent.glob(".step-*.writing"):
        shutil.rmtree(unfinished)
    temporary = folder.with_name(f".{folder.name}.writing")
    try:
        _write(temporary, state)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush(folder.parent)
    for old in [path for path in _folders(folder.parent) if _is_whole(path)][:-keep]:
        shutil.rmtree(old)


def _write(folder: Path, state: TrainingState) -> None:
    """Write the files of a checkpoint and have them on the disk."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    with writing(folder):
        save_file(tensors, folder / "state.safetensors")
    described = {
        "format": FORMAT,
        "step": state.step,
        "recipe": state.recipe,
        "data": state.data,
        "totals": state.totals,
    }
    (folder / "state.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Safetensors has an error of its own for a full disk, which names no file: inside, it is an ordinary `OSError`."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number.group(1)) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


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


def _is_whole(folder: Path) -> bool:
    """Whether this is a checkpoint; it is renamed to its name only with both files in it."""
    return all((folder / name).is_file() for name in ("state.json", "state.safetensors"))


def _folders(parent: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in parent.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _remedy(folders: list[Path]) -> str:
    before = f"from {folders[-2]}" if len(folders) > 1 else "from the beginning"
    return f"delete it to resume {before}"


def flush(path: Path) -> None:
    """Have the content of a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
