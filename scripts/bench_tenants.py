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
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bases import draw_gpt2_small
from pages import bullets, known_figures, machine, write_page
from tenant_memory import MemoryCase, in_a_process, large, measure_memory, memory_cases, memory_table, saved_table
from tenant_times import ADAPTERS, Cell, Quiet, measure_mixed, measure_table, mixed_table, slow, time_table

from splitllm.model.loading import quiet_transformers

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft")
PARTS = ("edge", "top", "mixed", "memory")
CLIENTS, LENGTHS = (1, 2, 4, 8, 16, 32, 64), (16, 32, 64)


def page(found: Mapping[str, Any]) -> list[str]:
    cells = [Cell(**cell) for cell in found["time"].values()]
    lines = [*bullets(found["machine"]), *time_table("edge", "Edge", cells), *mixed_table(cells)]
    lines += time_table("top", "Top with head and loss", cells)
    return lines + memory_table(found["memory"]) + saved_table(found["memory"])


def missed(found: Mapping[str, Any]) -> list[str]:
    """Bars that are not reached."""
    return slow([Cell(**cell) for cell in found["time"].values()]) + large(found["memory"])


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
