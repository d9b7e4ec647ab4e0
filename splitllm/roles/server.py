"""A server: the shard of one tier, and above it either another server or the loss. Edge and cloud are this same class.

Shape suffixes: T real tokens of a micro-batch, N labelled positions, D hidden width.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from splitllm.errors import PeerError
from splitllm.model.common import Gift
from splitllm.model.joined import Rows
from splitllm.model.randomness import MicroBatchId
from splitllm.model.trainable import Tensors
from splitllm.roles.batcher import Alone
from splitllm.roles.closing import Closing, Settled, apply, scale_of, settle
from splitllm.roles.convening import Convener, Reports
from splitllm.roles.device import Device, Inline
from splitllm.roles.elsewhere import Elsewhere
from splitllm.roles.hall import Hall
from splitllm.roles.in_lane import InLane
from splitllm.roles.local import Local, LocalStep
from splitllm.roles.meeting import Meeting
from splitllm.roles.questions import LossAsk, Upward, labelled
from splitllm.roles.rounds import Rounds
from splitllm.roles.runner import Batching, Runner
from splitllm.roles.together import (
    Crossed,
    answered,
    expected,
    finite,
    is_loss,
    no_commit,
    travelled,
    weights_in,
)
from splitllm.roles.worker import Ask, Pass, Worker
from splitllm.wire.link import Link, Traffic
from splitllm.wire.message import Kind, Message

Counts = dict[int, list[int]]
LossWeights = dict[int, float]
Commit = Callable[[int, int], Callable[[], None] | None]


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


def unobserved_round(_steps: int, _reports: Reports) -> None:
    """The same of rounds."""


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
        observe_round: told of the steps done, and what each server that averaged has to say of it.
        elsewhere: what averages this tree with others; None: it is the only one.
    """

    weigh: Callable[[Counts], LossWeights]
    all_counts: Callable[[Counts], Counts]
    all_sums: Callable[[Tensors], Tensors]
    clip_norm: float | None
    observe: Callable[[int, StepSums], None] = unobserved
    observe_round: Callable[[int, Reports], None] = unobserved_round
    elsewhere: Elsewhere | None = None


