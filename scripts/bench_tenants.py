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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bases import draw_gpt2_small
from bench_memory import MIB, resident, settle
from pages import bullets, known_figures, machine, table, write_page
from servers import ONE_BATCH, PLACES, Load, Traffic, build
from torch.profiler import ProfilerActivity, profile

from splitllm.model.loading import quiet_transformers
from splitllm.roles.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft")
PARTS = ("edge", "top", "mixed", "memory")
CLIENTS, LENGTHS = (1, 2, 4, 8, 16, 32, 64), (16, 32, 64)
ADAPTERS = {"shared": "one shared adapter", "per_client": "an adapter for each client"}
WORST = 1.05  # for any number of clients
BARS = {("edge", "shared", 16, "32"): 0.80, ("edge", "per_client", 16, "32"): 0.85}
SHORTEST = 256  # tokens of a measurement: smaller steps are repeated
HOLD = 150  # seconds that `--lock` is held at most before others get their turn
MEMORY_CLIENTS, REPLICAS, STEPS = (1, 4, 16, 64), 16, 3
DEFAULT = "glibc's own"
ALLOCATORS = {DEFAULT: {}, "256 KiB": {"MALLOC_MMAP_THRESHOLD_": "262144"}}
ROW_SHAPES = {"1 x 32": (32,), "4 x 128": (128,) * 4}
FURTHER, SAVED = 1.10, 0.74

Figures = Mapping[str, Mapping[str, float]]
"""Of memory, by `MemoryCase.key`."""


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


# Memory, each case in a process of its own.


@dataclass(frozen=True)
class MemoryCase:
    """A server process.

    Attributes:
        clients: each with an adapter of its own.
        rows: of each client; a key of `ROW_SHAPES`.
        allocator: a key of `ALLOCATORS`: from which size on glibc gives a block back to the system when it is freed.
        replicas: whether each client has a copy of the weights too, and they run one after another.
        checkpointing: whether activations are computed again in the backward.
    """

    clients: int
    rows: str
    allocator: str = DEFAULT
    replicas: bool = False
    checkpointing: bool = False

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


def memory_cases() -> list[MemoryCase]:
    found = []
    for rows in ROW_SHAPES:
        for allocator in ALLOCATORS:
            counts = MEMORY_CLIENTS if rows == "1 x 32" else MEMORY_CLIENTS[:-1]
            found += [MemoryCase(clients, rows, allocator) for clients in counts]
    for allocator in ALLOCATORS:
        found.append(MemoryCase(REPLICAS, "1 x 32", allocator, replicas=True))
        found.append(MemoryCase(REPLICAS, "1 x 32", allocator, checkpointing=True))
    return found


def measure_memory(case: MemoryCase, base: Path) -> dict[str, float]:
    """Bytes: growth of the resident set by building the server and taking steps, and what its tensors account for.

    `adapters` are adapters with gradients and optimiser state, `saved` is what forwards keep for backwards, `plain` the
    same of one client with transformers' own activation, `live` all that is alive at once, at most, in a step beside
    what was there before it.
    """
    torch.set_num_threads(1)
    lengths = ROW_SHAPES[case.rows]
    load = Load("edge", "per_client", (lengths,) * case.clients, (2,) * case.clients, checkpointing=case.checkpointing)
    single = replace(load, lengths=(lengths,), entries=(2,))
    with quiet_transformers(), patch("splitllm.model.shard.make_lean"):
        plain = Traffic(build(base, single), single)
        plain.together()  # whatever torch and transformers set up once
    kept = plain.worker.peak()["activations of a batch"]
    del plain
    before = settle()
    with quiet_transformers():
        workers = [build(base, single) for _ in range(case.clients)] if case.replicas else [build(base, load)]
    traffics = [Traffic(worker, single if case.replicas else load, ONE_BATCH) for worker in workers]

    def step() -> None:
        for traffic in traffics:
            traffic.together()
            traffic.apply()

    for _ in range(STEPS):
        step()
    after = resident()
    held = [traffic.worker.peak() for traffic in traffics]
    states = sum(each["adapter and optimiser"] for each in held)
    gradients = sum(p.nbytes for w in workers for own in w.own.values() for p in own.parameters.values())
    return {
        "growth": after["peak"] - before["now"],
        "now": after["now"] - before["now"],
        "imports": before["now"],
        "weights": sum(each["weights"] for each in held),
        "adapters": states + gradients,
        "saved": sum(each["activations of a batch"] for each in held),
        "plain": kept,
        "live": live_in(step),
    }


