"""A server: the shard of one tier, and above it either another server or the loss. Edge and cloud are this same class.

Shape suffixes: T real tokens of a micro-batch, N labelled positions, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from splitllm.errors import DivergedError, PeerError
from splitllm.model.randomness import MicroBatchId
from splitllm.model.trainable import Tensors, clip_factor, squared_norms
from splitllm.roles.device import Device, Inline
from splitllm.roles.meeting import Meeting
from splitllm.roles.together import (
    Crossed,
    add_into,
    answered,
    expected,
    finite,
    is_loss,
    is_number,
    no_commit,
    travelled,
    weights_in,
)
from splitllm.roles.worker import Pass, Worker
from splitllm.wire.link import Link, Traffic
from splitllm.wire.message import Kind, Message

Counts = dict[int, list[int]]
LossWeights = dict[int, float]


@dataclass(frozen=True)
class StepSums:
    """What the children tell of a step when it closes.

    Attributes:
        losses: client -> summed loss (None if it is not finite), labels, tokens.
        crossed: role -> bytes up and down over its link since the last step.
        norm: total gradient norm.
    """

    losses: Mapping[int, Sequence[Any]]
    crossed: Mapping[str, Sequence[int]]
    norm: float


def unobserved(_step: int, _sums: StepSums) -> None:
    """For a top whose run is watched from outside."""


@dataclass(frozen=True)
class Top:
    """What only the highest role decides, over all processes that hold a copy of it.

    Attributes:
        weigh: label counts of every client's micro-batches -> weight of every client's summed loss.
        all_counts: joins the counts of all processes.
        all_sums: adds tensors over all processes.
        clip_norm: the largest total gradient norm, or None.
        observe: told of every step, before it is committed.
    """

    weigh: Callable[[Counts], LossWeights]
    all_counts: Callable[[Counts], Counts]
    all_sums: Callable[[Tensors], Tensors]
    clip_norm: float | None
    observe: Callable[[int, StepSums], None] = unobserved


class Server:
    """Serves the roles below it: opens steps, runs micro-batches, closes steps.

    Args:
        name: of this role.
        children: names of the roles below, in the order in which their gradients are summed.
        worker: its shard; None for a mere coordinator of whole-model clients.
        uplink: to the role above; None at the top.
        top: what the highest role decides; None below the top.
        replicas: how many roles hold the same adapter as this one.
        schedule: step -> multiplier of the learning rate.
        device: where it computes.
        commit: called with the number of steps done and the generation, once a step is applied and before anybody is
            told.

    Attributes:
        generation: the stretch of the run that its messages belong to.
    """

    def __init__(
        self,
        name: str,
        children: Sequence[str],
        worker: Worker | None,
        *,
        uplink: Link | None = None,
        top: Top | None = None,
        replicas: int = 1,
        schedule: Callable[[int], float],
        device: Device | None = None,
        commit: Callable[[int, int], None] = no_commit,
    ) -> None:
        assert (uplink is None) != (top is None), "a server has a role above it or is the top"
        self.name, self.worker, self.uplink, self.top = name, worker, uplink, top
        self.replicas, self.schedule = replicas, schedule
        self.device, self.commit = device or Inline(), commit
        self.crossed = Crossed(uplink.traffic if uplink is not None else Traffic())
        self.begin(children, 0)

    def begin(self, children: Sequence[str], generation: int) -> None:
        """Start afresh with these children: whatever was under way is forgotten."""
        self.generation = generation
        self._opening, self._closing = Meeting(children, self._open), Meeting(children, self._close)
        self._weights: LossWeights = {}
        self._waiting: dict[MicroBatchId, tuple[Pass, torch.Tensor, int]] = {}
        self._due: dict[MicroBatchId, str] = {}
        self._begun: set[MicroBatchId] = set()

    async def handle(self, message: Message) -> Message:
        """Answer one request.

        Raises:
            PeerError: it breaks the protocol.
        """
        if message.kind == "open":
            return await self._opening.join(message)
        if message.kind == "close":
            self._check_done(message)
            return await self._closing.join(message)
        if message.kind == "forward":
            return await self._forward(message)
        if message.kind == "backward":
            return await self._backward(message)
        raise PeerError(f"{message.sender} sent {message.kind}, which {self.name} does not answer")

    def message(
        self,
        kind: Kind,
        micro_batch: tuple[int, int, int],
        header: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> Message:
        """A request or reply of this server in the generation that it is in."""
        return Message(kind, self.name, micro_batch, header or {}, tensors or {}, self.generation)

    # A step opens: label counts go up, loss weights come down.

    async def _open(self, messages: list[Message]) -> Callable[[Message], Message]:
        counts: Counts = {}
        step, due = messages[0].step, dict[MicroBatchId, str]()
        for message in messages:
            own = {int(client): list(labels) for client, labels in message.header["labels"].items()}
            ids = [MicroBatchId(step, client, index) for client, labels in own.items() for index in range(len(labels))]
            due.update(dict.fromkeys(ids, message.sender))
            counts.update(own)
        self._weights = await self._loss_weights(messages[0], counts)
        if self.worker is not None:
            self.worker.trainable.expect(list(due))
            self._due, self._begun = due, set()
        header = {"weights": self._weights}
        return lambda message: self.message("open", message.micro_batch, header)

    async def _loss_weights(self, message: Message, counts: Counts) -> LossWeights:
        if self.top is not None:
            return self.top.weigh(self.top.all_counts(counts))
        assert self.uplink is not None
        reply = await self.uplink.request(self.message("open", message.micro_batch, {"labels": counts}))
        return weights_in(reply, counts)

    # A micro-batch runs: one request where the cloud has the labels, two where the client keeps them.

    async def _forward(self, message: Message) -> Message:
        micro_batch = self._check_due(message)
        if "targets_N" not in message.tensors:
            return await self._rows(message)
        gradient_TD, loss = await (self._loss(message) if self.uplink is None else self._loss_above(message))
        self._due.pop(micro_batch, None)
        tensors = {} if gradient_TD is None else {"gradient_TD": gradient_TD}
        return self.message("forward", message.micro_batch, {"loss": finite(loss)}, tensors)

    def _check_due(self, message: Message) -> MicroBatchId:
        """A training micro-batch was announced when the step opened, and comes once."""
        micro_batch = MicroBatchId(*message.micro_batch)
        if message.header["train"]:
            if self._due.get(micro_batch) != message.sender or micro_batch in self._begun:
                raise PeerError(f"{message.sender} sent {micro_batch}, which is not due, or for the second time")
            self._begun.add(micro_batch)
        return micro_batch

    def _check_done(self, message: Message) -> None:
        missing = [micro_batch for micro_batch, child in self._due.items() if child == message.sender]
        if missing:
            raise PeerError(f"{message.sender} closes step {message.step}, but {missing[0]} has no gradient yet")

    def _pass(self, message: Message) -> Pass:
        return self._need_worker().forward(
            MicroBatchId(*message.micro_batch),
            message.tensors["hidden_TD"],
            message.header["lengths"],
            message.tensors.get("position_ids_BS"),
            train=bool(message.header["train"]),
            input_gradient=bool(message.header["input_gradient"]),
        )

    async def _loss(self, message: Message) -> tuple[torch.Tensor | None, float]:
        """At the top: forward, loss and backward at once."""
        worker, train = self._need_worker(), bool(message.header["train"])
        head = worker.shard.head
        assert head is not None
        weight = self._weights[message.micro_batch[1]] if train else 1.0

        def job() -> tuple[torch.Tensor | None, float]:
            run = self._pass(message)
            rows_ND, targets_N = self._labelled(run.output_TD, message), message.tensors["targets_N"]
            with torch.set_grad_enabled(rows_ND.requires_grad), worker.autocast():
                weighted, loss = head.loss(rows_ND, targets_N.to(worker.device).long(), weight)
            gradient = worker.backward(run, torch.ones_like(weighted), weighted) if train else None
            return gradient, float(loss)

        return await self.device.run(job)

    async def _loss_above(self, message: Message) -> tuple[torch.Tensor | None, float]:
        """Below the top: forward, the question upwards, and backward with its answer."""
        assert self.uplink is not None
        worker = self._need_worker()
        run = await self.device.run(lambda: self._pass(message))
        reply = await self.uplink.request(self._onward(message, run))
        loss = travelled(answered(reply, "loss", is_loss))
        if not run.output_TD.requires_grad:
            return None, loss
        gradient_TD = expected(reply, "gradient_TD", tuple(run.output_TD.shape))
        return await self.device.run(lambda: worker.backward(run, gradient_TD), urgent=True), loss

    async def _rows(self, message: Message) -> Message:
        """The labels stay with the client: send the last hidden states at the labelled positions back down."""
        run = await self.device.run(lambda: self._pass(message))
        output = run.output_TD
        if self.uplink is None:
            output = self._labelled(run.output_TD, message)
            rows_ND = output.detach()
        else:
            shape = (message.tensors["positions_N"].shape[0], run.output_TD.shape[1])
            rows_ND = expected(await self.uplink.request(self._onward(message, run)), "rows_ND", shape)
        if message.header["train"]:
            self._waiting[run.micro_batch] = (run, output, message.tensors["positions_N"].shape[0])
        return self.message("forward", message.micro_batch, {}, {"rows_ND": rows_ND})

    async def _backward(self, message: Message) -> Message:
        micro_batch = MicroBatchId(*message.micro_batch)
        if micro_batch not in self._waiting:
            raise PeerError(f"{message.sender} sent a gradient for {micro_batch}, which is not waiting for one")
        run, output, labels = self._waiting.pop(micro_batch)
        gradient: torch.Tensor | None = expected(message, "gradient_ND", (labels, run.output_TD.shape[1]))
        if self.uplink is not None:
            reply = await self.uplink.request(self.message("backward", message.micro_batch, {}, message.tensors))
            gradient = reply.tensors.get("gradient_TD")
            if output.requires_grad:
                gradient = expected(reply, "gradient_TD", tuple(output.shape))
        below = None
        if gradient is not None:
            wanted, worker = gradient, self._need_worker()
            below = await self.device.run(lambda: worker.backward(run, wanted, output), urgent=True)
        self._due.pop(micro_batch, None)
        return self.message("backward", message.micro_batch, {}, {} if below is None else {"gradient_TD": below})

    def _labelled(self, output_TD: torch.Tensor, message: Message) -> torch.Tensor:
        return output_TD.index_select(0, message.tensors["positions_N"].to(output_TD.device).long())

    def _onward(self, message: Message, run: Pass) -> Message:
        """The same question for the role above, about this shard's output."""
        header = {**message.header, "input_gradient": run.output_TD.requires_grad}
        tensors = {**message.tensors, "hidden_TD": run.output_TD.detach()}
        return self.message("forward", message.micro_batch, header, tensors)

    # A step closes: norms and sums go up, the total norm, the sums and the commit come down.

    async def _close(self, messages: list[Message]) -> Callable[[Message], Message]:
        norms: dict[str, float | None] = {}
        sums: Tensors = {}
        told = StepSums({}, {}, 0.0)
        for message in messages:
            norms.update(message.header["norms"])
            add_into(sums, message.tensors)
            told = _with(told, message.header)
        own = self.worker.trainable.gradients() if self.worker is not None else {}
        if self._shared():
            sums.update(own)
        else:
            norms.update({name: finite(norm) for name, norm in squared_norms(own).items()})
        norm, factor, totals = await self._settle(messages[0], norms, sums, told)
        await self._apply(messages[0].step, {name: totals.get(name, own[name]) for name in own}, factor)
        header = {"norm": norm, "factor": factor}

        def reply(message: Message) -> Message:
            return self.message("close", message.micro_batch, header, {name: totals[name] for name in message.tensors})

        return reply

    async def _apply(self, step: int, gradients: Tensors, factor: float) -> None:
        """One optimiser step, and its commit."""

        def job() -> None:
            if self.worker is not None:
                self.worker.trainable.apply(gradients, factor, self.schedule(step))
            self.commit(step + 1, self.generation)

        await self.device.run(job)

    async def _settle(
        self, message: Message, norms: Mapping[str, float | None], sums: Tensors, told: StepSums
    ) -> tuple[float, float, Mapping[str, torch.Tensor]]:
        """Total norm, clipping factor and the sums over all replicas."""
        if self.top is None:
            assert self.uplink is not None
            crossed = {**told.crossed, self.name: self.crossed.since_asked()}
            header = {"norms": norms, "losses": told.losses, "bytes": crossed}
            reply = await self.uplink.request(self.message("close", message.micro_batch, header, sums))
            norm, factor = (float(answered(reply, key, is_number)) for key in ("norm", "factor"))
            return norm, factor, {name: expected(reply, name, tuple(tensor.shape)) for name, tensor in sums.items()}
        totals = self.top.all_sums(sums)
        squares = [*norms.values(), *map(finite, squared_norms(totals).values())]
        norm = math.sqrt(math.fsum(map(travelled, squares)))
        if not math.isfinite(norm):
            raise DivergedError(f"step {message.step + 1}: the gradient norm is {norm}; lower the learning rate")
        self.top.observe(message.step, replace(told, norm=norm))
        return norm, clip_factor(norm, self.top.clip_norm), totals

    def _shared(self) -> bool:
        """Whether other roles hold this one's adapter, so that gradients and not norms must be summed."""
        return self.replicas > 1

    def _need_worker(self) -> Worker:
        if self.worker is None:
            raise PeerError(f"{self.name} only coordinates: it holds no blocks")
        return self.worker


def _with(told: StepSums, header: Mapping[str, Any]) -> StepSums:
    """What was told, and what one child's header adds."""
    losses = {int(client): sums for client, sums in header["losses"].items()}
    return StepSums({**told.losses, **losses}, {**told.crossed, **header["bytes"]}, 0.0)
