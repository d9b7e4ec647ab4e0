"""What a server holds for its clients: each case in a process of its own, the peak of which is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import torch
from bench_memory import MIB, resident, settle
from pages import table
from servers import ONE_BATCH, Load, Traffic, build
from torch.profiler import ProfilerActivity, profile

from splitllm.model.loading import quiet_transformers

BENCHMARK = Path(__file__).with_name("bench_tenants.py")
MEMORY_CLIENTS, REPLICAS, STEPS = (1, 4, 16, 64), 16, 3
DEFAULT = "glibc's own"
ALLOCATORS = {DEFAULT: {}, "256 KiB": {"MALLOC_MMAP_THRESHOLD_": "262144"}}
ROW_SHAPES = {"1 x 32": (32,), "4 x 128": (128,) * 4}
FURTHER, SAVED = 1.10, 0.74

Figures = Mapping[str, Mapping[str, float]]
"""By `MemoryCase.key`."""


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
    command = [sys.executable, str(BENCHMARK), "--measure", case.key, "--base", str(base)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(case.key, {key: round(value / MIB, 1) for key, value in figures.items()}, flush=True)
    return figures


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


def large(figures: Figures) -> list[str]:
    """Bars that are not reached; that of a further client is over its count with transformers' own blocks."""
    lines = []
    for case in (MemoryCase(**json.loads(key)) for key in figures):
        its = further(figures, case)
        if its and its[0] > FURTHER * its[2]:
            lines.append(f"{case.key}: a further client takes {its[0] / its[2]:.2f} of its count, the bar is {FURTHER}")
    for name, allocator, ours, theirs, _ in replicas(figures):
        if 1 - ours / theirs < SAVED:
            lines.append(f"{name}, {allocator}: {1 - ours / theirs:.1%} less, the bar is {SAVED:.0%}")
    return lines
