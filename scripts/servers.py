"""Servers of GPT-2 small with many clients below, as benchmarks need them: no network, no data, no other roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from splitllm.model.joined import Rows
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import adapter_parameters, add_lora, matched_modules
from splitllm.model.randomness import MicroBatchId
from splitllm.model.shard import Shard
from splitllm.model.tenants import Tenants
from splitllm.model.trainable import Trainable
from splitllm.policy.batching import Budget, Request, cohort
from splitllm.recipe import LoraRecipe, OptimizerRecipe, ServerRecipe
from splitllm.roles import questions
from splitllm.roles.assembly import BATCH_OVERHEAD
from splitllm.roles.questions import LossAsk, Upward
from splitllm.roles.worker import Ask, Worker

WIDTH, WORDS, RANK = 768, 50257, 8
CPU = torch.device("cpu")
DEFAULT = Budget(ServerRecipe().tokens, bytes=1 << 62, wait=0.0, starve=0.0, overhead=BATCH_OVERHEAD)
ONE_BATCH = replace(DEFAULT, tokens=1 << 62)


@dataclass(frozen=True)
class Place:
    """Which blocks a server holds, and whether norm, head and loss too."""

    start: int
    stop: int
    head: bool


PLACES = {"edge": Place(2, 10, head=False), "top": Place(8, 12, head=True)}


@dataclass(frozen=True)
class Load:
    """What a server has to do in a step.

    Attributes:
        place: a key of `PLACES`.
        adapters: "shared" or "per_client".
        lengths: client -> tokens of each of its rows.
        entries: client -> its cut layer.
        dropout: of the adapters.
        checkpointing: whether activations are computed again in the backward.
    """

    place: str
    adapters: str
    lengths: tuple[tuple[int, ...], ...]
    entries: tuple[int, ...]
    dropout: float = 0.0
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.lengths))


def build(base: Path, load: Load) -> Worker:
    """A server whose adapters have been trained a little: no B is zero."""
    place, lora = PLACES[load.place], LoraRecipe(rank=RANK, dropout=load.dropout)
    checkpoint = Checkpoint(base)
    shard = Shard.from_pretrained(checkpoint, place.start, place.stop, head=place.head)
    modules, own = matched_modules(checkpoint.config, None), dict[int, Trainable]()
    if load.adapters == "shared":
        add_lora(shard, lora, modules, seed=0)
        together = Trainable(adapter_parameters(shard), OptimizerRecipe())
    else:
        tenants, together = Tenants(shard, modules, range(12), seed=0), Trainable({}, OptimizerRecipe())
        for client, entry in enumerate(load.entries):
            own[client] = Trainable(tenants.add(client, entry, lora, torch.float32, CPU), OptimizerRecipe())
    for trainable in (together, *own.values()):
        for name, parameter in trainable.parameters.items():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.02)
    if load.checkpointing:
        shard.checkpoint_activations()
    return Worker(shard, together, CPU, own=own)


class Traffic:
    """What the clients of a load send to a worker: random, the same in every step; the budget is of its batches."""

    def __init__(self, worker: Worker, load: Load, budget: Budget = DEFAULT) -> None:
        present = {client: own for client, own in worker.own.items() if client < len(load.lengths)}
        self.worker, self.load, self.budget = replace(worker, own=present), load, budget
        generator = torch.Generator().manual_seed(1)
        counts = [sum(lengths) for lengths in load.lengths]
        self._hidden = [torch.randn(count, WIDTH, generator=generator) for count in counts]
        self._gradients = [torch.randn(count, WIDTH, generator=generator) for count in counts]
        self._positions = [torch.arange(0, count, 2) for count in counts]
        self._targets = [torch.randint(WORDS, p.shape, generator=generator) for p in self._positions]

    def together(self) -> None:
        """One step, batched as a synchronous server does it."""
        rows = self._rows()
        requests = [
            Request(number, str(number), False, each.lengths, each.entry, 0.0, 0, each.micro_batch)
            for number, each in enumerate(rows)
        ]
        self._step(cohort(requests, self.budget), rows)

    def alone(self) -> None:
        """One step, each client's micro-batch by itself."""
        rows = self._rows()
        self._step([(client,) for client in range(len(rows))], rows)

    def _rows(self) -> list[Rows]:
        pairs = zip(self.load.lengths, self.load.entries, strict=False)
        rows = [Rows(MicroBatchId(0, client, 0), lengths, entry) for client, (lengths, entry) in enumerate(pairs)]
        self.worker.expect([each.micro_batch for each in rows])
        return rows

    def _step(self, batches: Sequence[Sequence[int]], rows: Sequence[Rows]) -> None:
        for batch in batches:
            asks = [Ask(rows[client], self._hidden[client], input_gradient=True) for client in batch]
            if self.worker.shard.head is None:
                self._through(batch, asks)
            else:
                self._to_the_loss(batch, asks)

    def _through(self, batch: Sequence[int], asks: Sequence[Ask]) -> None:
        runs = questions.forward(self.worker, asks)
        upwards = [Upward(run, self._gradients[c], run.output_TD) for run, c in zip(runs, batch, strict=True)]
        questions.backward(self.worker, upwards)

    def _to_the_loss(self, batch: Sequence[int], asks: Sequence[Ask]) -> None:
        weight = 1.0 / self.load.tokens
        asked = [LossAsk(a, self._positions[c], self._targets[c], weight) for a, c in zip(asks, batch, strict=True)]
        questions.loss(self.worker, asked)

    def apply(self) -> None:
        """The optimiser steps."""
        for trainable in (self.worker.trainable, *self.worker.own.values()):
            trainable.apply(trainable.gradients(), 1.0, 1.0)
