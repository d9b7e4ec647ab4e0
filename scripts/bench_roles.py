"""What roles of real size take as processes of their own: predicted beside measured, and tokens a second, by mode.

    python scripts/bench_roles.py                          every mode, as a Markdown table
    python scripts/bench_roles.py --modes plain "2 x FSDP2"
    python scripts/bench_roles.py --json ...               the figures as JSON

Each mode is a run of `splitllm client`, `edge` and `cloud` over loopback, on random weights of Gemma-2B's shapes in
bf16, written once (4.2 GB, those of the client 1.6; --folder says where, and keeps them). Measured is the peak of the
resident set of each process as Linux counts it; predicted is what `splitllm plan --memory` says of the same recipe.
Rows are printed as they come, and with --out all figures are in a file after each of them, to which another run adds.
Before "ZeRO-3 nvme" run `make operators`, or minutes of it go into compiling.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_memory import MIB, write_shards
from role_modes import LENGTH, MODES, ROOT, Mode, Shape, recipe_of
from role_processes import RoleFailed, free_port, imported_of, resident_after, said, start, watched

HEAVY = ("datasets", "deepspeed", "pyarrow")
"""Packages that a role imports only where its recipe needs them."""
IMPORTS = "import splitllm.deployment.client, splitllm.deployment.server"
BARE_IMPORTS = "import torch, transformers, peft"
HEADING = "| mode | role | predicted | measured | difference | tokens/s |\n|---|---|---:|---:|---:|---:|"
OWN_COLUMN = ("process", "weights", "offloaded", "adapters", "gradients", "optimizer", "activations")
COLUMNS = ("mode", "of", *OWN_COLUMN, "buffers", "predicted", "measured")
BY_HELD = {"weights": "weights", "adapter and optimiser": "optimizer", "activations of a batch": "activations"}
"""What a role counts of its own tensors, and the column in which that is; adapter and optimiser are one number."""
OPERATORS = {"TORCH_EXTENSIONS_DIR": "build/extensions", "CXX": "scripts/quick-g++"}
"""As `make operators` has them; with another compiler they would be compiled again."""
Figures = dict[str, dict[str, Any]]


def run(mode: Mode, shape: Shape, folder: Path, limit: float) -> Figures:
    """All roles as processes until the run is complete: figures by role, in bytes, and tokens a second."""
    base, work = base_of(mode, shape, folder), folder / "run"
    shutil.rmtree(work, ignore_errors=True)
    (work / "files").mkdir(parents=True)
    (work / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts(10)))
    servers = ["cloud", *(["edge"] if mode.edge else [])]
    ports = {name: free_port() for name in servers}
    (work / "recipe.yaml").write_text(recipe_of(mode, shape, base, work / "rows.jsonl", ports), encoding="utf-8")
    counts = {name: mode.processes if name == "edge" else 1 for name in [*servers, "client"]}
    processes = {
        name: start(_words(name, mode, work), work / f"{name}.log", mode.environment, count)
        for name, count in counts.items()
    }
    try:
        peaks = watched(processes, counts, limit)
    except RoleFailed as error:
        raise RoleFailed("\n".join([str(error), *(_tail(work / f"{name}.log") for name in counts)])) from error
    figures = {label: {"measured": peak, **_told(work, label)} for label, peak in peaks.items()}
    shutil.rmtree(work)
    return figures


def base_of(mode: Mode, shape: Shape, folder: Path) -> Path:
    """The checkpoint, which is written once."""
    layers = shape.blocks + 2 if mode.edge else 3
    base = folder / f"base-{layers}-{shape.width}-{mode.table}"
    if not base.exists():
        part = folder / f"{base.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_shards(part, shape.config(mode.table), layers, "bfloat16")
        part.rename(base)
    return base


def _texts(count: int) -> list[str]:
    """Rows of more tokens than the recipe takes, no two alike."""
    return [" ".join(f"word{number * 1000 + place}" for place in range(LENGTH)) for number in range(count)]


def _words(name: str, mode: Mode, work: Path) -> list[str]:
    """The command line of a role."""
    own = [word.replace("FOLDER", str(work / "files")) for word in mode.at_edge] if name == "edge" else []
    own += [f"server.processes={mode.processes if name == 'edge' else 1}", f"train.threads={mode.threads(name)}"]
    return [name, str(work / "recipe.yaml"), *mode.overrides, *own, "--output-dir", str(work / name)]


def _told(work: Path, label: str) -> dict[str, Any]:
    name, _, rank = label.partition(", rank ")
    log = work / f"{name}.log"
    told = said(log, int(rank or 0))
    if label != "client":  # the top logs the same steps
        told.pop("tokens_per_second", None)
    return {**told, "heavy_imports": len(imported_of(HEAVY, log))}


def _tail(log: Path) -> str:
    return f"{log.name}: ...{log.read_text(errors='replace')[-2000:]}"


# Tables.


def as_rows(mode: str, roles: Figures) -> list[str]:
    """A mode as Markdown: a row for each process; MiB."""
    lines = []
    for role, told in sorted(roles.items()):
        predicted, measured = told.get("predicted"), told["measured"]
        off = "?" if predicted is None else f"{100 * (predicted / measured - 1):+.0f} %"
        rate = f"{told['tokens_per_second']:.1f}" if "tokens_per_second" in told else ""
        there = "?" if predicted is None else f"{predicted / MIB:,.0f}"
        lines.append(f"| {mode} | {role} | {there} | {measured / MIB:,.0f} | {off} | {rate} |")
    return lines


def as_parts(figures: Mapping[str, Figures]) -> str:
    """Of each edge what it was predicted to hold by what it is for, and below what it counted of that; MiB."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    for mode, roles in figures.items():
        for role, told in sorted(roles.items()):
            if role.startswith("edge") and "parts" in told:
                lines += _parts_rows(f"{mode}{role.removeprefix('edge')}", told)
    return "\n".join(lines)


