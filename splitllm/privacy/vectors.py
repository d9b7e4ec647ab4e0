"""An update as one vector and back: what is summed in secret is a vector, what is averaged are named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from splitllm.errors import PrivacyError
from splitllm.privacy.fixedpoint import FixedPoint, Floats, Integers, Words

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


def weighted(vector: Floats, weight: int, most: int, fixed: FixedPoint) -> Words:
    """What a member sends of its update: weight/most of each value, and behind them the weight itself.

    So the weight is as hidden as the values, its sum is exact, and `clip` bounds what one member can add whatever its
    weight.

    Args:
        vector: the update.
        weight: examples or tokens behind it, or 1.
        most: the largest weight that a member may have, the same for all; it costs log2(most / weight) bits of
            precision.
        fixed: of the terms, which are for one value more than the vector has.

    Raises:
        PrivacyError: this weight cannot be summed.
        DivergedError: a value is not finite.
    """
    if not 1 <= weight <= most <= fixed.limit:
        raise PrivacyError(f"weight: {weight} is not from 1 to {most}, with {fixed.limit} the most that words can hold")
    return np.concatenate([fixed.encode(vector * (weight / most)), fixed.wrap(np.array([weight]))])


def mean(total: Integers, most: int, fixed: FixedPoint) -> tuple[Floats, int]:
    """The weighted mean, and the sum of the weights, from the sum of what `weighted` makes.

    Raises:
        PrivacyError: the weights do not add up to anything, as members within the terms' limits cannot have it.
    """
    weight = int(total[-1])
    if weight < 1:
        raise PrivacyError(f"weight: they add up to {weight}; a member has sent something else than a weight")
    return fixed.decode(total[:-1]) * (most / weight), weight
