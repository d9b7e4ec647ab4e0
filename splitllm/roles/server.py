"""A server: the shard of one tier, and above it either another server or the loss. Edge and cloud are this same class.

Shape suffixes: T real tokens of a micro-batch, N labelled positions, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from splitllm.errors import DivergedError, PeerError
from splitllm.model.randomness import MicroBatchId
from splitllm.model.trainable import Tensors, clip_factor, squared_norms
from splitllm.roles.meeting import Meeting
from splitllm.roles.worker import Pass, Worker
from splitllm.wire.link import Link
from splitllm.wire.message import Message

Counts = dict[int, list[int]]
LossWeights = dict[int, float]


@dataclass(frozen=True)
class Top:
    """What only the highest role decides, over all processes that hold a copy of it.

    Attributes:
        weigh: label counts of every client's micro-batches -> weight of every client's summed loss.
        all_counts: joins the counts of all processes.
        all_sums: adds tensors over all processes.
        clip_norm: the largest total gradient norm, or None.
    """

    weigh: Callable[[Counts], LossWeights]
    all_counts: Callable[[Counts], Counts]
    all_sums: Callable[[Tensors], Tensors]
    clip_norm: float | None


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
    ) -> None:
        assert (uplink is None) != (top is None), "a server has a role above it or is the top"
        self.name, self.worker, self.uplink, self.top = name, worker, uplink, top
        self.replicas, self.schedule = replicas, schedule
        self._opening = Meeting(children, self._open)
        self._closing = Meeting(children, self._close)
        self._weights: LossWeights = {}
        self._waiting: dict[MicroBatchId, tuple[Pass, torch.Tensor]] = {}

    async def handle(self, message: Message) -> Message:
        """Answer one request.

        Raises:
            PeerError: it breaks the protocol.
        """
        if message.kind == "open":
            return await self._opening.join(message)
        if message.kind == "close":
            return await self._closing.join(message)
        if message.kind == "forward":
            return await self._forward(message)
        return await self._backward(message)

    # A step opens: label counts go up, loss weights come down.

    async def _open(self, messages: list[Message]) -> Callable[[Message], Message]:
        counts: Counts = {}
        for message in messages:
            counts.update({int(client): list(labels) for client, labels in message.header["labels"].items()})
        step = messages[0].step
        if self.worker is not None:
            self.worker.trainable.expect(
                [MicroBatchId(step, client, index) for client, labels in counts.items() for index in range(len(labels))]
            )
        self._weights = await self._loss_weights(messages[0], counts)
        header = {"weights": self._weights}
        return lambda message: Message("open", self.name, message.micro_batch, header)

    async def _loss_weights(self, message: Message, counts: Counts) -> LossWeights:
        if self.top is not None:
            return self.top.weigh(self.top.all_counts(counts))
        assert self.uplink is not None
        reply = await self.uplink.request(Message("open", self.name, message.micro_batch, {"labels": counts}))
        return {int(client): float(weight) for client, weight in reply.header["weights"].items()}

    # A micro-batch runs: one request where the cloud has the labels, two where the client keeps them.

    async def _forward(self, message: Message) -> Message:
        worker = self._need_worker()
        micro_batch = MicroBatchId(*message.micro_batch)
        train, wanted = bool(message.header["train"]), bool(message.header["input_gradient"])
        run = worker.forward(
            micro_batch,
            message.tensors["hidden_TD"],
            message.header["lengths"],
            message.tensors.get("position_ids_BS"),
            train=train,
            input_gradient=wanted,
        )
        if "targets_N" not in message.tensors:
            return await self._rows(message, run, train)
        gradient_TD, loss = await self._loss(message, run, train)
        tensors = {} if gradient_TD is None else {"gradient_TD": gradient_TD}
        return Message("forward", self.name, message.micro_batch, {"loss": loss}, tensors)

    async def _loss(self, message: Message, run: Pass, train: bool) -> tuple[torch.Tensor | None, float]:
        """Summed loss of the micro-batch, and the gradient of this shard's input where it was asked for."""
        worker = self._need_worker()
        if self.uplink is None:
            head = worker.shard.head
            assert head is not None
            rows_ND, targets_N = self._labelled(run.output_TD, message), message.tensors["targets_N"]
            weight = self._weights[run.micro_batch.client] if train else 1.0
            with torch.set_grad_enabled(rows_ND.requires_grad), worker.autocast():
                weighted, loss = head.loss(rows_ND, targets_N.to(worker.device).long(), weight)
            gradient = worker.backward(run, torch.ones_like(weighted), weighted) if train else None
            return gradient, float(loss)
        reply = await self.uplink.request(self._onward(message, run))
        gradient = worker.backward(run, reply.tensors["gradient_TD"]) if run.output_TD.requires_grad else None
        return gradient, float(reply.header["loss"])

    async def _rows(self, message: Message, run: Pass, train: bool) -> Message:
        """The labels stay with the client: send the last hidden states at the labelled positions back down."""
        if self.uplink is None:
            output = self._labelled(run.output_TD, message)
            rows_ND = output.detach()
        else:
            output = run.output_TD
            rows_ND = (await self.uplink.request(self._onward(message, run))).tensors["rows_ND"]
        if train:
            self._waiting[run.micro_batch] = (run, output)
        return Message("forward", self.name, message.micro_batch, tensors={"rows_ND": rows_ND})

    async def _backward(self, message: Message) -> Message:
        micro_batch = MicroBatchId(*message.micro_batch)
        if micro_batch not in self._waiting:
            raise PeerError(f"{message.sender} sent a gradient for {micro_batch}, which is not waiting for one")
        run, output = self._waiting.pop(micro_batch)
        gradient: torch.Tensor | None = message.tensors["gradient_ND"]
        if self.uplink is not None:
            reply = await self.uplink.request(
                Message("backward", self.name, message.micro_batch, tensors=message.tensors)
            )
            gradient = reply.tensors.get("gradient_TD")
        below = None if gradient is None else self._need_worker().backward(run, gradient, output)
        tensors = {} if below is None else {"gradient_TD": below}
        return Message("backward", self.name, message.micro_batch, tensors=tensors)

    def _labelled(self, output_TD: torch.Tensor, message: Message) -> torch.Tensor:
        return output_TD.index_select(0, message.tensors["positions_N"].to(output_TD.device).long())

    def _onward(self, message: Message, run: Pass) -> Message:
        """The same question for the role above, about this shard's output."""
        header = {**message.header, "input_gradient": run.output_TD.requires_grad}
        tensors = {**message.tensors, "hidden_TD": run.output_TD.detach()}
        return Message("forward", self.name, message.micro_batch, header, tensors)

    # A step closes: norms and sums go up, the total norm, the sums and the commit come down.

    async def _close(self, messages: list[Message]) -> Callable[[Message], Message]:
        norms: dict[str, float] = {}
        sums: Tensors = {}
        for message in messages:
            norms.update(message.header["norms"])
            add_into(sums, message.tensors)
        own = self.worker.trainable.gradients() if self.worker is not None else {}
        (sums if self._shared() else norms).update(own if self._shared() else squared_norms(own))  # type: ignore[arg-type]
        norm, factor, totals = await self._settle(messages[0], norms, sums)
        if self.worker is not None:
            gradients = {name: totals.get(name, own[name]) for name in own}
            self.worker.trainable.apply(gradients, factor, self.schedule(messages[0].step))
        header = {"norm": norm, "factor": factor}

        def reply(message: Message) -> Message:
            tensors = {name: totals[name] for name in message.tensors}
            return Message("close", self.name, message.micro_batch, header, tensors)

        return reply

    async def _settle(
        self, message: Message, norms: dict[str, float], sums: Tensors
    ) -> tuple[float, float, Mapping[str, torch.Tensor]]:
        """Total norm, clipping factor and the sums over all replicas."""
        if self.top is None:
            assert self.uplink is not None
            reply = await self.uplink.request(Message("close", self.name, message.micro_batch, {"norms": norms}, sums))
            return float(reply.header["norm"]), float(reply.header["factor"]), reply.tensors
        totals = self.top.all_sums(sums)
        norm = math.sqrt(math.fsum([*norms.values(), *squared_norms(totals).values()]))
        if not math.isfinite(norm):
            raise DivergedError(f"step {message.step + 1}: the gradient norm is {norm}; lower the learning rate")
        return norm, clip_factor(norm, self.top.clip_norm), totals

    def _shared(self) -> bool:
        """Whether other roles hold this one's adapter, so that gradients and not norms must be summed."""
        return self.replicas > 1

    def _need_worker(self) -> Worker:
        if self.worker is None:
            raise PeerError(f"{self.name} only coordinates: it holds no blocks")
        return self.worker


def add_into(sums: Tensors, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add tensors to the sums by name, in the order of calls."""
    for name, tensor in tensors.items():
        sums[name] = sums[name] + tensor if name in sums else tensor
