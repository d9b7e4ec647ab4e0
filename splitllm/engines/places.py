"""Where the frozen weights of a shard lie, whichever engine holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Places:
    """Bytes of weights that this process holds.

    Attributes:
        device: where it computes.
        host: in host memory beside that.
        files: in files.
    """

    device: int = 0
    host: int = 0
    files: int = 0


def places_of(parameters: Iterable[nn.Parameter]) -> Places:
    """Where parameters lie; of one that is whole for a moment its part counts. Shared storage counts once."""
    found = {"device": 0, "host": 0, "files": 0}
    seen: set[int] = set()
    for parameter in parameters:
        place, key, size = _place(parameter)
        found[place] += 0 if key in seen else size
        seen.add(key)
    return Places(**found)


def is_spread(parameter: nn.Parameter) -> bool:
    """Whether an engine holds it: its storage comes and goes."""
    return hasattr(parameter, "ds_tensor") or hasattr(parameter, "to_local")


def _place(parameter: nn.Parameter) -> tuple[str, int, int]:
    """Where, what identifies it, and its bytes."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        return "device", local.untyped_storage().data_ptr(), local.nbytes
    if part.final_location is not None:
        return "files", id(part), part.ds_numel * parameter.element_size()
    return "device" if part.device == parameter.device else "host", id(part), part.nbytes