def _parts_rows(name: str, told: Mapping[str, Any]) -> list[str]:
    parts = dict(told["parts"])
    predicted = {column: parts.pop(column, 0) for column in OWN_COLUMN}
    predicted |= {"buffers": sum(parts.values()), "predicted": told["predicted"]}
    counted = {column: told.get("held", {}).get(held, 0) for held, column in BY_HELD.items()}
    counted["measured"] = told["measured"]
    rows = {"predicted": predicted, "held": counted}
    return [
        f"| {name} | {what} | " + " | ".join(_cell(row.get(column, 0)) for column in COLUMNS[2:]) + " |"
        for what, row in rows.items()
    ]


def _cell(size: float) -> str:
    return f"{size / MIB:,.0f}" if size else ""


# All of it.


@contextmanager
def place(folder: Path | None) -> Iterator[Path]:
    """Where checkpoints are written: a folder that stays, or one that does not."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=list(MODES), metavar="MODE", help="which; all by default")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are written, and stay (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="a JSON file of all figures, written after each mode")
    parser.add_argument("--json", action="store_true", help="print figures in bytes as JSON")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a mode is given up")
    parser.add_argument("--blocks", type=int, default=Shape.blocks, help="of the edge, to try something smaller")
    parser.add_argument("--width", type=int, default=Shape.width, help="of the model, a multiple of 256")
    options = parser.parse_args()
    if unknown := sorted(set(options.modes) - set(MODES)):
        parser.error(f"no mode {unknown[0]}; there are {', '.join(MODES)}")
    return options


def run_modes(options: argparse.Namespace) -> tuple[dict[str, Figures], list[str]]:
    """Figures by mode, those of the file among them, and the modes that failed."""
    shape, failed = Shape(options.blocks, options.width), []
    figures: dict[str, Figures] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    with place(options.folder) as folder:
        for name in options.modes:
            started = time.monotonic()
            try:
                figures[name] = run(MODES[name], shape, folder, options.limit)
            except RoleFailed as error:
                failed.append(name)
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            if options.out:
                options.out.write_text(json.dumps(figures))
            if not options.json:
                print("\n".join(as_rows(name, figures[name])), flush=True)
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return figures, failed


def main() -> None:
    options = options_of()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # roles end with this process
    for name, place_of in OPERATORS.items():
        os.environ.setdefault(name, str(ROOT / place_of))
    if not options.json:
        print(HEADING, flush=True)
    figures, failed = run_modes(options)
    imports = {"imports": resident_after(IMPORTS), "torch, transformers, peft": resident_after(BARE_IMPORTS)}
    if options.json:
        print(json.dumps({**figures, "interpreter": imports}))
    else:
        print(f"\n{as_parts(figures)}\n")
        print("; ".join(f"an interpreter with {name}: {size / MIB:,.0f} MiB" for name, size in imports.items()))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
