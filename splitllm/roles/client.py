"""A client: the text, the embeddings and first blocks beside it, and a link to the role above.

Where its shard is the whole model it needs no cut; where the labels stay with it, it computes the loss itself.
Shape suffixes: B rows, S padded length, T real tokens, N labelled positions, D hidden width.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from splitllm.data.batching import BatchStream, MicroBatch
from splitllm.federated.averager import is_finite
from splitllm.model.joined import Rows
from splitllm.model.randomness import MicroBatchId
from splitllm.model.trainable import Tensors
from splitllm.roles.closing import Closing, Settled, apply
from splitllm.roles.device import Device, Inline
from splitllm.roles.hidden import hidden_round
from splitllm.roles.local import Local
from splitllm.roles.outcomes import is_void, outcome_in
from splitllm.roles.rounds import Rounds
from splitllm.roles.together import (
    Crossed,
    answered,
    expected,
    finite,
    gathered,
    is_loss,
    no_commit,
    travelled,
    weights_in,
)
from splitllm.roles.worker import Ask, Pass, Worker
from splitllm.wire.link import Link
from splitllm.wire.message import Kind, Message


@dataclass(frozen=True)
class StepReport:
    """What a client saw of one step (or of one evaluation).

    Attributes:
        loss: summed cross-entropy in nats over its labels.
        labels: predicted tokens.
        tokens: real tokens.
        norm: total gradient norm of the step, over all roles.
    """

    loss: float
    labels: int
    tokens: int
    norm: float = 0.0

    def sums(self) -> list[float | None]:
        """Loss, labels and tokens, as they travel."""
        return [finite(self.loss), self.labels, self.tokens]


class Client:
    """Trains on its own rows.

    Args:
        name: of this client.
        index: its number in the run.
        worker: its shard, with the head if it computes the loss.
        uplink: to its server, or to the coordinator of whole-model clients.
        stream: its training micro-batches.
        evaluation: its held-out micro-batches.
        whole: its shard is the whole model.
        summed: names of the adapter tensors that other roles hold as well, whose gradients are summed.
        accumulate: micro-batches a step.
        in_flight: micro-batches under way at once.
        schedule: step -> multiplier of the learning rate.
        name_rows: tell which of its rows a micro-batch holds, for codecs that carry their error on.
        local: how it steps by itself between rounds; None: with all others.
        rounds: its part of them.
        device: where it computes.
        commit: called with the number of steps done and the generation, once a step is applied and before anything
            else happens.

    Attributes:
        generation: the stretch of the run that its messages belong to.
    """

    def __init__(
        self,
        name: str,
        index: int,
        worker: Worker,
        uplink: Link,
        stream: BatchStream,
        evaluation: Sequence[MicroBatch],
        *,
        whole: bool,
        summed: Collection[str],
        accumulate: int,
        in_flight: int,
        schedule: Callable[[int], float],
        name_rows: bool = False,
        local: Local | None = None,
        rounds: Rounds | None = None,
        device: Device | None = None,
        commit: Callable[[int, int], None] = no_commit,
    ) -> None:
        self.name, self.index, self.worker, self.uplink = name, index, worker, uplink
        self.stream, self.evaluation, self.whole, self.summed = stream, evaluation, whole, frozenset(summed)
        self.accumulate, self.in_flight, self.schedule = accumulate, in_flight, schedule
        self.name_rows, self.local, self.rounds = name_rows, local, rounds
        self.device, self.commit, self.generation = device or Inline(), commit, 0
        self._crossed, self._takes_part = Crossed(uplink.traffic), True

    async def step(self, step: int) -> StepReport:
        """One step: open, run the micro-batches, close."""
        batches = [self.stream.take(step * self.accumulate + index) for index in range(self.accumulate)]
        ids = [MicroBatchId(step, self.index, index) for index in range(len(batches))]
        if self.rounds is not None:
            self.rounds.begin(step)
        weight = await self._open(ids, [batch.labels for batch in batches])
        self._takes_part = weight is not None
        if weight is None:  # others take part in this step
            self.worker.expect([])
            return replace(StepReport(0.0, 0, 0), norm=await self._close(ids[0], StepReport(0.0, 0, 0), 0.0))
        room = asyncio.Semaphore(self.in_flight)

        async def run(micro_batch: MicroBatchId, batch: MicroBatch) -> float:
            async with room:
                return await self._train(micro_batch, batch, weight)

        losses = await gathered(run(*pair) for pair in zip(ids, batches, strict=True))
        report = StepReport(sum(losses), sum(b.labels for b in batches), sum(b.tokens for b in batches))
        return replace(report, norm=await self._close(ids[0], report, weight * report.labels))

    async def evaluate(self) -> StepReport:
        """Loss over the held-out rows: no dropout, no gradient."""
        losses = []
        for index, batch in enumerate(self.evaluation):
            losses.append(await self._evaluate(MicroBatchId(-1, self.index, index), batch))
        self._crossed.since_asked()  # what an evaluation sends is not training traffic
        return StepReport(sum(losses), sum(b.labels for b in self.evaluation), sum(b.tokens for b in self.evaluation))

    def message(
        self,
        kind: Kind,
        micro_batch: tuple[int, int, int],
        header: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> Message:
        """A request of this client in the generation that it is in."""
        return Message(kind, self.name, micro_batch, header or {}, tensors or {}, self.generation)

    async def _open(self, ids: Sequence[MicroBatchId], labels: list[int]) -> float | None:
        """Announce the step's label counts; learn what one nat of this client's loss weighs, if it is to take part."""
        self.worker.expect(ids)
        reply = await self.uplink.request(self.message("open", ids[0], {"labels": {self.index: labels}}))
        if self.rounds is not None and not answered(reply, "takes_part", lambda value: isinstance(value, bool)):
            return None
        return weights_in(reply, [self.index])[self.index]

    async def _train(self, micro_batch: MicroBatchId, batch: MicroBatch, weight: float) -> float:
        if self.whole:
            return await self.device.run(lambda: self._train_whole(micro_batch, batch, weight))
        run = await self.device.run(lambda: self._forward(micro_batch, batch, train=True))
        reply = await self.uplink.request(self._question(run, batch, train=True))
        if self.worker.shard.head is None:
            loss_value = travelled(answered(reply, "loss", is_loss))
        else:
            rows_ND = expected(reply, "rows_ND", (batch.labels, run.output_TD.shape[1]))
            loss_value, gradient_ND = await self.device.run(
                lambda: self._loss_gradient(rows_ND, batch, weight), urgent=True
            )
            reply = await self.uplink.request(self.message("backward", micro_batch, {}, {"gradient_ND": gradient_ND}))
        if run.output_TD.requires_grad:
            gradient_TD = expected(reply, "gradient_TD", tuple(run.output_TD.shape))
            await self.device.run(lambda: self.worker.backward([run], [gradient_TD]), urgent=True)
        return loss_value

    def _train_whole(self, micro_batch: MicroBatchId, batch: MicroBatch, weight: float) -> float:
        run = self._forward(micro_batch, batch, train=True)
        weighted, loss = self._head_loss(self._labelled(run, batch), batch, weight)
        self.worker.backward([run], [torch.ones_like(weighted)], outputs=[weighted])
        return float(loss)

    async def _evaluate(self, micro_batch: MicroBatchId, batch: MicroBatch) -> float:
        run = await self.device.run(lambda: self._forward(micro_batch, batch, train=False))
        if self.whole:
            rows_ND = self._labelled(run, batch)
        else:
            reply = await self.uplink.request(self._question(run, batch, train=False))
            if self.worker.shard.head is None:
                return travelled(answered(reply, "loss", is_loss))
            rows_ND = expected(reply, "rows_ND", (batch.labels, run.output_TD.shape[1]))
        return await self.device.run(lambda: float(self._head_loss(rows_ND, batch)[1]))

    def _forward(self, micro_batch: MicroBatchId, batch: MicroBatch, *, train: bool) -> Pass:
        rows = Rows(micro_batch, tuple(batch.lengths))
        return self.worker.forward([Ask(rows, batch.ids_BS, batch.position_ids_BS, train=train)])[0]

    def _labelled(self, run: Pass, batch: MicroBatch) -> torch.Tensor:
        return run.output_TD.index_select(0, batch.positions_N.to(self.worker.device))

    def _question(self, run: Pass, batch: MicroBatch, *, train: bool) -> Message:
        """What goes up: activations, lengths, labelled positions; targets only where the recipe lets them leave."""
        header: dict[str, Any] = {
            "lengths": list(batch.lengths),
            "train": train,
            "input_gradient": run.output_TD.requires_grad,
        }
        if self.name_rows and train:
            header["rows"] = list(batch.rows)
        tensors = {"hidden_TD": run.output_TD.detach(), "positions_N": batch.positions_N.int()}
        if batch.position_ids_BS is not None:
            tensors["position_ids_BS"] = batch.position_ids_BS.int()
        if self.worker.shard.head is None:
            tensors["targets_N"] = batch.targets_N.int()
        return self.message("forward", run.micro_batch, header, tensors)

    def _head_loss(
        self, rows_ND: torch.Tensor, batch: MicroBatch, weight: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum to go backward from, and plain sum of the loss."""
        head = self.worker.shard.head
        assert head is not None
        with torch.set_grad_enabled(rows_ND.requires_grad), self.worker.autocast():
            device = self.worker.device
            weighted, nats_N = head.loss(rows_ND.to(device), batch.targets_N.to(device), weight)
        return weighted, nats_N.sum()

    def _loss_gradient(self, rows_ND: torch.Tensor, batch: MicroBatch, weight: float) -> tuple[float, torch.Tensor]:
        rows_ND = rows_ND.to(self.worker.device).detach().requires_grad_()
        weighted, loss = self._head_loss(rows_ND, batch, weight)
        (gradient_ND,) = torch.autograd.grad(weighted, rows_ND)
        return float(loss), gradient_ND

    async def _close(self, first: MicroBatchId, report: StepReport, share: float) -> float:
        """Hand in norms, or gradients where other roles step the same adapter; then step, and hold a round if due.

        Args:
            first: place of the step.
            report: of its micro-batches.
            share: this client's part of the loss over all clients.
        """
        closing = Closing(losses={self.index: report.sums()}, crossed={self.name: self._crossed.since_asked()})
        mine = self.local.step_of(self.worker, {self.index: share}) if self.local is not None else None
        norm = None if mine is None else (self.name, mine.norm if mine.factor is not None else 0.0)
        closing.hand_in(self.worker, self.summed, [self.index], norm)
        reply = await self.uplink.request(self.message("close", first, closing.header(), closing.sums))
        settled, rate, steps = Settled.from_reply(reply, closing), self.schedule(first.step), first.step + 1
        await self.device.run(lambda: apply(self.worker, settled, rate, local=mine))
        if self.rounds is not None and (due := self.rounds.due(steps)):
            await self._round(self.rounds, steps, due)
        await self.device.run(lambda: self.commit(steps, self.generation))
        return settled.norm

    async def _round(self, rounds: Rounds, steps: int, due: int) -> None:
        """Send what it has, go on from the average."""
        value = await self.device.run(lambda: rounds.value(due))
        reply = await self._sent(rounds, value, steps)
        if not is_void(reply):
            outcome = outcome_in(reply, value, rounds.arithmetic)
            await self.device.run(lambda: rounds.take(outcome, due, steps))

    async def _sent(self, rounds: Rounds, value: Tensors, steps: int) -> Message:
        """Bring what it has to the round, hidden if the recipe says so; the answer."""
        examples, hiding = {self.index: len(self.stream)}, rounds.hiding

        async def ask(kind: Kind, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Message:
            return await self.uplink.request(self.message(kind, (steps, self.index, 0), header, tensors))

        if hiding is None:
            spoiled = not is_finite(value)  # nothing that is not finite travels
            return await ask("round", {"examples": examples, "spoiled": spoiled}, {} if spoiled else value)
        if not self._takes_part:
            return await ask("round", {"examples": examples}, {})
        words = await self.device.run(lambda: rounds.words(value))
        terms = None if hiding.threshold is None else hiding.terms(steps, self.generation, len(words))
        return await hidden_round(terms, ask, self.name, words, examples)
