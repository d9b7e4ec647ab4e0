"""What one of several processes of a server computes of what the server does: the largest share, by rows of one length.

Batches are cut by `ranks/shares.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from splitllm.model.families import dropouts
from splitllm.recipe import Recipe, client_names, lora_of


@dataclass(frozen=True)
class Share:
    """Of one process, at most.

    Attributes:
        part: of the micro-batches that the server has between forward and backward.
        rows: of one micro-batch; None: all of them.
        cut: whether the part is one of each micro-batch; otherwise of a batch, which begins with the lowest entries.
    """

    part: float = 1.0
    rows: int | None = None
    cut: bool = True

    def of(self, sizes: Sequence[int]) -> int:
        """What it holds of micro-batches of these sizes."""
        if self.cut:
            return int(self.part * sum(sizes))
        count = self.part * len(sizes)
        ranked, whole = sorted(sizes, reverse=True), int(count)
        return sum(ranked[:whole]) + int((count - whole) * sum(ranked[whole : whole + 1]))


def drops(recipe: Recipe, config: PreTrainedConfig) -> bool:
    """Whether anything is dropped while training, by the base model or an adapter: then micro-batches stay whole."""
    adapters = (lora_of(recipe, client).dropout for client in range(len(client_names(recipe))))
    return bool(dropouts(config)) or any(adapters)


def largest_share(recipe: Recipe, config: PreTrainedConfig, rows: Sequence[int]) -> Share:
    """The share of one process of a server.

    Args:
        recipe: as it was resolved.
        config: of the whole text model.
        rows: of a micro-batch of each client that the server has.
    """
    processes = recipe.server.processes
    if processes == 1:
        return Share()
    longest, whole = max(rows), drops(recipe, config)
    pieces, joined = 1 if whole else longest, _joined(recipe, rows)
    full, rest = divmod(len(rows), joined)
    most, last = (-(-count * pieces // processes) for count in (joined, rest))
    part = (full * most + last) / (len(rows) * pieces)
    return Share(part, longest if whole else min(longest, most), cut=joined == 1)


def _joined(recipe: Recipe, rows: Sequence[int]) -> int:
    """How many micro-batches are in one batch whoever is late: those of clients at their own pace may come alone."""
    if recipe.server.batching != "synchronous":
        return 1
    return min(len(rows), max(1, recipe.server.tokens // (max(rows) * recipe.data.max_length)))