def live_in(step: Callable[[], None]) -> int:
    """Bytes of tensors alive at once, at most, in a step, beside those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(int(event.nbytes()) for event in sorted(events, key=lambda event: event.start_ns())))


def in_a_process(case: MemoryCase, base: Path) -> dict[str, float]:
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **ALLOCATORS[case.allocator]}
    command = [sys.executable, __file__, "--measure", case.key, "--base", str(base)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(case.key, {key: round(value / MIB, 1) for key, value in figures.items()}, flush=True)
    return figures


# The page.


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


def further(figures: Figures, case: MemoryCase) -> tuple[float, float, float] | None:
    """Bytes of each client after the first: as the process grew, as counted of one, and that with plain activations."""
    one, many = figures.get(replace(case, clients=1).key), figures[case.key]
    if one is None or case.clients == 1 or case.replicas or case.checkpointing:
        return None
    growth = (many["growth"] - one["growth"]) / (case.clients - 1)
    return growth, one["adapters"] + one["saved"], one["adapters"] + one["plain"]


def memory_table(figures: Figures) -> list[str]:
    rows = []
    for case in (MemoryCase(**json.loads(key)) for key in figures):
        if case.replicas or case.checkpointing:
            continue
        its = figures[case.key]
        sizes = [its[key] for key in ("growth", "weights", "adapters", "saved", "live")]
        found = further(figures, case)
        more = [""] * 5
        if found is not None:
            growth, ours, plain = found
            more = [f"{growth / MIB:.1f}", f"{ours / MIB:.1f}", f"{growth / ours:.2f}"]
            more += [f"{plain / MIB:.1f}", f"**{growth / plain:.2f}**"]
        cells = [f"{size / MIB:.1f}" for size in sizes]
        rows.append([case.rows, case.allocator, str(case.clients), *cells, *more])
    counted = ["#weights", "#adapters, gradients, optimisers", "#saved for the backward", "#at most alive in a step"]
    measured = ["#each further client", "#counted of one", "#ratio", "#counted of one, transformers' own", "#ratio"]
    columns = ["tokens a client", "threshold", "#clients", "#growth", *counted, *measured]
    return table(columns, rows, "Memory of an edge server with per-client adapters, MiB") if rows else []


def saved_table(figures: Figures) -> list[str]:
    rows = []
    for name, allocator, ours, theirs, imports in replicas(figures):
        sizes = [f"{size / MIB:.0f}" for size in (ours, theirs, imports)]
        less = [f"**{1 - ours / theirs:.1%}**", f"{1 - (ours + imports) / (theirs + imports):.1%}"]
        rows.append([name, allocator, *sizes, *less])
    columns = ["16 clients of 1 x 32 tokens", "threshold", "#one base", "#a replica each", "#imports", "#less"]
    return (
        table([*columns, "#less, with imports"], rows, "One base, or a model replica for each client, MiB")
        if rows
        else []
    )


def replicas(figures: Figures) -> Iterator[tuple[str, str, float, float, float]]:
    """Name, allocator, growth with one base and with replicas, and what the process holds before."""
    for allocator in ALLOCATORS:
        theirs = figures.get(MemoryCase(REPLICAS, "1 x 32", allocator, replicas=True).key)
        for checkpointing in (False, True):
            ours = figures.get(MemoryCase(REPLICAS, "1 x 32", allocator, checkpointing=checkpointing).key)
            if theirs and ours:
                name = "activation checkpointing" if checkpointing else "as it is"
                yield name, allocator, ours["growth"], theirs["growth"], ours["imports"]


def page(found: Mapping[str, Any]) -> list[str]:
    cells = [Cell(**cell) for cell in found["time"].values()]
    lines = [*bullets(found["machine"]), *time_table("edge", "Edge", cells), *mixed_table(cells)]
    lines += time_table("top", "Top with head and loss", cells)
    return lines + memory_table(found["memory"]) + saved_table(found["memory"])


def missed(found: Mapping[str, Any]) -> list[str]:
    """Bars that are not reached; that of a further client's memory is over its count with transformers' own blocks."""
    cells, figures = [Cell(**cell) for cell in found["time"].values()], found["memory"]
    lines = [f"{cell.key}: {cell.ratio:.3f}, the bar is {cell.bar}" for cell in cells if cell.ratio > cell.bar]
    for case in (MemoryCase(**json.loads(key)) for key in figures):
        its = further(figures, case)
        if its and its[0] > FURTHER * its[2]:
            lines.append(f"{case.key}: a further client takes {its[0] / its[2]:.2f} of its count, the bar is {FURTHER}")
    for name, allocator, ours, theirs, _ in replicas(figures):
        if 1 - ours / theirs < SAVED:
            lines.append(f"{name}, {allocator}: {1 - ours / theirs:.1%} less, the bar is {SAVED:.0%}")
    return lines


def options_from_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tokenizer = ROOT.parent / "shared" / "data" / "gpt2-tokenizer"
    parser.add_argument("--tokenizer", type=Path, default=tokenizer, help="GPT-2's, with config.json")
    parser.add_argument("--base", type=Path, help="a folder with GPT-2 small; drawn at random if there is none")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens of each client")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--lock", type=Path, help="a file that is locked while time is measured")
    parser.add_argument("--quick", action="store_true", help="1 pair of few cells, no bars")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/bench/tenants.md"),
        help="its marked part is replaced; JSON goes beside it",
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.clients, options.lengths = 1, [1, 4], [16]
    options.quiet = Quiet(options.lock)
    return options


def run(options: argparse.Namespace, base: Path) -> dict[str, Any]:
    """Measure, and write the page after every figure."""
    found = {
        "time": {},
        "memory": {},
        **known_figures(options.output),
        "machine": machine(*PACKAGES) | {"torch threads": "1"},
    }
    for part in options.parts:
        if part == "memory":
            cases = memory_cases()[:2] if options.quick else memory_cases()
            for case in cases:
                found["memory"][case.key] = in_a_process(case, base)
                write_page(options.output, "bench_tenants.py", page(found), found)
            continue
        cells = measure_mixed(options, base) if part == "mixed" else measure_table(part, options, base)
        for cell in cells:
            found["time"][cell.key] = asdict(cell)
            write_page(options.output, "bench_tenants.py", page(found), found)
    return found


def main() -> None:
    options = options_from_command_line()
    if options.measure:
        print(json.dumps(measure_memory(MemoryCase(**json.loads(options.measure)), options.base)))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-tenants-") as folder, quiet_transformers():
        found = run(options, options.base or draw_gpt2_small(options.tokenizer, Path(folder)))
    print("\n".join(page(found)))
    for line in (lines := [] if options.quick else missed(found)):
        print(f"missed: {line}", file=sys.stderr)
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
