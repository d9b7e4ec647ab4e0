"""Between padded batches, which blocks compute on, and real tokens, which travel.

Shape suffixes: B rows, S padded length, T real tokens row after row, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


def real_positions(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where the T real tokens lie in the flattened [B * S] batch of right-padded rows."""
    longest = max(lengths)
    rows = [torch.arange(row * longest, row * longest + length) for row, length in enumerate(lengths)]
    return torch.cat(rows).to(device)


def pad(hidden_TD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Real tokens [T, D] to a right-padded batch [B, S, D], zeros in the padding."""
    rows, longest = len(lengths), max(lengths)
    if hidden_TD.shape[0] == rows * longest:
        return hidden_TD.reshape(rows, longest, -1)
    by_row = torch.split(hidden_TD, list(lengths))
    padded_BSD: torch.Tensor = pad_sequence(list(by_row), batch_first=True)
    return padded_BSD


def beside(above: torch.Tensor | None, below: torch.Tensor) -> torch.Tensor:
    """Two right-padded batches [B, S, ...] as one, the shorter padded further; None stands for no rows."""
    if above is None:
        return below
    longest = max(above.shape[1], below.shape[1])
    return torch.cat([_widened(above, longest), _widened(below, longest)])


def unpad(hidden_BSD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """A right-padded batch [B, S, D] to its real tokens [T, D]."""
    flat = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    if flat.shape[0] == sum(lengths):
        return flat
    return flat.index_select(0, real_positions(lengths, flat.device))


def _widened(batch_BSX: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - batch_BSX.shape[1]
    return F.pad(batch_BSX, (0, 0) * (batch_BSX.dim() - 2) + (0, missing)) if missing else batch_BSX
