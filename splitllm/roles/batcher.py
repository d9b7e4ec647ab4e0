"""Who runs together on a server's device: nobody, or always the same.

A *batch* is what the device computes at once. Which requests make one is policy (`policy/batching.py`); here they wait
for their cohort: the micro-batches of one number of all clients in the step, so that a recipe makes the same batches
every time. Those that went forward together share a graph and go backward together.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from splitllm.model.randomness import MicroBatchId
from splitllm.policy.batching import Budget, Request, cohort
from splitllm.roles import questions
from splitllm.roles.questions import LossAsk, Upward
from splitllm.roles.runner import A, Job, Q, Runner, Waiting, rows_of
from splitllm.roles.worker import Ask, Pass


class Alone:
    """Every micro-batch runs by itself, at once."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def expect(self, micro_batches: Sequence[MicroBatchId]) -> None:
        """Nothing has to be known of them."""

    async def forward(self, ask: Ask) -> Pass:
        """Run one micro-batch."""
        return await self.runner.one(questions.forward, ask.rows, ask)

    async def loss(self, question: LossAsk) -> tuple[torch.Tensor | None, float]:
        """At the top: its loss, and while training the gradient of its input."""
        return await self.runner.one(questions.loss, question.ask.rows, question)

    async def backward(self, upward: Upward) -> torch.Tensor | None:
        """Go backward; the gradient of its input."""
        return await self.runner.one(questions.backward, rows_of(upward.run), upward, urgent=True)

    def abandon(self, run: Pass) -> None:
        """Nobody waits for it."""


class Synchronous:
    """Cohorts, each as the batches that make it cheapest.

    Args:
        runner: of the server.
        budget: of a batch.
    """

    def __init__(self, runner: Runner, budget: Budget) -> None:
        self.runner, self.budget = runner, budget
        self._alone = Alone(runner)
        self._running: set[asyncio.Task[bool]] = set()
        self.expect([])

    def expect(self, micro_batches: Sequence[MicroBatchId]) -> None:
        """Open a step: those of one number make a cohort; what an earlier generation left is forgotten."""
        for task in self._running:
            task.cancel()
        self._cohorts: dict[int, set[MicroBatchId]] = defaultdict(set)
        for micro_batch in micro_batches:
            self._cohorts[micro_batch.number].add(micro_batch)
        self._here: dict[int, dict[MicroBatchId, Waiting[Any]]] = defaultdict(dict)
        self._upward: dict[int, dict[MicroBatchId, Waiting[Upward]]] = defaultdict(dict)

    async def forward(self, ask: Ask) -> Pass:
        """Run one micro-batch with its cohort; one of an evaluation alone."""
        return await self._turn(questions.forward, ask, ask) if ask.train else await self._alone.forward(ask)

    async def loss(self, question: LossAsk) -> tuple[torch.Tensor | None, float]:
        """The same at the top."""
        train = question.ask.train
        return await self._turn(questions.loss, question.ask, question) if train else await self._alone.loss(question)

    async def backward(self, upward: Upward) -> torch.Tensor | None:
        """Go backward with those that went forward with it, once all have their gradients."""
        joined, waiting = upward.run.joined, Waiting(rows_of(upward.run), upward)
        together = self._upward[id(joined)]
        together[waiting.micro_batch] = waiting
        if len(together) == len(joined.members):
            del self._upward[id(joined)]
            self._run(questions.backward, [together[each.micro_batch] for each in joined.members], urgent=True)
        gradient: torch.Tensor | None = await waiting.answer
        return gradient

    def abandon(self, run: Pass) -> None:
        """Its step will be run again by all: the next `expect` forgets it."""

    async def _turn(self, job: Job[Q, A], ask: Ask, question: Q) -> A:
        number, waiting = ask.rows.micro_batch.number, Waiting(ask.rows, question)
        here = self._here[number]
        here[waiting.micro_batch] = waiting
        if here.keys() == self._cohorts[number]:
            del self._here[number]
            for batch in _batches(here.values(), self.budget):
                self._run(job, batch)
        answer: A = await waiting.answer
        return answer

    def _run(self, job: Job[Q, A], batch: Sequence[Waiting[Q]], *, urgent: bool = False) -> None:
        task = asyncio.create_task(self.runner.answer(job, batch, urgent=urgent))
        self._running.add(task)
        task.add_done_callback(self._running.discard)


def _batches(here: Iterable[Waiting[Q]], budget: Budget) -> list[list[Waiting[Q]]]:
    """The batches of a whole cohort."""
    ordered = sorted(here, key=lambda waiting: waiting.micro_batch)
    requests = [request_of(number, waiting, urgent=False) for number, waiting in enumerate(ordered)]
    return [[ordered[number] for number in batch] for batch in cohort(requests, budget)]


def request_of(number: int, waiting: Waiting[Any], *, urgent: bool, arrived: float = 0.0, held: int = 0) -> Request:
    """A question as the policy sees it; `held` are the bytes that its graph will take."""
    rows = waiting.rows
    tenant = str(rows.micro_batch.client)
    return Request(number, tenant, urgent, rows.lengths, rows.entry, arrived, held, rows.micro_batch)
