"""Who runs together on a server's device: whoever is ready when it is free.

Gradients go first: a batch that went forward together goes backward once all its gradients are there. Those that have
come do not wait for the others for longer than `patience`; then the graph is kept, and gone through again for the rest.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from splitllm.model.joined import Joined
from splitllm.model.randomness import MicroBatchId
from splitllm.policy.batching import Budget, Request, Wait, compose
from splitllm.roles import questions
from splitllm.roles.batcher import request_of
from splitllm.roles.questions import LossAsk, Upward
from splitllm.roles.runner import Job, Runner, Waiting, rows_of
from splitllm.roles.worker import Ask, Pass


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
        here: gradients that have come and were not gone through yet.
        bytes: that it holds.
        due: whether it stands in line for the device.
    """

    joined: Joined
    missing: set[MicroBatchId]
    here: dict[MicroBatchId, Waiting[Upward]] = field(default_factory=dict)
    bytes: int = 0
    due: bool = False


class Continuous:
    """Runs what is ready.

    Args:
        runner: of the server.
        budget: of a batch; its bytes are those of all graphs that are held at once.
        patience: seconds for which gradients wait for others of their batch.
        weights: client number as text -> its weight; 1 for the others.
        price: bytes that a micro-batch's graph takes.
        clock: seconds.
    """

    def __init__(
        self,
        runner: Runner,
        budget: Budget,
        patience: float,
        weights: Mapping[str, float] | None = None,
        price: Callable[[Ask], int] = lambda ask: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner, self.budget, self.patience = runner, budget, patience
        self.weights, self.price, self.clock = weights or {}, price, clock
        self._numbers = itertools.count()
        self._ready: dict[int, Ready] = {}
        self._graphs: dict[int, Graph] = {}
        self._due: deque[Graph] = deque()
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
        graph, waiting = self._graphs[id(upward.run.joined)], Waiting(rows_of(upward.run), upward)
        graph.missing.discard(waiting.micro_batch)
        graph.here[waiting.micro_batch] = waiting
        self._look(graph)
        if graph.missing and not graph.due:
            asyncio.get_running_loop().call_later(self.patience, self._overdue, graph, waiting)
        gradient: torch.Tensor | None = await waiting.answer
        return gradient

    def abandon(self, run: Pass) -> None:
        """No gradient will come for this one: the others of its batch do not wait for it."""
        graph = self._graphs.get(id(run.joined))
        if graph is not None:
            graph.missing.discard(run.micro_batch)
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

    def _overdue(self, graph: Graph, waiting: Waiting[Upward]) -> None:
        if graph.here.get(waiting.micro_batch) is waiting and not graph.due:
            self._stand_in_line(graph)

    def _stand_in_line(self, graph: Graph) -> None:
        graph.due = True
        self._due.append(graph)
        self._wake()

    async def _go_backward(self, graph: Graph) -> None:
        graph.due, here = False, graph.here
        graph.here = {}
        members = [member.micro_batch for member in graph.joined.members]
        batch = [here[micro_batch] for micro_batch in members if micro_batch in here]
        job = functools.partial(questions.backward, keep=bool(graph.missing))
        await self.runner.answer(job, batch, urgent=True)
        self._look(graph)

    def _let_go(self, graph: Graph) -> None:
        if self._graphs.pop(id(graph.joined), None) is not None:
            self._held -= graph.bytes
            self._wake()

    # Activations.

    async def _turn(self, job: Job[Any, Any], ask: Ask, question: Any) -> Any:
        number, waiting = next(self._numbers), Waiting(ask.rows, question)
        held = self.price(ask) if ask.train else 0
        request = request_of(number, waiting, urgent=False, arrived=self.clock(), held=held)
        self._ready[number] = Ready(request, job, ask.train, waiting)
        self._wake()
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if (run := _run_of(waiting)) is not None:
                self.abandon(run)
            raise
        finally:
            self._ready.pop(number, None)

    async def _go_forward(self, chosen: Sequence[Ready]) -> None:
        batch = [ready.waiting for ready in chosen]
        await self.runner.answer(chosen[0].job, batch)
        self._remember(chosen)

    def _remember(self, chosen: Sequence[Ready]) -> None:
        """What went forward holds its graph until all of it has gone backward."""
        runs = {id(ready): _run_of(ready.waiting) for ready in chosen}
        found = [(ready, run) for ready in chosen if (run := runs[id(ready)]) is not None]
        if not found or not found[0][1].output_TD.requires_grad:
            return
        joined = found[0][1].joined
        graph = Graph(joined, {run.micro_batch for _, run in found}, bytes=sum(r.request.bytes for r, _ in found))
        self._graphs[id(joined)] = graph
        self._held += graph.bytes

    # The device.

    def _wake(self) -> None:
        self._changed.set()
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while self._due or self._ready:
            self._changed.clear()
            if self._due:
                await self._go_backward(self._due.popleft())
                continue
            kind = self._kind()
            budget = replace(self.budget, bytes=self.budget.bytes - self._held)
            decision = compose([ready.request for ready in kind], self.clock(), budget, self.weights, more=True)
            if isinstance(decision, Wait):
                await self._wait(decision.until)
                continue
            chosen = [self._ready.pop(number) for number in decision.ids]
            await self._go_forward(chosen)

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


def _run_of(waiting: Waiting[Any]) -> Pass | None:
    """Its forward, where that was what it waited for."""
    if not waiting.answer.done() or waiting.answer.cancelled() or waiting.answer.exception() is not None:
        return None
    result = waiting.answer.result()
    return result if isinstance(result, Pass) else None
