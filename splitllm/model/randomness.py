"""Randomness keyed by what it is for, never by the order in which it is drawn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from splitllm.model.joined import Joined

EMBEDDINGS = -1  # stands for the embedding dropout, which lies below block 0


class MicroBatchId(NamedTuple):
    """Names one micro-batch of a run; their order is the order in which gradients are summed."""

    step: int
    client: int
    number: int


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from any key, the same on every machine and Python version."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class DropoutKey:
    """What the dropout masks of the batch now being computed are keyed by; one a shard.

    Set it before every forward and backward (activation checkpointing draws again in the backward).

    Attributes:
        seed: of the run.
        micro_batch: the only one of the batch; None if it has several, whose base model must not drop anything.
        joined: all of the batch, where it is more than a bare call of the shard.
    """

    seed: int
    micro_batch: MicroBatchId | None = None
    joined: Joined | None = None

    def begin(self, joined: Joined) -> None:
        """Key what is computed from here on by the micro-batches of this batch."""
        self.joined = joined
        self.micro_batch = joined.members[0].micro_batch if len(joined.members) == 1 else None

    def reseed(self, layer: int) -> None:
        """Start the base model's masks of one layer."""
        if self.micro_batch is None:
            return
        seed = seed_of("dropout", self.seed, *self.micro_batch, layer)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed does the same for every backend, in milliseconds
        if torch.cuda.is_available():
            torch.cuda.manual_seed(seed)


def key_dropout(module: nn.Module, layer: int, key: DropoutKey) -> None:
    """Make `module`, which holds global layer `layer`, draw its dropout masks from the key."""

    def reseed(owner: nn.Module, _args: object) -> None:
        if owner.training:
            key.reseed(layer)

    module.register_forward_pre_hook(reseed)
