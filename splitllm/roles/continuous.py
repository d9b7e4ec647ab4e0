"""Who runs together on a server's device: whoever is ready when it is free.

Gradients go first: a batch that went forward together goes backward once all its gradients are there. Those that have
come do not wait for the others for longer than `patience`; then the batch goes backward for those, and its graph is let
go. Whoever is late goes forward once more, alone or with others that are late, and then backward: a client that answers
slowly, or never, costs itself a forward pass, and holds nobody's memory. Its adapter has not changed since, as its step
is still open; and adapters that others have stepped are in no graph any more.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from splitllm.model.joined import Joined, Rows
from splitllm.model.randomness import MicroBatchId
from splitllm.policy.batching import Budget, Request, Wait, cohort, compose
from splitllm.roles import questions
from splitllm.roles.batcher import request_of
from splitllm.roles.questions import LossAsk, Upward
from splitllm.roles.runner import Job, Runner, Waiting, rows_of
from splitllm.roles.worker import Ask, Pass, Worker

logger = logging.getLogger(__name__)


@dataclass
class Ready:
    """A question that could run."""

    request: Request
    job: Job[Any, Any]
    train: bool
    waiting: Waiting[Any]


@dataclass
class Graph:
    """A batch between its forward and its backward.

    Attributes:
        joined: its micro-batches.
        missing: those whose gradients have not come.
        bytes: that it holds.
        here: gradients that have come.
        due: whether it stands in line for the device.
        timer: until it goes backward without those that are missing.
    """

    joined: Joined
    missing: dict[MicroBatchId, Late]
    bytes: int
    here: dict[MicroBatchId, Waiting[Upward]] = field(default_factory=dict)
    due: bool = False
    timer: asyncio.TimerHandle | None = None


@dataclass(frozen=True)
class Late:
    """A micro-batch whose batch may have gone backward without it.

    Attributes:
        ask: what went forward.
        run: what came of it.
    """

    ask: Ask
    run: Pass


@dataclass(frozen=True)
class Again:
    """It, with its gradient.

    Attributes:
        ask: what goes forward again.
        upward: what came, for its first run.
    """

    ask: Ask
    upward: Upward


class Continuous:
    """Runs what is ready.

    Args:
        runner: of the server.
        budget: of a batch; its bytes are those of all graphs that are held at once, beside one of a micro-batch that is
            late.
        patience: seconds for which gradients wait for others of their batch.
        weights: client number as text -> its weight; 1 for the others.
        price: bytes that a micro-batch's graph takes, at most those of the budget.
        clock: seconds.
    """

    def __init__(
        self,
        runner: Runner,
        budget: Budget,
        patience: float,
        weights: Mapping[str, float] | None = None,
        price: Callable[[Rows], int] = lambda rows: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner, self.budget, self.patience = runner, budget, patience
        self.weights, self.price, self.clock = weights or {}, price, clock
        self._numbers = itertools.count()
        self._ready: dict[int, Ready] = {}
        self._graphs: dict[int, Graph] = {}
        self._due: deque[Graph] = deque()
        self._late: dict[int, Late] = {}
        self._again: dict[int, Waiting[Again]] = {}
        self._known_late: set[int] = set()
        self._held = 0
        self._changed = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    def expect(self, micro_batches: Sequence[MicroBatchId]) -> None:
        """Nothing has to be known of them."""

    async def forward(self, ask: Ask) -> Pass:
        """Run one micro-batch."""
        run: Pass = await self._turn(questions.forward, ask, ask)
        return run

    async def loss(self, question: LossAsk) -> tuple[torch.Tensor | None, float]:
        """At the top: its loss, and while training the gradient of its input."""
        answer: tuple[torch.Tensor | None, float] = await self._turn(questions.loss, question.ask, question)
        return answer

    async def backward(self, upward: Upward) -> torch.Tensor | None:
        """Go backward; the gradient of its input."""
        graph = self._graphs.get(id(upward.run.joined))
        if graph is None:
            return await self._go_again(self._late.pop(id(upward.run)), upward)
        waiting = Waiting(rows_of(upward.run), upward)
        del graph.missing[waiting.micro_batch]
        graph.here[waiting.micro_batch] = waiting
        self._look(graph)
        if graph.missing and graph.timer is None:
            graph.timer = asyncio.get_running_loop().call_later(self.patience, self._overdue, graph)
        gradient: torch.Tensor | None = await waiting.answer
        return gradient

    def abandon(self, run: Pass) -> None:
        """No gradient will come for this one: the others of its batch do not wait for it."""
        self._late.pop(id(run), None)
        graph = self._graphs.get(id(run.joined))
        if graph is not None:
            graph.missing.pop(run.micro_batch, None)
            self._look(graph)

    # Gradients.

    def _look(self, graph: Graph) -> None:
        """Whether all has come."""
        if graph.missing or graph.due:
            return
        if graph.here:
            self._stand_in_line(graph)
        else:
            self._let_go(graph)

    def _overdue(self, graph: Graph) -> None:
        if not graph.due and graph.here:
            self._stand_in_line(graph)

    def _stand_in_line(self, graph: Graph) -> None:
        self.runner.device.occupancy.waits()
        if graph.timer is not None:
            graph.timer.cancel()
        graph.due = True
        self._due.append(graph)
        self._wake()

    async def _go_backward(self, graph: Graph) -> None:
        """For those that are there; from here on the others are late."""
        self.runner.device.occupancy.waits(-1)
        runs = self._leave_behind(graph)
        members = [member.micro_batch for member in graph.joined.members]
        batch = [graph.here[micro_batch] for micro_batch in members if micro_batch in graph.here]
        if not await self.runner.answer(questions.backward, batch, urgent=True):
            await self._release(runs)
        self._freed(graph)

    def _leave_behind(self, graph: Graph) -> list[Pass]:
        """Those whose gradients have not come are late; returns all that ran."""
        self._late.update({id(late.run): late for late in graph.missing.values()})
        self._say({micro_batch.client for micro_batch in graph.missing})
        del self._graphs[id(graph.joined)]
        here = [waiting.question.run for waiting in graph.here.values()]
        return [late.run for late in graph.missing.values()] + here

    async def _release(self, runs: Sequence[Pass]) -> None:
        await self.runner.device.run(lambda: self.runner.worker.release(runs), urgent=True)

    def _let_go(self, graph: Graph) -> None:
        if self._graphs.pop(id(graph.joined), None) is not None:
            self._freed(graph)

    def _freed(self, graph: Graph) -> None:
        self._held -= graph.bytes
        self._wake()

    def _say(self, clients: set[int]) -> None:
        """Tell of each client once that its gradients come late."""
        for client in sorted(clients - self._known_late):
            logger.info("its batch goes backward without it: it comes late", extra={"fields": {"client": client}})
        self._known_late |= clients

    async def _go_again(self, late: Late, upward: Upward) -> torch.Tensor | None:
        """The gradient of the input of one that is late."""
        waiting = Waiting(rows_of(late.run), Again(late.ask, upward))
        number = next(self._numbers)
        self._again[number] = waiting
        self.runner.device.occupancy.waits()
        self._wake()
        try:
            gradient: torch.Tensor | None = await waiting.answer
        finally:
            if self._again.pop(number, None) is not None:
                self.runner.device.occupancy.waits(-1)
        return gradient

    async def _go_together_again(self) -> None:
        """Those that are late, as many as make one batch in the memory that is free, or one of them beside that."""
        requests = [
            request_of(number, waiting, urgent=False, held=self.price(waiting.rows))
            for number, waiting in self._again.items()
        ]
        batch = [self._again.pop(number) for number in cohort(requests, self._free())[0]]
        self.runner.device.occupancy.waits(-len(batch))
        await self.runner.answer(forward_and_backward, batch, urgent=True)

    # Activations.

    async def _turn(self, job: Job[Any, Any], ask: Ask, question: Any) -> Any:
        number, waiting = next(self._numbers), Waiting(ask.rows, question)
        held = self.price(ask.rows) if ask.train else 0
        request = request_of(number, waiting, urgent=False, arrived=self.clock(), held=held)
        self._ready[number] = Ready(request, job, ask.train, waiting)
        self.runner.device.occupancy.waits()
        self._wake()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if (run := _run_of(waiting)) is not None:
                self.abandon(run)
            raise
        finally:
            if self._ready.pop(number, None) is not None:
                self.runner.device.occupancy.waits(-1)

    async def _go_forward(self, chosen: Sequence[Ready]) -> None:
        self.runner.device.occupancy.waits(-len(chosen))
        batch = [ready.waiting for ready in chosen]
        await self.runner.answer(chosen[0].job, batch)
        self._remember(chosen)

    def _remember(self, chosen: Sequence[Ready]) -> None:
        """What went forward holds its graph until all of it has gone backward."""
        for ready in chosen:
            run = _run_of(ready.waiting)
            if run is None or not run.output_TD.requires_grad:
                continue
            graph = self._graphs.setdefault(id(run.joined), Graph(run.joined, {}, 0))
            graph.missing[run.micro_batch] = Late(ready.waiting.question, run)
            graph.bytes += ready.request.bytes
            self._held += ready.request.bytes

    # The device.

    def _wake(self) -> None:
        self._changed.set()
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
            self._working.add_done_callback(self._worked)

    def _worked(self, task: asyncio.Task[None]) -> None:
        """Should this code be wrong, nobody waits for ever."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        waiting = [ready.waiting for ready in self._ready.values()]
        waiting += [each for graph in self._due for each in graph.here.values()]
        for each in (*waiting, *self._again.values()):
            if not each.answer.done():
                each.answer.set_exception(error)

    async def _work(self) -> None:
        while self._due or self._again or self._ready:
            self._changed.clear()
            if self._due:
                await self._go_backward(self._due.popleft())
                continue
            if self._again:
                await self._go_together_again()
                continue
            kind = self._kind()
            requests = [ready.request for ready in kind]
            decision = compose(requests, self.clock(), self._free(), self.weights, more=True)
            if isinstance(decision, Wait) and decision.lacking:
                await self._wait_for_memory(min(ready.request.arrived for ready in kind))
                continue
            if isinstance(decision, Wait):
                await self._wait(decision.until)
                continue
            chosen = [self._ready.pop(number) for number in decision.ids]
            await self._go_forward(chosen)

    def _free(self) -> Budget:
        """With the memory that no graph holds."""
        return replace(self.budget, bytes=self.budget.bytes - self._held)

    async def _wait_for_memory(self, since: float) -> None:
        """Until some is freed; for one who has waited for too long the oldest graph is let go: its members are late."""
        oldest = next((graph for graph in self._graphs.values() if not graph.due), None)
        due = since + self.budget.starve if oldest is not None else math.inf
        if oldest is None or self.clock() <= due:
            await self._wait(due)
        elif oldest.here:
            self._stand_in_line(oldest)
        else:
            await self._release(self._leave_behind(oldest))
            self._freed(oldest)

    async def _wait(self, until: float) -> None:
        seconds = until - self.clock()
        try:
            async with asyncio.timeout(seconds if seconds < 3600 else None):
                await self._changed.wait()
        except TimeoutError:
            return

    def _kind(self) -> list[Ready]:
        """Those that may share a batch with the one that came first: training and evaluation are never mixed."""
        first = self._ready[min(self._ready)]
        return [ready for ready in self._ready.values() if (ready.job, ready.train) == (first.job, first.train)]


def forward_and_backward(worker: Worker, asks: Sequence[Again]) -> list[torch.Tensor | None]:
    """Of each the gradient [T, D] of its input."""
    runs = worker.forward([each.ask for each in asks])
    return worker.backward(runs, [_of_output(each.upward) for each in asks])


def _of_output(upward: Upward) -> torch.Tensor:
    """The gradient of its whole output, also where only some positions of it were sent up."""
    if upward.output is upward.run.output_TD:
        return upward.gradient
    gradient = upward.gradient.to(upward.output.device)
    return torch.autograd.grad(upward.output, upward.run.output_TD, gradient)[0]


def _run_of(waiting: Waiting[Any]) -> Pass | None:
    """Its forward, where that was what it waited for."""
    if not waiting.answer.done() or waiting.answer.cancelled() or waiting.answer.exception() is not None:
        return None
    result = waiting.answer.result()
    return result if isinstance(result, Pass) else None
