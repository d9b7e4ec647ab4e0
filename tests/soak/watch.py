"""What a process takes while something happens to it: resident memory and file descriptors, sampled from outside."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

KIB = 1024


@dataclass(frozen=True)
class Sample:
    """One look.

    Attributes:
        seconds: monotonic.
        progress: of what happens, from 0 to 1.
        rss_mib: resident memory.
        descriptors: open ones.
    """

    seconds: float
    progress: float
    rss_mib: float
    descriptors: int


@dataclass
class Watch:
    """Looks at a process again and again."""

    pid: int
    samples: list[Sample] = field(default_factory=list)

    def look(self, progress: float) -> None:
        self.samples.append(Sample(time.monotonic(), progress, rss_mib(self.pid), descriptors(self.pid)))

    async def keep_looking(self, progress: Callable[[], float], every: float) -> None:
        while True:
            self.look(progress())
            await asyncio.sleep(every)

    def between(self, start: float, stop: float) -> list[Sample]:
        """The samples of a part of what happened."""
        return [sample for sample in self.samples if start <= sample.progress <= stop]

    def rss_between(self, start: float, stop: float) -> float:
        """The median, MiB; where no look fell into that part, that of the look next to it."""
        middle = (start + stop) / 2
        nearest = min(self.samples, key=lambda sample: abs(sample.progress - middle))
        return median(sample.rss_mib for sample in self.between(start, stop) or [nearest])

    def descriptors_between(self, start: float, stop: float) -> float:
        return median(sample.descriptors for sample in self.between(start, stop))

    def table(self, parts: int = 10) -> str:
        """Medians of each part of what happened."""
        lines = [
            "| progress | samples | resident MiB | descriptors, median | descriptors, most |",
            "|---|---|---|---|---|",
        ]
        for part in range(parts):
            start, stop = part / parts, (part + 1) / parts
            found = self.between(start, stop)
            if found:
                cells = f"{self.rss_between(start, stop):.1f} | {self.descriptors_between(start, stop):g}"
                most = max(sample.descriptors for sample in found)
                lines.append(f"| {start:.0%} to {stop:.0%} | {len(found)} | {cells} | {most} |")
        return "\n".join(lines)


@contextmanager
def watching(pid: int, progress: Callable[[], float], every: float = 0.5) -> Iterator[Watch]:
    """Look at a process while the block runs, in an event loop."""
    watch = Watch(pid)
    task = asyncio.create_task(watch.keep_looking(progress, every))
    try:
        yield watch
    finally:
        task.cancel()
        watch.look(progress())


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / KIB
    raise ProcessLookupError(pid)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
