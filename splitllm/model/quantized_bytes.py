"""How many bytes quantised linear layers take, from their shapes."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from splitllm.model.families import layout_of
from splitllm.model.keyed import remembered
from splitllm.model.lora import block_of
from splitllm.model.quantized import BLOCK, COMPUTE, OUTER_BLOCK
from splitllm.model.quantizing import widths
from splitllm.model.shard import meta_model
from splitllm.recipe import QuantizationRecipe, Recipe

SCALE = 4  # fp32
OFFSET = 4


def quantized_bytes(shape: tuple[int, int], how: QuantizationRecipe) -> int:
    """Codes and scales of one weight [O, D]."""
    narrow, wide = shape
    if how.method == "int8":
        return narrow * wide + narrow * SCALE
    blocks = math.ceil(narrow * wide / BLOCK)
    scales = blocks + math.ceil(blocks / OUTER_BLOCK) * SCALE + OFFSET if how.double else blocks * SCALE
    return blocks * BLOCK // 2 + scales


def saved_bytes(
    config: PreTrainedConfig, start: int, stop: int, dtype: torch.dtype, how: QuantizationRecipe | None
) -> int:
    """By how much the weights of blocks `start` to `stop - 1` are smaller than in `dtype`."""
    if how is None:
        return 0
    shapes = _linear_shapes(config)
    held = [shape for name, shape in shapes.items() if start <= block_of(config, f"{name}.") < stop]
    return sum(math.prod(shape) * dtype.itemsize - quantized_bytes(shape, how) for shape in held)


def scratch_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """What one product takes while it runs: the largest weight of a block, in the dtype of the product."""
    shapes = _linear_shapes(config)
    return max(map(math.prod, shapes.values())) * dtype.itemsize


def decoded_bytes(recipe: Recipe, config: PreTrainedConfig, tier: str) -> int:
    """The same of a role of a tier; 0 where it holds its weights as they are."""
    if (how := recipe.quantization.get(tier)) is None:
        return 0
    half = recipe.train.mixed_precision == "bf16"
    return scratch_bytes(config, COMPUTE[how.compute_dtype or ("bfloat16" if half else recipe.model.dtype)])


@remembered(8)
def _linear_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """Width out and width in of every linear layer inside the blocks."""
    layout, found = layout_of(config), {}
    for name, module in meta_model(config, torch.float32).named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(f"{layout.base}.{layout.blocks}."):
            wide, narrow = widths(module)
            found[name] = narrow, wide
    return found
