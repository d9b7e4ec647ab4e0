"""Puts questions that are asked together to a device, and answers to those who asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from splitllm.model.joined import Rows
from splitllm.model.randomness import MicroBatchId
from splitllm.roles.account import Account, Part
from splitllm.roles.device import Device
from splitllm.roles.questions import LossAsk, Upward
from splitllm.roles.worker import Ask, Pass, Worker

Q = TypeVar("Q")
A = TypeVar("A")
Job = Callable[[Worker, Sequence[Q]], Sequence[A]]


class Batching(Protocol):
    """Runs the micro-batches of one server, several at once.

    Attributes:
        runner: what it puts them to.
    """

    runner: Runner

    def expect(self, micro_batches: Sequence[MicroBatchId]) -> None:
        """A step opens, in which these will come; what an earlier generation left is forgotten."""
        ...

    async def forward(self, ask: Ask) -> Pass:
        """Run one micro-batch."""
        ...

    async def loss(self, question: LossAsk) -> tuple[torch.Tensor | None, float]:
        """At the top: its loss, and while training the gradient of its input."""
        ...

    async def backward(self, upward: Upward) -> torch.Tensor | None:
        """Go backward; the gradient of its input."""
        ...

    def abandon(self, run: Pass) -> None:
        """No gradient will come for this one."""
        ...


class Waiting(Generic[Q]):
    """A question with the place of its answer, and the moment when it came."""

    def __init__(self, rows: Rows, question: Q) -> None:
        self.rows, self.question, self.came = rows, question, time.monotonic()
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def micro_batch(self) -> MicroBatchId:
        """Which it is about."""
        return self.rows.micro_batch


class Runner:
    """A worker on its device.

    Args:
        worker: of the server.
        device: where it computes.

    Attributes:
        account: what its tenants have cost.
    """

    def __init__(self, worker: Worker, device: Device) -> None:
        self.worker, self.device, self.account = worker, device, Account()

    async def one(self, job: Job[Q, A], rows: Rows, question: Q, *, urgent: bool = False) -> A:
        """The answer to a question that is put alone."""
        came = time.monotonic()

        def run() -> Sequence[A]:
            self.account.waited(rows.micro_batch.client, time.monotonic() - came)
            return job(self.worker, [question])

        return (await self._compute(run, lambda: [rows], urgent))[0]

    async def answer(self, job: Job[Q, A], batch: Sequence[Waiting[Q]], *, urgent: bool = False) -> bool:
        """Answer all questions of a batch; of those who are gone when its turn comes nothing is computed.

        Should activations fail together, each is asked alone: only who is to blame fails.

        Returns:
            Whether any was still there.
        """
        live: list[Waiting[Q]] = []

        def run() -> Sequence[A]:
            live.extend(waiting for waiting in batch if not waiting.answer.cancelled())
            for waiting in live:
                self.account.waited(waiting.micro_batch.client, time.monotonic() - waiting.came)
            return job(self.worker, [waiting.question for waiting in live]) if live else []

        try:
            answers = await self._compute(run, lambda: [waiting.rows for waiting in live], urgent)
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 (whoever waits gets it)
            if len(live) > 1 and not urgent:
                for waiting in live:
                    await self.answer(job, [waiting])
                return True
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return True
        for waiting, answer in zip(live, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)
        return bool(live)

    async def _compute(
        self, job: Callable[[], Sequence[A]], rows: Callable[[], Sequence[Rows]], urgent: bool
    ) -> Sequence[A]:
        """The job's answers; `rows` tells afterwards whose they are."""

        def timed() -> Sequence[A]:
            started = time.perf_counter()
            answers = job()
            self.account.ran([self._part(one) for one in rows()], time.perf_counter() - started)
            return answers

        return await self.device.run(timed, urgent=urgent)

    def _part(self, rows: Rows) -> Part:
        shard = self.worker.shard
        return Part(rows.micro_batch.client, rows.lengths, shard.stop - max(shard.start, rows.entry))


def rows_of(run: Pass) -> Rows:
    """Its rows among those that it ran with."""
    return next(member for member in run.joined.members if member.micro_batch == run.micro_batch)
