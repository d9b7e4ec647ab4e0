"""Where a role computes: at once where it is called, or on a thread of its own that never waits for the network."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from splitllm.roles.occupancy import Occupancy

T = TypeVar("T")


class Device(Protocol):
    """Runs the computations of a role one at a time.

    Attributes:
        occupancy: how its time is spent.
    """

    occupancy: Occupancy

    async def run(self, job: Callable[[], T], *, urgent: bool = False) -> T:
        """The job's result; urgent jobs (gradients) go before the others (new activations) that wait."""
        ...


class Inline:
    """Computes where it is called, without giving way to anybody: for roles that share a process. Counts no time."""

    def __init__(self) -> None:
        self.occupancy = Occupancy()

    async def run(self, job: Callable[[], T], *, urgent: bool = False) -> T:
        """Call the job."""
        return job()


@dataclass(order=True)
class _Job:
    rank: tuple[int, int]
    call: Callable[[], Any] | None = field(compare=False)
    result: Future[Any] = field(compare=False, default_factory=Future)


class DeviceThread:
    """One thread that computes while the event loop sends and receives.

    With several micro-batches in flight this is the 1F1B order of pipelines (PipeDream, arXiv 1806.03377): gradients
    go before new activations, so that what is held for them is freed first.

    Args:
        threads: of torch inside one computation.

    Attributes:
        occupancy: how its time is spent.
    """

    def __init__(self, threads: int) -> None:
        self.occupancy = Occupancy()
        self._jobs: queue.PriorityQueue[_Job] = queue.PriorityQueue()
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._work, args=(threads,), name="device", daemon=True)
        self._thread.start()

    async def run(self, job: Callable[[], T], *, urgent: bool = False) -> T:
        """Wait for the job's turn and its result; if the waiting is cancelled before its turn, it is never run."""
        mine = _Job((0 if urgent else 1, next(self._order)), job)
        self.occupancy.waits()
        self._jobs.put(mine)
        try:
            result: T = await asyncio.wrap_future(mine.result)
        finally:
            if mine.result.cancel():  # at once; without effect on one that runs or is done
                self.occupancy.waits(-1)
        return result

    def close(self) -> None:
        """End the thread after the jobs that wait."""
        self._jobs.put(_Job((2, next(self._order)), None))
        self._thread.join()

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while (job := self._jobs.get()).call is not None:
            if job.result.set_running_or_notify_cancel():
                self.occupancy.begins()
                _run(job.call, job.result)
                self.occupancy.ends()


def _run(call: Callable[[], Any], result: Future[Any]) -> None:
    try:
        value = call()
    except BaseException as error:  # noqa: BLE001 (whoever waits gets it)
        result.set_exception(error)
    else:
        result.set_result(value)
