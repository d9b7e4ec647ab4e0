"""One entry of a journal: a safetensors file whose metadata holds what is no tensor, and a checksum of both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from splitllm.checkpoint import flush, writing
from splitllm.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """What one file holds.

    Attributes:
        step: number of the committed step.
        identity: whose entry it is.
        values: what JSON can carry.
        tensors: of any shape and dtype that safetensors knows; to be written each is on the CPU and contiguous, has
            storage of its own, and nobody changes it meanwhile (`taken`).
    """

    step: int
    identity: dict[str, str]
    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def write_entry(path: Path, entry: Entry) -> None:
    """Write an entry whole or not at all, replacing what was there; when this returns it is on the disk.

    Raises:
        OSError: it cannot be written, for want of space say; what was there is as it was.
    """
    described = {
        "step": json.dumps(entry.step),
        "identity": json.dumps(entry.identity),
        "values": json.dumps(entry.values),
    }
    described["checksum"] = _checksum(entry.tensors, described)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with writing(temporary):
            save_file(entry.tensors, temporary, metadata=described)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def read_entry(path: Path) -> Entry:
    """Read an entry; its tensors are on the CPU and no longer depend on the file.

    Raises:
        CheckpointError: it is damaged.
        OSError: it cannot be opened, or is not there.
    """
    path.open("rb").close()  # safetensors names no reason for a file it may not open
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
            described = dict(file.metadata() or {})
        if described.pop("checksum") != _checksum(tensors, described):
            raise ValueError("its checksum is of another content")
        values = {key: json.loads(described[key]) for key in ("step", "identity", "values")}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} is damaged ({reason}): move it away, and the step before is gone on from"
        ) from error
    return Entry(**values, tensors=tensors)


def taken(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies as an entry takes them, of tensors that may share storage."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _checksum(tensors: Mapping[str, torch.Tensor], described: Mapping[str, str]) -> str:
    """Of contiguous tensors with their names, dtypes and shapes, and of the metadata beside it."""
    names = sorted(tensors)
    outline = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.blake2b(json.dumps([sorted(described.items()), outline]).encode(), digest_size=16)
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
