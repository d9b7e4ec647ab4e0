"""Which micro-batches run together in one batch, and which rows of it are theirs: plain data.

Every micro-batch enters at its own cut layer. Rows are ordered by entry, so that at every layer those present are the
first of the batch, and whoever joins is appended.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from splitllm.model.randomness import MicroBatchId


@dataclass(frozen=True)
class Rows:
    """The rows of one micro-batch.

    Attributes:
        micro_batch: whose they are; its client is the tenant whose adapter they use.
        lengths: real tokens of each row.
        entry: the first block that they run, the cut layer of their client.
    """

    micro_batch: MicroBatchId
    lengths: tuple[int, ...]
    entry: int = 0


@dataclass(frozen=True)
class Joined:
    """The micro-batches of one batch.

    Attributes:
        members: by entry.
    """

    members: tuple[Rows, ...]

    def __post_init__(self) -> None:
        """Check the order."""
        assert all(low.entry <= high.entry for low, high in itertools.pairwise(self.members))

    def at(self, layer: int) -> tuple[Rows, ...]:
        """Those whose rows are in the batch at a global layer."""
        if self.members[-1].entry <= layer:
            return self.members
        return tuple(member for member in self.members if member.entry <= layer)

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, Sequence[Rows]]]:
        """Of the blocks from `start` to `stop - 1`: runs of blocks in which nobody joins, and who joins before each."""
        entries = sorted({max(start, member.entry) for member in self.members})
        for first, after in itertools.pairwise([*entries, stop]):
            yield first, after, [member for member in self.members if max(start, member.entry) == first]