class Server:
    """Serves the roles below it: opens steps, runs micro-batches, closes steps.

    Args:
        name: of this role.
        children: names of the roles below, in the order in which their gradients are summed.
        worker: its shard; None for a mere coordinator of whole-model clients.
        uplink: to the role above; None at the top.
        top: what the highest role decides; None below the top.
        summed: names of the adapter tensors that other roles hold as well, whose gradients are summed.
        entries: client -> its cut layer, of those that are cut above the first block here.
        schedule: step -> multiplier of the learning rate.
        device: where it computes.
        batching: runs its micro-batches; None to run each alone.
        traffic: what of the bytes that cross its uplink is told of it; None: all.
        local: how it steps by itself between rounds; None: with all others.
        rounds: its part of them.
        lane: whether it serves one client, which goes at its own pace, and has its rounds in a hall or further down.
        hall: of the server that is right above clients with a lane each.
        commit: called with the number of steps done and the generation, once a step is applied and before anybody is
            told. What it returns is called beside the device, and waited for, too.

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
        summed: Collection[str] = (),
        entries: Mapping[int, int] | None = None,
        schedule: Callable[[int], float],
        device: Device | None = None,
        batching: Batching | None = None,
        traffic: Traffic | None = None,
        local: Local | None = None,
        rounds: Rounds | None = None,
        lane: bool = False,
        hall: Hall | None = None,
        commit: Commit = no_commit,
    ) -> None:
        assert (uplink is None) != (top is None), "a server has a role above it or is the top"
        self.name, self.worker, self.uplink, self.top = name, worker, uplink, top
        self.summed, self.entries, self.schedule = frozenset(summed), entries or {}, schedule
        self.device, self.commit = device or Inline(), commit
        self.local, self.rounds, self._lane, self._hall = local, rounds, lane, hall
        self.batching = batching or (Alone(Runner(worker, self.device)) if worker is not None else None)
        self.crossed = Crossed(traffic or (uplink.traffic if uplink is not None else Traffic()))
        self._waiting: dict[MicroBatchId, tuple[Pass, torch.Tensor, int]] = {}
        self.begin(children, 0)

    @property
    def elsewhere(self) -> Elsewhere | None:
        """What averages this tree with others, at the top of a site."""
        return None if self.top is None else self.top.elsewhere

    def begin(self, children: Sequence[str], generation: int) -> None:
        """Start afresh with these children: whatever was under way is forgotten."""
        self.generation = generation
        self._opening, self._closing = Meeting(children, self._open), Meeting(children, self._close)
        self._convener = self._convened(children)
        self._weights: LossWeights = {}
        self._scales: dict[int, float] = {}
        self._labels: dict[int, int] = {}
        self._tokens: dict[int, int] = {}
        for run, _, _ in self._waiting.values():
            self._need_batching().abandon(run)
        self._waiting = {}
        self._due: dict[MicroBatchId, str] = {}
        self._begun: set[MicroBatchId] = set()

    def _convened(self, children: Sequence[str]) -> Convener | InLane | None:
        if self.rounds is None:
            return None
        return InLane(self, self.rounds, self._hall) if self._lane else Convener(self, self.rounds, children)

    async def handle(self, message: Message) -> Message:
        """Answer one request.

        Raises:
            PeerError: it breaks the protocol.
        """
        if message.kind == "open":
            return await self._opening.join(message)
        if message.kind == "close":
            self._check_done(message)
            if self._convener is not None:
                self._convener.closed(message.micro_batch[1])
            return await self._closing.join(message)
        if message.kind in ("round", "secure") and self._convener is not None:
            return await self._convener.hold(message)
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
        asked = self._convener.asked(step) if self._convener is not None else None
        for message in messages:
            own = {int(client): list(labels) for client, labels in message.header["labels"].items()}
            own = {client: labels if asked is None or client in asked else [] for client, labels in own.items()}
            ids = [MicroBatchId(step, client, index) for client, labels in own.items() for index in range(len(labels))]
            due.update(dict.fromkeys(ids, message.sender))
            counts.update(own)
        self._weights = await self._loss_weights(messages[0], counts)
        self._labels = {client: sum(labels) for client, labels in counts.items()}
        self._scales = {client: scale_of(self._weights[client], labels) for client, labels in self._labels.items()}
        self._tokens = dict.fromkeys(counts, 0)
        if self.worker is not None and self.batching is not None:
            self.worker.expect(list(due))
            self.batching.expect(list(due))
            self._due, self._begun = due, set()
        header: dict[str, Any] = {"weights": self._weights}

        def reply(message: Message) -> Message:
            here = asked is None or any(int(client) in asked for client in message.header["labels"])
            told = header if self.rounds is None else {**header, "takes_part": here}
            return self.message("open", message.micro_batch, told)

        return reply

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
            self._tokens[micro_batch.client] += sum(message.header["lengths"])
        return micro_batch

    def _check_done(self, message: Message) -> None:
        missing = [micro_batch for micro_batch, child in self._due.items() if child == message.sender]
        if missing:
            raise PeerError(f"{message.sender} closes step {message.step}, but {missing[0]} has no gradient yet")

    def _ask(self, message: Message) -> Ask:
        micro_batch = MicroBatchId(*message.micro_batch)
        return Ask(
            Rows(micro_batch, tuple(message.header["lengths"]), self.entries.get(micro_batch.client, 0)),
            message.tensors["hidden_TD"],
            message.tensors.get("position_ids_BS"),
            train=bool(message.header["train"]),
            input_gradient=bool(message.header["input_gradient"]),
        )

    async def _loss(self, message: Message) -> tuple[torch.Tensor | None, float]:
        """At the top: forward, loss and backward at once."""
        ask = self._ask(message)
        weight = self._weights[ask.rows.micro_batch.client] if ask.train else 1.0
        tensors = message.tensors
        return await self._need_batching().loss(LossAsk(ask, tensors["positions_N"], tensors["targets_N"], weight))

    async def _loss_above(self, message: Message) -> tuple[torch.Tensor | None, float]:
        """Below the top: forward, the question upwards, and backward with its answer."""
        assert self.uplink is not None
        batching = self._need_batching()
        run = await batching.forward(self._ask(message))
        with self._or_abandon(run):
            reply = await self.uplink.request(self._onward(message, run))
            loss = travelled(answered(reply, "loss", is_loss))
            if not run.output_TD.requires_grad:
                return None, loss
            gradient_TD = expected(reply, "gradient_TD", tuple(run.output_TD.shape))
        return await batching.backward(Upward(run, gradient_TD, run.output_TD)), loss

    async def _rows(self, message: Message) -> Message:
        """The labels stay with the client: send the last hidden states at the labelled positions back down."""
        run = await self._need_batching().forward(self._ask(message))
        output = run.output_TD
        if self.uplink is None:
            output = labelled(run, message.tensors["positions_N"])
            rows_ND = output.detach()
        else:
            shape = (message.tensors["positions_N"].shape[0], run.output_TD.shape[1])
            with self._or_abandon(run):
                rows_ND = expected(await self.uplink.request(self._onward(message, run)), "rows_ND", shape)
        if message.header["train"]:
            self._waiting[run.micro_batch] = (run, output, message.tensors["positions_N"].shape[0])
        return self.message("forward", message.micro_batch, {}, {"rows_ND": rows_ND})

    async def _backward(self, message: Message) -> Message:
        micro_batch = MicroBatchId(*message.micro_batch)
        if micro_batch not in self._waiting:
            raise PeerError(f"{message.sender} sent a gradient for {micro_batch}, which is not waiting for one")
        run, output, labels = self._waiting.pop(micro_batch)
        with self._or_abandon(run):
            gradient: torch.Tensor | None = expected(message, "gradient_ND", (labels, run.output_TD.shape[1]))
            if self.uplink is not None:
                reply = await self.uplink.request(self.message("backward", message.micro_batch, {}, message.tensors))
                gradient = reply.tensors.get("gradient_TD")
                if output.requires_grad:
                    gradient = expected(reply, "gradient_TD", tuple(output.shape))
        below = None
        if gradient is not None and output.requires_grad:
            below = await self._need_batching().backward(Upward(run, gradient, output))
        self._due.pop(micro_batch, None)
        return self.message("backward", message.micro_batch, {}, {} if below is None else {"gradient_TD": below})

    @contextmanager
    def _or_abandon(self, run: Pass) -> Iterator[None]:
        """Should no gradient come, those that it ran with do not wait for it."""
        try:
            yield
        except BaseException:
            self._need_batching().abandon(run)
            raise

    def _onward(self, message: Message, run: Pass) -> Message:
        """The same question for the role above, about this shard's output."""
        header = {**message.header, "input_gradient": run.output_TD.requires_grad}
        tensors = {**message.tensors, "hidden_TD": run.output_TD.detach()}
        return self.message("forward", message.micro_batch, header, tensors)

    # A step closes: norms and sums go up, the total norm, the sums and the commit come down.

    async def _close(self, messages: list[Message]) -> Callable[[Message], Message]:
        closing, step = Closing(), messages[0].step
        for message in messages:
            closing.take(message)
        mine: LocalStep | None = None
        if self.worker is not None:
            mine = self.local.step_of(self.worker, self._shares()) if self.local is not None else None
            norm = None if mine is None else (self.name, mine.norm)
            closing.hand_in(self.worker, self.summed, self._scales, norm)
        settled = await self._settle(messages[0], closing)
        if self._convener is not None:
            self._convener.count(self._labels, closing.losses)
        await self._apply(step, settled, self._gift(step), mine)

        def reply(message: Message) -> Message:
            below = {int(client) for client in message.header["own"]}
            sums = {name: settled.sums[name] for name in message.tensors}
            return self.message("close", message.micro_batch, settled.header(below), sums)

        return reply

    def _shares(self) -> dict[int, float]:
        """Each client's part of the loss over all clients."""
        return {client: self._weights[client] * labels for client, labels in self._labels.items()}

    def _gift(self, step: int) -> Gift | None:
        """Whose step this is, where it is that of one client, by what the server has seen of it."""
        if len(self._labels) != 1:
            return None
        ((client, labels),) = self._labels.items()
        return Gift(client, step, labels, self._tokens[client])

    async def _apply(self, step: int, settled: Settled, gift: Gift | None, mine: LocalStep | None) -> None:
        """One optimiser step and, unless a round belongs to it, its commit; the device does not wait for the disk."""
        round_follows = self._convener is not None and self._convener.follows(step + 1)

        def job() -> Callable[[], None] | None:
            if self.worker is not None:
                apply(self.worker, settled, self.schedule(step), gift, mine)
            return None if round_follows else self.commit(step + 1, self.generation)

        write = await self.device.run(job)
        if write is not None:
            await asyncio.to_thread(write)

    async def _settle(self, message: Message, closing: Closing) -> Settled:
        """What all step by: decided at the top, heard from above elsewhere."""
        if self.top is None:
            assert self.uplink is not None
            closing.crossed[self.name] = self.crossed.since_asked()
            question = self.message("close", message.micro_batch, closing.header(), closing.sums)
            return Settled.from_reply(await self.uplink.request(question), closing)
        totals = self.top.all_sums(closing.sums)
        settled = settle(message.step, closing, totals, self.top.clip_norm, self._scales)
        self.top.observe(message.step, StepSums(closing.losses, closing.crossed, settled.norm))
        return settled

    def _need_batching(self) -> Batching:
        if self.batching is None:
            raise PeerError(f"{self.name} only coordinates: it holds no blocks")
        return self.batching
