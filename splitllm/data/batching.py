"""Micro-batches: rows of like length side by side, in an order that is random but a pure function of its keys.

Shapes: B rows, S positions of the longest row, T = sum of the real lengths, N predicted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from splitllm.data.examples import Example
from splitllm.errors import DataError

__all__ = ["BatchStream", "Example", "MicroBatch", "collate", "eval_batches"]

_Numbers = npt.NDArray[np.int64]

WIDEST_WINDOW = 32
NARROWEST_WINDOW = 8
"""Rows are sorted by length inside windows of so many micro-batches: wide enough for little padding, still random."""


@dataclass(frozen=True, eq=False, slots=True)
class MicroBatch:
    """Some rows, right padded, and what is predicted in them.

    Attributes:
        ids_BS: token ids, int64, right padded with 0.
        lengths: the B real lengths.
        positions_N: int64 indices into the T real tokens (row after row): the positions that predict.
        targets_N: int64, the token ids that they predict.
        position_ids_BS: int64, restarting at 0 with each document; None unless a row is packed.
        rows: of a training micro-batch, the numbers of its B rows among the client's examples; else empty.
    """

    ids_BS: torch.Tensor
    lengths: tuple[int, ...]
    positions_N: torch.Tensor
    targets_N: torch.Tensor
    position_ids_BS: torch.Tensor | None = None
    rows: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted (T)."""
        return sum(self.lengths)

    @property
    def labels(self) -> int:
        """Predicted tokens (N)."""
        return int(self.targets_N.numel())


def collate(examples: Sequence[Example]) -> MicroBatch:
    """Lay rows side by side.

    Args:
        examples: B >= 1 rows, kept in this order.

    Returns:
        Their micro-batch; B x S with S the longest row.
    """
    lengths = tuple(len(example) for example in examples)
    ids_BS = np.zeros((len(examples), max(lengths)), dtype=np.int64)
    for row, example in enumerate(examples):
        ids_BS[row, : len(example)] = example.ids
    ids_T = np.concatenate([example.ids for example in examples]).astype(np.int64)
    predicted_N = np.flatnonzero(np.concatenate([example.targets for example in examples]))
    return MicroBatch(
        ids_BS=torch.from_numpy(ids_BS),
        lengths=lengths,
        positions_N=torch.from_numpy(predicted_N - 1),
        targets_N=torch.from_numpy(ids_T[predicted_N]),
        position_ids_BS=_position_ids(examples, max(lengths)),
    )


def _position_ids(examples: Sequence[Example], width: int) -> torch.Tensor | None:
    """Positions that restart at each document (padding counts on from the last one), or None if no row is packed."""
    if all(len(example.starts) == 1 for example in examples):
        return None
    positions_BS = np.tile(np.arange(width, dtype=np.int64), (len(examples), 1))
    for row, example in enumerate(examples):
        for start in example.starts[1:]:
            positions_BS[row, start:] = np.arange(width - start)
    return torch.from_numpy(positions_BS)


class BatchStream:
    """A client's endless training micro-batches; each epoch has every example exactly once.

    The last micro-batch cut from an epoch may be smaller than the others, and so are all of them for a client
    with fewer examples than `batch_size`.

    Args:
        examples: the client's rows, at least one.
        batch_size: rows of a micro-batch, >= 1.
        seed: the recipe's seed, >= 0.
        client: the client's index, >= 0.

    Raises:
        DataError: the client has no examples.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int, client: int) -> None:
        if not examples:
            raise DataError(f"client {client} has no training examples: give it some, or take fewer clients")
        self.batches_per_epoch = -(-len(examples) // batch_size)
        self._examples = examples
        self._lengths = np.array([len(example) for example in examples])
        self._batch_size = batch_size
        self._keys = (seed, client)
        self._plan = (-1, list[_Numbers]())

    def __len__(self) -> int:
        """Examples."""
        return len(self._examples)

    def take(self, index: int) -> MicroBatch:
        """The micro-batch number `index` (>= 0): a pure function of (seed, client, index)."""
        epoch, slot = divmod(index, self.batches_per_epoch)
        cached, plan = self._plan
        if cached != epoch:
            plan = self._batches_of(epoch)
            self._plan = (epoch, plan)
        rows = plan[slot].tolist()
        return replace(collate([self._examples[row] for row in rows]), rows=tuple(rows))

    def _batches_of(self, epoch: int) -> list[_Numbers]:
        """The rows of each micro-batch of an epoch: shuffle, sort by length inside windows, cut, shuffle the cuts."""
        seed, client = self._keys
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, client))))
        order = rng.permutation(len(self._examples))
        window = self._batch_size * min(WIDEST_WINDOW, max(NARROWEST_WINDOW, self.batches_per_epoch // 4))
        batches = []
        for start in range(0, order.size, window):
            rows = order[start : start + window]
            rows = rows[np.argsort(self._lengths[rows], kind="stable")]
            batches += [rows[i : i + self._batch_size] for i in range(0, rows.size, self._batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def eval_batches(examples: Sequence[Example], batch_size: int) -> list[MicroBatch]:
    """Every example once, sorted by length (ties in the given order), in micro-batches of `batch_size` rows."""
    ordered = sorted(examples, key=len)
    return [collate(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size)]
