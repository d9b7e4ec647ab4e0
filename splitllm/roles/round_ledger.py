"""What rounds add to the memory of a role: what it keeps from round to round, and what passes through in one.

Ranks of what is frozen grow from round to round; counted is what they can come to in this run at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from splitllm.model.lora import adapter_dtype, block_of, in_model
from splitllm.model.memory import dtype_of, shapes_of
from splitllm.recipe import (
    Recipe,
    averaged_blocks,
    children_of,
    goes_by_lanes,
    goes_by_rounds,
    intervals,
    lora_of,
    role_bounds,
    tier_of,
)
from splitllm.recipe.rounds import WITH_FROZEN, hides

WIDE = 8  # bytes of fp64, in which the outer optimiser keeps its moments
MOMENTS = {"none": 0, "fedavgm": 1, "fedadam": 2, "fedyogi": 2}
"""Outer optimiser -> its moments of each number."""


@dataclass(frozen=True)
class RoundsHeld:
    """Bytes of rounds on one role.

    Attributes:
        anchors: where its adapters were after the last round.
        frozen: factors beside frozen weights, by level and joined.
        kept: what a server handed out last, what comes out of the run, and moments of the outer optimiser.
        values: of one round: its own, its children's, the average and the outcome.
    """

    anchors: int = 0
    frozen: int = 0
    kept: int = 0
    values: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.anchors + self.frozen + self.kept + self.values


def rounds_held(
    recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str], name: str, adapters: int
) -> RoundsHeld:
    """What rounds add to a role.

    Args:
        recipe: as it was resolved.
        config: of the whole text model.
        modules: global names of the modules that LoRA adapts.
        name: of the role, which may be the coordinator of a recipe with one tier.
        adapters: bytes of what it trains.
    """
    rounds = recipe.rounds
    if not goes_by_rounds(recipe):
        return RoundsHeld()
    anchors = adapters if rounds.prox > 0 or hides(recipe) else 0
    sizes = _Sizes(recipe, config, modules)
    tiers = len(recipe.split.tiers)
    if tiers > 1 and tier_of(recipe, name)[0] == 0:
        start, stop = role_bounds(recipe, config.num_hidden_layers)[name]
        return RoundsHeld(anchors, sizes.frozen(start, stop, kept=True), 0, 2 * sizes.value(start, stop))
    children = children_of(recipe, name) if tiers > 1 else []
    stops = [role_bounds(recipe, config.num_hidden_layers)[child][1] for child in children]
    bounds = role_bounds(recipe, config.num_hidden_layers).get(name, (0, config.num_hidden_layers))
    values = sum(sizes.value(0, stop) for stop in stops) + 2 * sizes.value(0, bounds[1])
    return RoundsHeld(anchors, sizes.frozen(*bounds, kept=True), sizes.kept(name), values)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what travels and is kept, by blocks."""

    recipe: Recipe
    config: PreTrainedConfig
    modules: Sequence[str]

    def value(self, start: int, stop: int) -> int:
        """What stands for blocks `start` to `stop - 1` in a round."""
        moments = 2 * (self.recipe.rounds.moments == "average" and self.recipe.train.optimizer.name == "adamw")
        adapter = sum(size for block in self._averaged(start, stop) for size in self._of_block(block))
        return (1 + moments) * adapter + self.frozen(start, stop, kept=False)

    def kept(self, name: str) -> int:
        """What a server handed out last, where it looks at changes or has lanes; of the top what comes out of the run.

        There also the moments that it steps by.
        """
        rounds, tiers, layers = self.recipe.rounds, list(self.recipe.split.tiers), self.config.num_hidden_layers
        looks = rounds.clip_update is not None or rounds.reject_beyond is not None or hides(self.recipe)
        given = looks or rounds.outer.name != "none" or goes_by_lanes(self.recipe)
        whole = given * sum(size for block in range(layers) for size in self._of_block(block))
        if len(tiers) > 1 and name != tiers[-1]:
            return whole
        item = adapter_dtype(dtype_of(self.recipe)).itemsize
        averaged = sum(size for block in self._averaged(0, layers) for size in self._of_block(block))
        moments = MOMENTS[rounds.outer.name] * averaged // item * WIDE
        return whole + averaged + moments + self.frozen(0, layers, kept=False)

    def frozen(self, start: int, stop: int, *, kept: bool) -> int:
        """Factors beside the weights of these blocks: once in a value, and kept for every level and joined."""
        if self.recipe.rounds.rule not in WITH_FROZEN:
            return 0
        item, ranks = adapter_dtype(dtype_of(self.recipe)).itemsize, self._ranks()
        pairs = [
            min(ranks, min(wide)) * sum(wide)
            for block in self._averaged(start, stop)
            for wide in self._widths(block).values()
        ]
        return sum(pairs) * item * (2 if kept else 1)

    def _averaged(self, start: int, stop: int) -> list[int]:
        averaged = averaged_blocks(self.recipe, self.config.num_hidden_layers)
        return [block for block in range(start, stop) if block in averaged]

    def _ranks(self) -> int:
        """Of all that a run can freeze: every round adds the ranks of all who take part, and of their average."""
        recipe = self.recipe
        clients = next(iter(recipe.split.tiers.values()))
        each = sum(lora_of(recipe, client).rank for client in range(clients)) + recipe.lora.rank * sum(
            list(recipe.split.tiers.values())[1:]
        )
        rounds = math.ceil(recipe.train.steps / min(intervals(recipe)))
        return rounds * (each + recipe.lora.rank)

    def _widths(self, block: int) -> dict[str, tuple[int, int]]:
        """Module of a block -> its widths in and out."""
        shapes, found = self._shapes(), dict[str, tuple[int, int]]()
        for name, shape in shapes.items():
            if ".lora_A." in name and block_of(self.config, in_model(name)) == block:
                out = shapes[name.replace(".lora_A.", ".lora_B.")]
                found[name] = int(shape[-1]), int(out[0])
        return found

    def _of_block(self, block: int) -> list[int]:
        item = adapter_dtype(dtype_of(self.recipe)).itemsize
        return [
            math.prod(shape) * item
            for name, shape in self._shapes().items()
            if block_of(self.config, in_model(name)) == block
        ]

    def _shapes(self) -> dict[str, torch.Size]:
        """Of the adapter of the largest rank."""
        loras = [
            self.recipe.lora,
            *(lora_of(self.recipe, c) for c in range(next(iter(self.recipe.split.tiers.values())))),
        ]
        return shapes_of(self.config, max(loras, key=lambda lora: lora.rank), self.modules)
