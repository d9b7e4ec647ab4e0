"""The frozen weights of the roles of one process: read once for all that hold the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from splitllm.engines.zero import Partitioned
from splitllm.model.loading import Checkpoint
from splitllm.model.memory import has_head, largest_matrix
from splitllm.model.shard import Shard
from splitllm.recipe import Recipe
from splitllm.roles.adapters import DTYPES

Bounds = tuple[int, int]


@dataclass
class Bases:
    """Shards without adapters.

    Attributes:
        recipe: dtype, quantisation, and what servers hold their weights with, are read.
        checkpoint: of the base model.
        device: where the roles compute.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    device: torch.device
    _read: dict[tuple[int, Bounds], Shard] = field(default_factory=dict)
    _partitioned: dict[tuple[int, Bounds], Partitioned] = field(default_factory=dict)

    def shard(self, tier: int, bounds: Bounds, *, alone: bool) -> Shard:
        """The shard of one role, which is its own but for the weights.

        Args:
            tier: of the role.
            bounds: its first block, and one past its last.
            alone: no other role of the tier has these, and all of it is its own.

        Raises:
            RecipeError: the engine of its tier is not installed, or has no folder for its files.
        """
        if alone or self._by_fsdp(tier) or self._in_full(tier):
            return self._cut(tier, bounds)
        if (tier, bounds) not in self._read:
            self._read[tier, bounds] = self._cut(tier, bounds)
        return self._read[tier, bounds].replica()

    def settle(self, tier: int, bounds: Bounds, shard: Shard) -> None:
        """Hand a shard to the engine of its tier, once it has its adapters."""
        if (tier, bounds) in self._partitioned:
            self._partitioned[tier, bounds].attach(shard)

    def _by_fsdp(self, tier: int) -> bool:
        return tier > 0 and self.recipe.server.fsdp

    def _in_full(self, tier: int) -> bool:
        return list(self.recipe.split.tiers)[tier] in (self.recipe.train.full_tiers or ())

    def _cut(self, tier: int, bounds: Bounds) -> Shard:
        """The frozen part of one tier's shard; the head sits where the loss is computed."""
        recipe, (start, stop) = self.recipe, bounds
        return Shard.cut(
            self.checkpoint,
            start,
            stop,
            head=has_head(recipe, tier),
            dtype=DTYPES[recipe.model.dtype],
            attention=recipe.model.attention,
            seed=recipe.seed,
            quantization=recipe.quantization.get(list(recipe.split.tiers)[tier]),
            take=self._taker(tier, bounds),
        ).to(self.device)

    def _taker(self, tier: int, bounds: Bounds) -> Callable[[nn.Module], None] | None:
        """What gets each block once it is read: the engine of its tier, if there is one."""
        (start, stop), zero = bounds, self.recipe.server.zero
        if tier == 0 or start == stop:
            return None
        if self._by_fsdp(tier):
            from splitllm.engines.fsdp import Fsdp2  # what it imports takes memory that clients do not have

            return Fsdp2(self.device).take
        if zero.stage != 3:
            return None
        partitioned = Partitioned(zero, largest_matrix(self.checkpoint.config, start, stop), self.device)
        self._partitioned[tier, bounds] = partitioned
        return partitioned.take
