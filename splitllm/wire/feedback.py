"""Error feedback: what a lossy codec lost of a row is added to the row the next time it is sent.

Tokens differ from batch to batch, so the error belongs to a row of the training data:
e <- (x + e) - decode(encode(x + e)).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

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
        return _OVERHEAD + self.error_TD.nbytes + (0 if self.before_TD is None else self.before_TD.nbytes)


class ErrorMemory:
    """The errors of rows, in bf16. A step that is run again reads what it read the first time and sends the same bytes.

    All visits of a row in one step read the error from before it; the last visit by (index, place) leaves its own.

    Args:
        limit_bytes: the least recently sent rows are forgotten beyond it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._nbytes = limit_bytes, 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

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
        self._nbytes += entry.nbytes - (0 if old is None else old.nbytes)
        own = _Entry(entry.visit, entry.error_TD.clone(), entry.before_TD)  # a view would keep the whole batch
        self._entries[key] = own
        self._entries.move_to_end(key)
        while self._nbytes > self._limit:
            _, forgotten = self._entries.popitem(last=False)
            self._nbytes -= forgotten.nbytes


def _sum(values_TD: Tensor, errors: Sequence[Tensor | None], lengths: Sequence[int]) -> Tensor:
    """Values plus errors, row by row, in fp32 at least."""
    total_TD = values_TD.to(torch.promote_types(values_TD.dtype, torch.float32), copy=True)
    for row_TD, error_TD in zip(total_TD.split_with_sizes(list(lengths)), errors, strict=True):
        if error_TD is not None:
            row_TD += error_TD
    return total_TD
