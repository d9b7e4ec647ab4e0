"""An update as one vector and back: what is summed in secret is a vector, what is averaged are named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from splitllm.privacy.fixedpoint import Floats

Shapes = Mapping[str, tuple[int, ...]]


def flatten(tensors: Mapping[str, torch.Tensor]) -> Floats:
    """All values in fp64 (which holds any float exactly), tensors in the order of their names."""
    parts = [tensors[name].detach().cpu().to(torch.float64).reshape(-1).numpy() for name in sorted(tensors)]
    return np.concatenate(parts) if parts else np.zeros(0)


def unflatten(vector: Floats, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The fp64 tensors of these names and shapes; a copy."""
    sizes = {name: math.prod(shapes[name]) for name in sorted(shapes)}
    if vector.shape != (sum(sizes.values()),):
        raise ValueError(f"{list(vector.shape)} values for tensors of {sum(sizes.values())}")
    parts = torch.split(torch.from_numpy(vector.copy()), list(sizes.values()))
    return {name: part.reshape(shapes[name]) for name, part in zip(sizes, parts, strict=True)}
