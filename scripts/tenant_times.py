"""How long a server computes for clients that it runs together, over one client at a time."""

from __future__ import annotations

import argparse
import fcntl
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pages import table
from servers import PLACES, Load, Traffic, build

from splitllm.roles.worker import Worker

ADAPTERS = {"shared": "one shared adapter", "per_client": "an adapter for each client"}
WORST = 1.05  # for any number of clients
BARS = {("edge", "shared", 16, "32"): 0.80, ("edge", "per_client", 16, "32"): 0.85}
SHORTEST = 256  # tokens of a measurement: smaller steps are repeated
HOLD = 150  # seconds that `--lock` is held at most before others get their turn


@dataclass(frozen=True)
class Cell:
    """One pair of ways, measured.

    Attributes:
        place: a key of `PLACES`.
        adapters: "shared" or "per_client".
        clients: in the step, each with one row.
        length: its tokens, in words.
        note: what else is different from the others, in words.
        together, alone: CPU-seconds a real token, one entry a pair.
    """

    place: str
    adapters: str
    clients: int
    length: str
    note: str
    together: list[float]
    alone: list[float]

    @property
    def key(self) -> str:
        return " ".join(map(str, (self.place, self.adapters, self.clients, self.length, self.note)))

    @property
    def group(self) -> tuple[str, str, str]:
        return self.place, self.adapters, self.note

    @property
    def ratios(self) -> list[float]:
        return [batched / single for batched, single in zip(self.together, self.alone, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def bar(self) -> float:
        return BARS.get((self.place, self.adapters, self.clients, self.length), WORST) if not self.note else WORST


class Quiet:
    """A file that is locked while time is measured, so that other work on the machine can keep away from it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock."""
        if self.path is None:
            yield
            return
        with self.path.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        time.sleep(1)

    def batches(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run jobs in turn, so many under one lock as fit into `HOLD`."""
        waiting = list(jobs)
        while waiting:
            with self.held():
                until = time.monotonic() + HOLD
                while waiting and time.monotonic() < until:
                    waiting.pop(0)()


def cpu_seconds(step: Callable[[], None], repeats: int) -> float:
    started = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - started) / repeats


def timed(worker: Worker, load: Load, options: argparse.Namespace, length: str, note: str = "") -> Cell:
    """Pairs of steps, the order within a pair alternating."""
    traffic, tokens = Traffic(worker, load), load.tokens
    ways: list[tuple[Callable[[], None], list[float]]] = [(traffic.together, []), (traffic.alone, [])]
    repeats = max(1, SHORTEST // tokens)

    def pair() -> None:
        for way, found in ways:
            found.append(cpu_seconds(way, repeats) / tokens)
        ways.reverse()

    def warm_up() -> None:
        traffic.together()
        traffic.alone()

    options.quiet.batches([warm_up, *[pair] * options.pairs])
    together, alone = (
        next(found for way, found in ways if way == wanted) for wanted in (traffic.together, traffic.alone)
    )
    cell = Cell(load.place, load.adapters, len(load.lengths), length, note, together, alone)
    print(f"{cell.key}: {cell.ratio:.3f} ({min(cell.ratios):.3f} to {max(cell.ratios):.3f})", flush=True)
    return cell


def alike(place: str, adapters: str, clients: int, length: int) -> Load:
    return Load(place, adapters, ((length,),) * clients, (PLACES[place].start,) * clients)


def measure_table(place: str, options: argparse.Namespace, base: Path) -> Iterator[Cell]:
    for adapters in options.adapters:
        worker = build(base, alike(place, adapters, max(options.clients), 1))
        for length in options.lengths:
            for clients in options.clients:
                yield timed(worker, alike(place, adapters, clients, length), options, str(length))


def measure_mixed(options: argparse.Namespace, base: Path) -> Iterator[Cell]:
    """What is not alike: 16 clients of the edge."""
    for adapters in options.adapters:
        plain = alike("edge", adapters, 16, 32)
        lengths = tuple((8 + 56 * client // 15,) for client in range(16))
        entries = tuple((2, 4, 6)[client % 3] for client in range(16))
        cases = (
            (replace(plain, dropout=0.1), "32", "LoRA dropout 0.1"),
            (replace(plain, lengths=lengths), "8 to 64", "mixed lengths"),
            (replace(plain, entries=entries), "32", "cuts at 2, 4 and 6"),
        )
        for load, length, note in cases:
            yield timed(build(base, load), load, options, length, note)


def time_table(place: str, title: str, cells: Sequence[Cell]) -> list[str]:
    """A row for each number of clients, a column for each length, under each kind of adapter."""
    lines: list[str] = []
    for adapters, words in ADAPTERS.items():
        found = {(cell.clients, cell.length): cell for cell in cells if cell.group == (place, adapters, "")}
        lengths = sorted({length for _, length in found}, key=int)
        rows = [
            [str(clients), *(_words(found.get((clients, length))) for length in lengths)]
            for clients in sorted({clients for clients, _ in found})
        ]
        columns = ["#clients", *(f"#{length} tokens each" for length in lengths)]
        lines += table(columns, rows, f"{title}, {words}") if rows else []
    return lines


def _words(cell: Cell | None) -> str:
    if cell is None:
        return ""
    together, alone = (1e3 * statistics.median(found) for found in (cell.together, cell.alone))
    return f"**{cell.ratio:.2f}** ({min(cell.ratios):.2f} to {max(cell.ratios):.2f}); {together:.2f} / {alone:.2f} ms"


def mixed_table(cells: Sequence[Cell]) -> list[str]:
    rows = [[cell.note, ADAPTERS[cell.adapters], cell.length, _words(cell)] for cell in cells if cell.note]
    columns = ["16 clients", "adapters", "tokens each", "#batched / one at a time"]
    return table(columns, rows, "Edge, clients that are not alike, and dropout") if rows else []


def slow(cells: Sequence[Cell]) -> list[str]:
    """Bars that are not reached."""
    return [f"{cell.key}: {cell.ratio:.3f}, the bar is {cell.bar}" for cell in cells if cell.ratio > cell.bar]
