"""Dropout in front of the adapter, by masks that do not depend on who else is in the batch.

A mask is keyed by seed, micro-batch and the adapted module's name, and drawn over the real tokens of that micro-batch.

Shape suffixes: B rows of the batch, S padded length, T real tokens of one micro-batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from splitllm.model.joined import Rows
from splitllm.model.randomness import DropoutKey, MicroBatchId, seed_of


class AdapterDropout(nn.Module):
    """Stands in the place of PEFT's `lora_dropout` of one module, for one adapter that all micro-batches share.

    Args:
        rate: the share of values that are dropped.
        name: the adapted module's, in the whole model.
        layer: its global block.
        key: of the shard.
    """

    def __init__(self, rate: float, name: str, layer: int, key: DropoutKey) -> None:
        super().__init__()
        self.rate, self.name, self.layer, self.key = rate, name, layer, key

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Drop values while training."""
        if not self.training:
            return x_BSD
        if self.key.joined is None:
            return self._alone(x_BSD)
        members = self.key.joined.at(self.layer)
        return dropped(x_BSD, members, lambda _: self.rate, self.key.seed, self.name)

    def _alone(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if self.key.micro_batch is None:
            return F.dropout(x_BSD, self.rate)
        rows = Rows(self.key.micro_batch, (x_BSD.shape[1],) * x_BSD.shape[0])
        return dropped(x_BSD, [rows], lambda _: self.rate, self.key.seed, self.name)


def dropped(
    x_BSD: torch.Tensor, members: Sequence[Rows], rate: Callable[[int], float], seed: int, name: str
) -> torch.Tensor:
    """Values dropped at each member's own rate, the others scaled up.

    Args:
        x_BSD: the rows of the members, one after another, right-padded.
        members: whose they are.
        rate: client -> the share of its values that are dropped.
        seed: of the run.
        name: of the adapted module.
    """
    rates = [rate(member.micro_batch.client) for member in members]
    if not any(rates):
        return x_BSD
    drop_BSD = torch.zeros(x_BSD.shape, dtype=torch.bool)
    row = 0
    for member, share in zip(members, rates, strict=True):
        if share:
            _draw(drop_BSD[row : row + len(member.lengths)], member, share, seed_of(*_key(seed, member, name)))
        row += len(member.lengths)
    scale: float | torch.Tensor = 1.0 / (1.0 - rates[0])
    if len(set(rates)) > 1:
        scales = [1.0 / (1.0 - share) for share, member in zip(rates, members, strict=True) for _ in member.lengths]
        scale = torch.tensor(scales, dtype=x_BSD.dtype, device=x_BSD.device).reshape(-1, 1, 1)
    return (x_BSD * scale).masked_fill(drop_BSD.to(x_BSD.device), 0.0)


def _key(seed: int, member: Rows, name: str) -> tuple[int | str, ...]:
    micro_batch: MicroBatchId = member.micro_batch
    return "adapter dropout", seed, *micro_batch, name


def _draw(drop_BSD: torch.Tensor, member: Rows, rate: float, seed: int) -> None:
    """One member's mask, from a generator of its own: real tokens row after row, whatever the padding."""
    generator = torch.Generator().manual_seed(seed)
    drop_TD = torch.rand(sum(member.lengths), drop_BSD.shape[2], generator=generator, dtype=torch.float32) < rate
    first = 0
    for row, length in enumerate(member.lengths):
        drop_BSD[row, :length] = drop_TD[first : first + length]
        first += length
