"""What travels between roles: a kind, a few plain header values and named tensors.

Tensors hold real tokens only, never padding. Suffixes: T real tokens of a micro-batch, N labelled positions, D width.

| kind | up | down |
|---|---|---|
| open | label counts of every micro-batch | loss weight of every client |
| forward | hidden_TD, positions_N, and targets_N unless the labels stay | gradient_TD and loss, or rows_ND |
| backward | gradient_ND (labels stay with the client) | gradient_TD |
| close | squared norms, the replicas' summed gradients | total norm, the sums over all replicas |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Kind = Literal["open", "forward", "backward", "close"]


@dataclass(frozen=True)
class Message:
    """One request or its reply.

    Attributes:
        kind: the question asked (table above); a reply has the kind of its request.
        sender: name of the role that sent it.
        micro_batch: (step, client, index); for `open` and `close` only the step counts.
        header: plain values, as JSON can hold them.
        tensors: named tensors.
    """

    kind: Kind
    sender: str
    micro_batch: tuple[int, int, int]
    header: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The step it belongs to."""
        return self.micro_batch[0]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
