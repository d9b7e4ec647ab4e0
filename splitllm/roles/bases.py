"""The frozen weights of the roles of one process: read once for all that hold the same blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

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
        elif self._by_fsdp(tier):
            from splitllm.engines.fsdp import shard_by_fsdp2  # what it imports takes memory that clients do not have

            shard_by_fsdp2(shard, self.device)

    def _by_fsdp(self, tier: int) -> bool:
        return tier > 0 and self.recipe.server.fsdp

    def _in_full(self, tier: int) -> bool:
        return list(self.recipe.split.tiers)[tier] in (self.recipe.train.full_tiers or ())

    def _cut(self, tier: int, bounds: Bounds) -> Shard:
        """The frozen part of one tier's shard; the head sits where the loss is computed."""
        recipe, (start, stop), zero = self.recipe, bounds, self.recipe.server.zero
        partitioned = None
        if tier > 0 and zero.stage == 3 and start < stop:
            partitioned = Partitioned(zero, largest_matrix(self.checkpoint.config, start, stop), self.device)
            self._partitioned[tier, bounds] = partitioned
        return Shard.cut(
            self.checkpoint,
            start,
            stop,
            head=has_head(recipe, tier),
            dtype=DTYPES[recipe.model.dtype],
            attention=recipe.model.attention,
            seed=recipe.seed,
            quantization=recipe.quantization.get(list(recipe.split.tiers)[tier]),
            take=None if partitioned is None else partitioned.take,
        ).to(self.device)
