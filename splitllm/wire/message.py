"""What travels between roles: a kind, a few plain header values and named tensors.

Tensors hold real tokens only, never padding. Suffixes: T real tokens of a micro-batch, N labelled positions, D width.

| kind | up | down |
|---|---|---|
| join | which states every role below has in its journal | the state to go on from, the generation that begins |
| share | the states that others lack | the same states, to those who lack them |
| open | label counts of every micro-batch | loss weight of every client |
| forward | hidden_TD, positions_N, and targets_N unless the labels stay | gradient_TD and loss, or rows_ND |
| backward | gradient_ND (labels stay with the client) | gradient_TD |
| close | squared norms, the replicas' summed gradients, losses | total norm, factors, the sums over all replicas |
| secure | of a client, what hides its words in the sum of a round | what the others sent of that |
| round | adapters and what they weigh, as far up as averages are due | what all holders go on from |
| merge | of a server whose clients go at their own pace, what their rounds have made | what it goes on from |
| evaluated | held-out losses of every client | |
| finish | the adapters of the tiers below | |
| diverged | in words what is not finite | never an answer: the run is over |

Roles of one process need no `join`, `share`, `merge`, `evaluated`, `finish` and `diverged`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

Kind = Literal[
    "join",
    "share",
    "open",
    "forward",
    "backward",
    "close",
    "secure",
    "round",
    "merge",
    "evaluated",
    "finish",
    "diverged",
]
KINDS: tuple[str, ...] = get_args(Kind)
TOGETHER = frozenset({"join", "share", "open", "close", "secure", "round", "evaluated", "finish"})
"""Kinds that are answered when every child that takes part has sent its own."""


@dataclass(frozen=True)
class Message:
    """One request or its reply.

    Attributes:
        kind: the question asked (table above); a reply has the kind of its request.
        sender: name of the role that sent it.
        micro_batch: (step, client, index); for all but `forward` and `backward` only the step counts.
        header: plain values, as JSON can hold them.
        tensors: named tensors.
        generation: the stretch of the run between two recoveries that it belongs to.
    """

    kind: Kind
    sender: str
    micro_batch: tuple[int, int, int]
    header: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    generation: int = 0

    @property
    def step(self) -> int:
        """The step it belongs to."""
        return self.micro_batch[0]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
