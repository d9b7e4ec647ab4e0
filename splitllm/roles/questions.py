"""What a server computes for micro-batches that run together: plain functions of a worker and a list of them.

Shape suffixes: T real tokens of one micro-batch, N its labelled positions, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splitllm.roles.worker import Ask, Pass, Worker


@dataclass(frozen=True)
class LossAsk:
    """A micro-batch at the top, with its labels.

    Attributes:
        ask: the micro-batch.
        positions_N: its labelled positions among its T tokens.
        targets_N: the token ids there.
        weight: of one nat of its loss.
    """

    ask: Ask
    positions_N: torch.Tensor
    targets_N: torch.Tensor
    weight: float


@dataclass(frozen=True)
class Upward:
    """What a micro-batch that has run gets from above: the gradient of what it sent there.

    Attributes:
        run: its forward.
        gradient: of `output`.
        output: what was sent, attached to the graph.
    """

    run: Pass
    gradient: torch.Tensor
    output: torch.Tensor


def forward(worker: Worker, asks: Sequence[Ask]) -> list[Pass]:
    """Run micro-batches together."""
    return worker.forward(asks)


def loss(worker: Worker, questions: Sequence[LossAsk]) -> list[tuple[torch.Tensor | None, float]]:
    """Forward, loss and, while training, backward at once: of each the gradient [T, D] of its input, and its loss."""
    head, train = worker.shard.head, questions[0].ask.train
    assert head is not None
    runs = worker.forward([question.ask for question in questions])
    rows_ND = torch.cat([labelled(run, q.positions_N) for run, q in zip(runs, questions, strict=True)])
    targets_N = torch.cat([q.targets_N for q in questions]).to(rows_ND.device).long()
    counts = [q.targets_N.shape[0] for q in questions]
    weights = torch.tensor([q.weight for q in questions], dtype=torch.float64).repeat_interleave(torch.tensor(counts))
    with torch.set_grad_enabled(rows_ND.requires_grad), worker.autocast():
        weighted, nats_N = head.loss(rows_ND, targets_N, weights)
    losses = [float(nats.sum()) for nats in torch.split(nats_N, counts)]
    gradients: list[torch.Tensor | None] = [None] * len(runs)
    if train:
        gradients = worker.backward(runs, [torch.ones_like(weighted)], outputs=[weighted])
    return list(zip(gradients, losses, strict=True))


def backward(worker: Worker, answers: Sequence[Upward]) -> list[torch.Tensor | None]:
    """Go backward through micro-batches that ran together; of each the gradient [T, D] of its input."""
    runs, outputs = [each.run for each in answers], [each.output for each in answers]
    return worker.backward(runs, [each.gradient for each in answers], outputs=outputs)


def labelled(run: Pass, positions_N: torch.Tensor) -> torch.Tensor:
    """The output at the labelled positions, [N, D]."""
    return run.output_TD.index_select(0, positions_N.to(run.output_TD.device).long())
