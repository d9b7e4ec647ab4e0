"""Micro-batches cut into parts, as they travel to another rank, and what comes back put together.

Shape suffixes: T real tokens of a micro-batch or a part, S its padded length, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from splitllm.model.joined import Rows
from splitllm.model.randomness import MicroBatchId
from splitllm.ranks.shares import Part
from splitllm.roles.worker import Ask


def piece(ask: Ask, part: Part, inputs_TD: torch.Tensor) -> Ask:
    """Some rows of a micro-batch as one; `inputs_TD` are those of all its rows."""
    lengths = ask.rows.lengths[part.start : part.stop]
    positions = ask.position_ids_BS
    return replace(
        ask,
        rows=replace(ask.rows, lengths=lengths),
        inputs=inputs_TD[tokens(ask, part)],
        position_ids_BS=None if positions is None else positions[part.start : part.stop, : max(lengths)],
    )


def tokens(ask: Ask, part: Part) -> slice:
    """Where the real tokens of a part are among those of its micro-batch."""
    before = sum(ask.rows.lengths[: part.start])
    return slice(before, before + sum(ask.rows.lengths[part.start : part.stop]))


def companion(asks: Sequence[Ask]) -> Ask:
    """One token that goes all the way a batch goes, and whose outcome nobody reads.

    A rank whose own rows enter further up, or that has none, computes it, so that all ranks run the same blocks in the
    same order: where weights are sharded they are gathered from all.
    """
    first = asks[0]
    rows = Rows(first.rows.micro_batch, (1,), first.rows.entry)
    return Ask(rows, first.inputs.new_zeros(1, first.inputs.shape[1]), train=first.train)


def put_together(asks: Sequence[Ask], found: Iterator[tuple[Part, torch.Tensor]]) -> list[torch.Tensor]:
    """What was computed of every micro-batch [T, D], from that of its parts."""
    whole: list[torch.Tensor | None] = [None] * len(asks)
    for part, tensor_TD in found:
        ask, into = asks[part.ask], whole[part.ask]
        if into is None:
            into = tensor_TD.new_empty(sum(ask.rows.lengths), tensor_TD.shape[1])
            whole[part.ask] = into
        into[tokens(ask, part)] = tensor_TD
    return [tensor for tensor in whole if tensor is not None]


def go_backward(outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    """Through the graph of those outputs that have one."""
    pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


def described(ask: Ask) -> dict[str, Any]:
    """An ask as it travels, beside its tensors."""
    return {
        "micro_batch": list(ask.rows.micro_batch),
        "lengths": list(ask.rows.lengths),
        "entry": ask.rows.entry,
        "packed": ask.position_ids_BS is not None,
        "train": ask.train,
        "input_gradient": ask.input_gradient,
    }


def tensors_of(ask: Ask) -> list[torch.Tensor]:
    """Its tensors, in the order in which they travel."""
    return [ask.inputs] if ask.position_ids_BS is None else [ask.inputs, ask.position_ids_BS]


def ask_of(values: Mapping[str, Any], tensors: Iterator[torch.Tensor]) -> Ask:
    """An ask as it came."""
    rows = Rows(MicroBatchId(*values["micro_batch"]), tuple(values["lengths"]), values["entry"])
    inputs = next(tensors)
    positions = next(tensors) if values["packed"] else None
    return Ask(rows, inputs, positions, train=values["train"], input_gradient=values["input_gradient"])
