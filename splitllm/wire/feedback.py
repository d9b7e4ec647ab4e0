"""Error feedback: what a lossy codec lost of a row is added to the row the next time it is sent.

Tokens differ from batch to batch, so the error belongs to a row of the training data:
e <- (x + e) - decode(encode(x + e)).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from splitllm.wire.codecs import Packed, check_finite, codec, pack
from splitllm.wire.quantizers import narrow

_OVERHEAD = 1024  # bytes an entry takes beside its tensors, roughly


@dataclass(frozen=True)
class _Entry:
    """What was lost of a row, and what had been lost of it before the step that wrote this."""

    visit: tuple[int, int]
    error_TD: Tensor
    before_TD: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes it takes, or will once there was an error before it: a function of the row's shape alone."""
        return _OVERHEAD + 2 * self.error_TD.nbytes


class ErrorMemory:
    """The errors of rows, in bf16. A step that is run again reads what it read the first time and sends the same bytes.

    All visits of a row in one step read the error from before it; the last visit by (index, place) leaves its own.

    Where not all rows fit, always the same ones are kept: those of the lowest rank, a hash of the key. So the share of
    the rows that meet their error is that of the memory, though every epoch has another order, and it does not depend
    on the order in which a step's micro-batches come.

    Args:
        limit_bytes: beyond it, when a new step begins, the rows of the highest rank are forgotten and never kept again.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._nbytes = limit_bytes, 0
        self._entries: dict[Hashable, _Entry] = {}
        self._highest: list[tuple[int, Hashable]] = []  # a heap: minus the rank, and the key
        self._ranks_below = 1 << 64
        self._step = -1

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds."""
        return self._nbytes

    def encode(
        self,
        name: str,
        values_TD: Tensor,
        keys: Sequence[Hashable],
        lengths: Sequence[int],
        step: int,
        *,
        index: int = 0,
        what: str = "a tensor",
    ) -> Packed:
        """Encode values plus what was lost of their rows before, and keep what is lost now.

        Args:
            name: of the codec.
            values_TD: the rows one after another.
            keys: of the rows.
            lengths: tokens of each row.
            step: at which they are sent.
            index: of the micro-batch in the step.
            what: the values are, in an error's words.

        Raises:
            DivergedError: a value is not finite; nothing is kept then.
        """
        assert sum(lengths) == len(values_TD) and len(keys) == len(lengths), "keys and lengths are those of the rows"
        values_TD = values_TD.detach().cpu()
        check_finite(values_TD, what)
        if step > self._step:
            self._step = step
            self._forget()
        rows = values_TD.split_with_sizes(list(lengths))
        errors = [self._read(key, row_TD.shape, step) for key, row_TD in zip(keys, rows, strict=True)]
        total_TD = _sum(values_TD, errors, lengths)
        packed = pack(narrow(total_TD, values_TD.dtype), name, what)
        sent_TD = codec(name).decode(packed.blob, packed.shape, packed.dtype)
        lost = narrow(total_TD - sent_TD.to(total_TD.dtype), torch.bfloat16).split_with_sizes(list(lengths))
        for key, error_TD, before_TD in zip(keys, lost, errors, strict=True):
            self._write(key, _Entry((step, index), error_TD, before_TD))
        return packed

    def _read(self, key: Hashable, shape: torch.Size, step: int) -> Tensor | None:
        """The error to add; None where there is none of this shape."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        error_TD = entry.before_TD if step <= entry.visit[0] else entry.error_TD
        return error_TD if error_TD is not None and error_TD.shape == shape else None

    def _write(self, key: Hashable, entry: _Entry) -> None:
        old = self._entries.get(key)
        if old is not None and old.visit[0] == entry.visit[0] and old.visit > entry.visit:
            return
        rank = _rank(key)
        if rank >= self._ranks_below or entry.nbytes > self._limit:
            return
        if old is None:
            heapq.heappush(self._highest, (-rank, key))
        self._nbytes += entry.nbytes - (0 if old is None else old.nbytes)
        own = _Entry(entry.visit, entry.error_TD.clone(), entry.before_TD)  # a view would keep the whole batch
        self._entries[key] = own

    def _forget(self) -> None:
        while self._nbytes > self._limit:
            rank, key = heapq.heappop(self._highest)
            self._ranks_below = -rank
            self._nbytes -= self._entries.pop(key).nbytes


def _rank(key: Hashable) -> int:
    """The same in every process."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def _sum(values_TD: Tensor, errors: Sequence[Tensor | None], lengths: Sequence[int]) -> Tensor:
    """Values plus errors, row by row, in fp32 at least."""
    total_TD = values_TD.to(torch.promote_types(values_TD.dtype, torch.float32), copy=True)
    for row_TD, error_TD in zip(total_TD.split_with_sizes(list(lengths)), errors, strict=True):
        if error_TD is not None:
            row_TD += error_TD
    return total_TD
