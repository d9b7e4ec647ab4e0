"""The ledger of a recipe as people and programs read it: predicted, and beside it what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from splitllm.policy.admission import MIB
from splitllm.roles.ledger import PARTS, Ledger, Parts

AFTER_STEPS = 2
"""By then every role has gone forward and backward and has its optimiser's state."""
TOGETHER = "in one process"
WIDEST = 1000  # characters of a table


def mib_of(parts: Parts) -> dict[str, float]:
    """What is not nothing, and the total, in MiB."""
    sizes = {part: getattr(parts, part) for part in PARTS}
    return {part: round(size / MIB, 2) for part, size in sizes.items() if size} | {"total": total_mib(parts)}


def total_mib(parts: Parts) -> float:
    """In MiB."""
    return round(parts.total / MIB, 1)


def as_json(ledger: Ledger, free: int | None) -> dict[str, Any]:
    """All of it in MiB.

    Args:
        ledger: of a recipe.
        free: bytes that this machine has left; None: nobody knows.
    """
    return {
        "roles_mib": {name: mib_of(parts) for name, parts in ledger.roles().items()},
        "each_other_rank_mib": {name: mib_of(ranks[1]) for name, ranks in _ranks(ledger).items()},
        "in_files_mib": {name: round(size / MIB, 2) for name, size in ledger.files().items()},
        "in_one_process_mib": mib_of(ledger.together),
        "all_processes_mib": round(ledger.apart / MIB, 1),
        "free_here_mib": None if free is None else round(free / MIB, 1),
    }


def show(ledger: Ledger, console: Console, title: str) -> None:
    """Print one table: a row for each kind of role as a process of its own, and one for all in one process.

    Args:
        ledger: of a recipe.
        console: where it goes.
        title: above it.
    """
    for line in [title, *lines_of(rows_of(ledger)), *in_files(ledger)]:
        console.print(Text(line), soft_wrap=True)


def in_files(ledger: Ledger) -> list[str]:
    """What lies in files and not in memory, in one line, if anything does."""
    said = ", ".join(f"{name} {size / MIB:,.1f}" for name, size in ledger.files().items())
    return [f"frozen weights in files, MiB of each process: {said}"] if said else []


def rows_of(ledger: Ledger) -> dict[str, Parts]:
    """The rows of that table."""
    rows, several = dict[str, Parts](), _ranks(ledger)
    for what, names, parts in _kinds(ledger):
        kind = f"{what} x{len(names)}" if len(names) > 1 else names[0]
        if names[0] in several:
            ranks = several[names[0]]
            rows |= {f"{kind}, rank 0 of {len(ranks)}": parts, f"{kind}, each other rank": ranks[1]}
        else:
            rows[kind] = parts
    return {**rows, TOGETHER: ledger.together}


def _ranks(ledger: Ledger) -> dict[str, list[Parts]]:
    """What each process holds of servers in several."""
    ranks = {name: ledger.processes(name) for name in ledger.roles()}
    return {name: found for name, found in ranks.items() if len(found) > 1}


def lines_of(rows: Mapping[str, Parts]) -> list[str]:
    """A table as lines, as wide as it has to be."""
    with (console := Console(width=WIDEST, no_color=True, force_terminal=False)).capture() as captured:
        console.print(table_of(rows))
    return [line.rstrip() for line in captured.get().splitlines()]


def table_of(rows: Mapping[str, Parts]) -> Table:
    """Of several holders of memory, by what they are called."""
    used = [part for part in PARTS if any(getattr(parts, part) for parts in rows.values())]
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("MiB", no_wrap=True)
    for heading in [*used, "total"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, parts in rows.items():
        table.add_row(name, *(_short(getattr(parts, part)) for part in used), _short(parts.total))
    return table


def _kinds(ledger: Ledger) -> list[tuple[str, list[str], Parts]]:
    """Those that are alike; of a tier of several kinds each by its names."""
    kinds = ledger.alike()
    several = {tier for tier, _, _ in kinds if sum(other == tier for other, _, _ in kinds) > 1}
    return [(", ".join(names) if tier in several else tier, names, parts) for tier, names, parts in kinds]


def _short(size: int) -> str:
    mib = size / MIB
    return "" if not size else f"{mib:,.0f}" if mib >= 10 else f"{mib:.1f}"


def announced(ledger: Ledger) -> list[str]:
    """The table of a run in one process: of its roles what each adds, and all of it."""
    rows = {name: replace(parts, process=0) for name, parts in rows_of(ledger).items() if name != TOGETHER}
    return ["memory, predicted:", *lines_of({**rows, TOGETHER: ledger.together}), *in_files(ledger)]


def compared(predicted: float, measured: float) -> str:
    """In words, of MiB."""
    off = 100 * (predicted / max(1.0, measured) - 1)
    return f"{predicted:,.0f} MiB predicted, {measured:,.0f} measured ({off:+.0f} %)"
