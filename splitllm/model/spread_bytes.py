"""How many bytes of a server's weights lie where, by what holds them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedConfig

from splitllm.model.memory import block_matrices, dtype_of, role_weights, shard_bytes
from splitllm.recipe import Recipe, role_bounds, tier_of

FILE_BYTES = 2**20
"""DeepSpeed writes parts to files from here on; smaller ones stay in host memory."""
BUFFERS = 2
"""Of the largest part, through which files are read."""
BLOCKS_WHOLE = 2
"""FSDP2 gathers a block into one buffer and copies it into its tensors."""


@dataclass(frozen=True)
class Spread:
    """Bytes of frozen weights of one process.

    Attributes:
        device: where they compute; all of them of a role without an engine.
        host: in host memory, with the buffers for files.
        files: in files.
        whole: on the device for a moment, while they compute.
    """

    device: int
    host: int = 0
    files: int = 0
    whole: int = 0


def spread_bytes(recipe: Recipe, config: PreTrainedConfig, name: str) -> Spread:
    """Where the frozen weights of a role lie, of one process of the role.

    Raises:
        RecipeError: `split.tiers` has no such role.
    """
    everything, server = role_weights(recipe, config, name), recipe.server
    start, stop = role_bounds(recipe, config.num_hidden_layers)[name]

    def part(size: int) -> int:
        return -(-size // server.processes)

    if tier_of(recipe, name)[0] == 0 or start == stop:
        return Spread(everything)
    if server.fsdp:
        blocks = [shard_bytes(config, block, block + 1, False, dtype_of(recipe)) for block in range(start, stop)]
        return Spread(everything - sum(blocks) + sum(map(part, blocks)), whole=BLOCKS_WHOLE * max(blocks))
    if server.zero.stage != 3:
        return Spread(everything)
    sizes = [math.prod(shape) * dtype_of(recipe).itemsize for shape in block_matrices(config, start, stop)]
    parts, largest, vectors = [part(size) for size in sizes], max(sizes), everything - sum(sizes)
    if server.zero.offload_param == "none":
        return Spread(vectors + sum(parts), whole=largest)
    if server.zero.offload_param == "cpu":
        return Spread(vectors, host=sum(parts), whole=largest)
    files = sum(size for size in parts if size >= FILE_BYTES)
    return Spread(vectors, host=sum(parts) - files + BUFFERS * part(largest), files=files, whole=largest)
