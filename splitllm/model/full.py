"""Blocks of which all weights train, where a tier is fine-tuned in full instead of by an adapter.

In an adapter file they are what PEFT saves of a block that `modules_to_save` names, so that `PeftModel` loads them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedConfig

from splitllm.model.export import tensor_shapes
from splitllm.model.families import layout_of
from splitllm.model.naming import PREFIX
from splitllm.model.shard import Shard


def block_names(config: PreTrainedConfig, blocks: Collection[int]) -> list[str]:
    """Names of these blocks in the text model, bottom up."""
    layout = layout_of(config)
    return [f"{layout.base}.{layout.blocks}.{block}" for block in sorted(blocks)]


def full_shapes(config: PreTrainedConfig, blocks: Collection[int]) -> dict[str, torch.Size]:
    """The shapes of all weights of these blocks, by their names in an adapter file; nothing is allocated."""
    prefixes = tuple(f"{PREFIX}{name}." for name in block_names(config, blocks))
    named = ((PREFIX + name, shape) for name, shape in tensor_shapes(config).items())
    return {name: torch.Size(shape) for name, shape in named if name.startswith(prefixes)}


def train_in_full(shard: Shard, blocks: Collection[int]) -> dict[str, nn.Parameter]:
    """Have all weights of these blocks train.

    Args:
        shard: without an adapter in these blocks; no other shard computes with its tensors.
        blocks: global indices.

    Returns:
        Those that the shard holds, by their names in an adapter file, in model order.
    """
    prefixes = tuple(f"{name}." for name in block_names(shard.model.config, blocks))
    found = {PREFIX + name: weight for name, weight in shard.model.named_parameters() if name.startswith(prefixes)}
    for weight in found.values():
        weight.requires_grad_(True)
    return found
