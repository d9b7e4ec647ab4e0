"""Where a role computes: at once where it is called, or on a thread of its own that never waits for the network."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Device(Protocol):
    """Runs the computations of a role one at a time."""

    async def run(self, job: Callable[[], T], *, urgent: bool = False) -> T:
        """The job's result; urgent jobs (gradients) go before the others (new activations) that wait."""
        ...


class Inline:
    """Computes where it is called, without giving way to anybody: for roles that share a process."""

    async def run(self, job: Callable[[], T], *, urgent: bool = False) -> T:
        """Call the job."""
        return job()


@dataclass(order=True)
class _Job:
    rank: tuple[int, int]
    call: Callable[[], Any] | None = field(compare=False)
    result: asyncio.Future[Any] | None = field(compare=False, default=None)


class DeviceThread:
    """One thread that computes while the event loop sends and receives.

    With several micro-batches in flight this is the 1F1B order of pipelines (PipeDream, arXiv 1806.03377): gradients
    go before new activations, so that what is held for them is freed first.

    Args:
        threads: of torch inside one computation.
    """

    def __init__(self, threads: int) -> None:
        self._jobs: queue.PriorityQueue[_Job] = queue.PriorityQueue()
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._work, args=(threads,), name="device", daemon=True)
        self._thread.start()

    async def run(self, job: Callable[[], T], *, urgent: bool = False) -> T:
        """Wait for the job's turn and its result; if the waiting is cancelled before its turn, it is never run."""
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job((0 if urgent else 1, next(self._order)), job, result))
        return await result

    def close(self) -> None:
        """End the thread after the jobs that wait."""
        self._jobs.put(_Job((2, next(self._order)), None))
        self._thread.join()

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while (job := self._jobs.get()).call is not None:
            assert job.result is not None
            if not job.result.cancelled():
                _run(job.call, job.result)


def _run(call: Callable[[], Any], result: asyncio.Future[Any]) -> None:
    try:
        value = call()
    except BaseException as error:  # noqa: BLE001 (whoever waits gets it)
        _settle(result, lambda future, error=error: future.set_exception(error))  # type: ignore[misc]
        return
    _settle(result, lambda future: future.set_result(value))


def _settle(result: asyncio.Future[Any], how: Callable[[asyncio.Future[Any]], None]) -> None:
    def settle() -> None:
        if not result.done():
            how(result)

    loop = result.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)
