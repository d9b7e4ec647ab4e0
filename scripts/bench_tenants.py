"""What a server saves by running its clients' micro-batches together, and what each client more costs it in memory.

    python scripts/bench_tenants.py                    # everything, about 90 minutes
    python scripts/bench_tenants.py --parts edge --lengths 32 --clients 1 16
    python scripts/bench_tenants.py --quick            # a try of the script

Time: CPU-seconds of the server per real token, one thread, one training step's forward and backward, batched over one
client at a time, the two in turn on the same micro-batches. Memory: the peak of a server process with 1 to 64 clients,
and with a model replica for each of them. Figures already beside the page are kept where they are not measured again.
The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bases import draw_gpt2_small
from bench_memory import MIB, RETURNING, resident, settle
from pages import bullets, known_figures, machine, table, write_page
from servers import PLACES, Load, Traffic, build

from splitllm.model.loading import quiet_transformers
from splitllm.roles.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft")
PARTS = ("edge", "top", "mixed", "memory")
CLIENTS, LENGTHS, ADAPTERS = (1, 2, 4, 8, 16, 32, 64), (16, 32, 64), ("shared", "per_client")
WORST = 1.05  # for any number of clients
BARS = {("edge", "shared", 16, "32"): 0.80, ("edge", "per_client", 16, "32"): 0.85}
SHORTEST = 256  # tokens of a measurement: smaller steps are repeated
HOLD = 150  # seconds that `--lock` is held at most before others get their turn
MEMORY_CLIENTS, REPLICAS, STEPS = (1, 4, 16, 64), 16, 3
ROW_SHAPES = {"1 x 32": (32,), "4 x 128": (128,) * 4}
FURTHER, SAVED = 1.10, 0.74


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
    together, alone = (next(found for way, found in ways if way == wanted) for wanted in (traffic.together, traffic.alone))
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


# Memory, each case in a process of its own.


@dataclass(frozen=True)
class MemoryCase:
    """A server process.

    Attributes:
        clients: each with an adapter of its own.
        rows: of each client; a key of `ROW_SHAPES`.
        allocator: "default", or "returning": glibc gives every large block back to the system when it is freed.
        replicas: whether each client has a copy of the weights too, and they run one after another.
        checkpointing: whether activations are computed again in the backward.
    """

    clients: int
    rows: str
    allocator: str = "default"
    replicas: bool = False
    checkpointing: bool = False

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


def memory_cases() -> list[MemoryCase]:
    found = []
    for rows in ROW_SHAPES:
        for allocator in ("default", "returning"):
            counts = MEMORY_CLIENTS if rows == "1 x 32" else MEMORY_CLIENTS[:-1]
            found += [MemoryCase(clients, rows, allocator) for clients in counts]
    for allocator in ("default", "returning"):
        found.append(MemoryCase(REPLICAS, "1 x 32", allocator, replicas=True))
        found.append(MemoryCase(REPLICAS, "1 x 32", allocator, checkpointing=True))
    return found


def measure_memory(case: MemoryCase, base: Path) -> dict[str, float]:
    """Bytes: growth of the resident set by building the server and taking steps, and what its tensors account for."""
    torch.set_num_threads(1)
    lengths = ROW_SHAPES[case.rows]
    load = Load("edge", "per_client", (lengths,) * case.clients, (2,) * case.clients, checkpointing=case.checkpointing)
    single = replace(load, lengths=(lengths,), entries=(2,))
    with quiet_transformers():
        Traffic(build(base, single), single).together()  # whatever torch and transformers set up once
    before = settle()
    with quiet_transformers():
        workers = [build(base, single) for _ in range(case.clients)] if case.replicas else [build(base, load)]
    traffics = [Traffic(worker, single if case.replicas else load) for worker in workers]
    sent = sum(2 * sum(map(sum, traffic.load.lengths)) * 768 * 4 for traffic in traffics)

    def step() -> None:
        for traffic in traffics:
            traffic.together()
            traffic.apply()

    for _ in range(STEPS):
        step()
    after = resident()
    held = [traffic.worker.peak() for traffic in traffics]
    states = sum(each["adapter and optimiser"] for each in held)
    adapters = sum(p.nbytes for w in workers for own in w.own.values() for p in own.parameters.values())
    return {
        "growth": after["peak"] - before["now"],
        "now": after["now"] - before["now"],
        "imports": before["now"],
        "weights": sum(each["weights"] for each in held),
        "adapters, gradients, optimisers": states + adapters,
        "saved activations": sum(each["activations of a batch"] for each in held),
        "live in a step": live_in(step),
        "messages": sent,
    }


def live_in(step: Callable[[], None]) -> int:
    """Bytes of tensors alive at once, at most, in a step, beside those that were there before."""
    from itertools import accumulate

    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def in_a_process(case: MemoryCase, base: Path) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.update(RETURNING if case.allocator == "returning" else {})
    command = [sys.executable, __file__, "--measure", case.key, "--base", str(base)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(case.key, {key: round(value / MIB, 1) for key, value in figures.items()}, flush=True)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure")
    parser.add_argument("--base", type=Path)
    o = parser.parse_args()
    if o.measure:
        print(json.dumps(measure_memory(MemoryCase(**json.loads(o.measure)), o.base)))
    else:
        for case in memory_cases():
            in_a_process(case, o.base)
