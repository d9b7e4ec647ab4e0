"""What roles of real size take as processes of their own: predicted beside measured, and tokens a second, by mode.

    python scripts/bench_roles.py                  every mode of `MODES`, as a Markdown table
    python scripts/bench_roles.py client           one mode
    python scripts/bench_roles.py --json ...       the figures as JSON

Each mode is a run of `splitllm client`, `edge` and `cloud` over loopback, on random weights that are written to a
temporary folder (Gemma-2B's shapes, bf16; up to 5.4 GB, --folder says where). Measured is the peak of the resident set
of each process as Linux counts it; predicted is what `splitllm plan --memory` says of the same recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_memory import MIB, write_shards

ROOT = Path(__file__).resolve().parents[1]
GEMMA_2B = {
    "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "vocab_size": 256_000, "hidden_size": 2048,
    "intermediate_size": 16_384, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
    "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
}  # fmt: skip
LENGTH = 128
HEAVY = ("datasets", "deepspeed", "pyarrow")
"""Packages that a role imports only where its recipe needs them."""
IMPORTS = "import splitllm.deployment.client, splitllm.deployment.server"
BARE_IMPORTS = "import torch, transformers, peft"


@dataclass(frozen=True)
class Mode:
    """A way to run a model of Gemma-2B's width: how many blocks the edge has, and what the recipe says beside that.

    Attributes:
        edge: blocks of the edge; the client and the cloud have one each. 0: there is no edge.
        overrides: of the recipe.
        environment: of all its processes.
        at_edge: overrides of the edge alone; `{folder}` is one for its files.
        processes: of the edge, under `accelerate launch`.
        rows: of a micro-batch.
    """

    edge: int
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    at_edge: tuple[str, ...] = ()
    processes: int = 1
    rows: int = 1


MODES = {
    "client": Mode(0, ("split.memory_mib={client: 850}",), {"PYTHONPROFILEIMPORTTIME": "1"}),
    "client without a limit": Mode(0),
    "plain": Mode(18),
    "activation checkpointing": Mode(18, ("train.activation_checkpointing=true",)),
    "nf4": Mode(18, ("quantization={edge: nf4}",)),
    "int8": Mode(18, ("quantization={edge: int8}",)),
    "two rows": Mode(18, rows=2),
    "two rows, two processes": Mode(18, processes=2, rows=2),
}
"""A mode is a row of the table; the first two are about the client."""


def recipe_of(mode: Mode, base: Path, rows: Path, address: dict[str, int]) -> str:
    """One client with rows of 128 tokens, LoRA of rank 8 on every linear layer."""
    tiers, cuts = (
        ("{client: 1, edge: 1, cloud: 1}", [1, 1 + mode.edge]) if mode.edge else ("{client: 1, cloud: 1}", [1])
    )
    places = ", ".join(f"{name}: '127.0.0.1:{port}'" for name, port in address.items())
    return f"""\
model: {{base: {base}, tokenizer: {ROOT / "recipes/quickstart-base"}, dtype: bfloat16}}
split: {{tiers: {tiers}, cuts: {cuts}, labels: cloud}}
lora: {{rank: 8, alpha: 16, targets: all-linear}}
data: {{source: {rows}, format: text, max_length: {LENGTH}, eval_fraction: 0.1}}
train: {{steps: 4, batch_size: {mode.rows}, threads: 1, schedule: {{name: constant}}}}
wire: {{addresses: {{{places}}}}}
"""


def run(mode: Mode, folder: Path) -> dict[str, dict[str, float]]:
    """All roles as processes until the run is complete: figures by role, in bytes, and tokens a second."""
    base, rows, recipe = folder / f"base-{mode.edge}", folder / "rows.jsonl", folder / "recipe.yaml"
    layers = mode.edge + 2 if mode.edge else 3
    if not base.exists():
        base.mkdir()
        write_shards(base, GEMMA_2B, layers, "bfloat16")
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts(10)), encoding="utf-8")
    servers = ["cloud", *(["edge"] if mode.edge else [])]
    recipe.write_text(recipe_of(mode, base, rows, {name: _free_port() for name in servers}), encoding="utf-8")
    processes = {}
    for name in [*servers, "client"]:
        count = mode.processes if name == "edge" else 1
        own = [word.format(folder=folder / "files") for word in mode.at_edge] if name == "edge" else []
        words = [name, str(recipe), *mode.overrides, *own, f"server.processes={count}"]
        words += ["--output-dir", str(folder / name)]
        processes[name] = _start(words, folder / f"{name}.log", mode.environment, count)
    try:
        peaks = _watched(processes)
    finally:
        for process in processes.values():
            process.kill()
    failed = [name for name, process in processes.items() if process.wait()]
    if failed:
        raise SystemExit("\n".join((folder / f"{name}.log").read_text()[-3000:] for name in failed))
    figures = {name: {**peak, **_said(folder / f"{name}.log")} for name, peak in peaks.items()}
    for name in [*processes, "files"]:
        shutil.rmtree(folder / name, ignore_errors=True)
    return figures


def _texts(count: int) -> list[str]:
    """Rows of more tokens than the recipe takes, no two alike."""
    return [" ".join(f"word{number * 1000 + place}" for place in range(LENGTH)) for number in range(count)]


def _start(words: Sequence[str], log: Path, environment: dict[str, str], count: int) -> subprocess.Popen[bytes]:
    shared = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "HF_HUB_OFFLINE": "1", **environment}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
    launch = [*launch, "--main_process_port", str(_free_port())] if count > 1 else []
    command = [sys.executable, *launch, "-m", "splitllm", *words]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=shared)


def _watched(processes: dict[str, subprocess.Popen[bytes]]) -> dict[str, dict[str, float]]:
    """The peak of each, which the kernel keeps, as long as it lives; a role that fails ends them all."""
    peaks: dict[str, dict[str, float]] = {name: {} for name in processes}
    while any(process.poll() is None for process in processes.values()):
        for name, process in processes.items():
            for pid in (process.pid, *_children(process.pid)):  # of a launcher the largest rank
                peaks[name]["measured"] = max(peaks[name].get("measured", 0), _resident(pid))
            if process.poll():
                return peaks
        time.sleep(0.05)
    return peaks


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+)", status)  # a zombie has none
    return int(found[1]) * 1024 if found else 0


def _said(log: Path) -> dict[str, float]:
    """What a role logged of itself: tokens a second in its steps after the first, and what it predicted."""
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    steps = [event for event in events if event["event"] == "step" and event.get("tokens")][1:]
    told: dict[str, float] = (
        {"tokens_per_second": sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)} if steps else {}
    )
    told["heavy_imports"] = len(imported_of(HEAVY, log))
    predicted = [event["predicted_mib"] * MIB for event in events if "predicted_mib" in event]
    return told | ({"predicted": predicted[0]} if predicted else {})


def imported_of(packages: Sequence[str], log: Path) -> list[str]:
    """Which of some packages a process imported, where it ran with PYTHONPROFILEIMPORTTIME: the log tells all."""
    found = {
        line.rpartition("|")[2].strip() for line in log.read_text().splitlines() if line.startswith("import time:")
    }
    assert "torch" in found or not found, "imports are told, or nothing is"
    return [name for name in packages if name in found]


def resident_after(imports: str) -> int:
    """Bytes of an interpreter that has imported something."""
    code = f"{imports}; print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code]
    status = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ}).stdout
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) * 1024


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown: a row for each role of each mode; MiB."""
    lines = ["| mode | role | predicted | measured | difference | tokens/s |", "|---|---|---:|---:|---:|---:|"]
    for mode, roles in figures.items():
        for role, told in roles.items():
            predicted, measured = told.get("predicted"), told["measured"]
            off = "?" if predicted is None else f"{100 * (predicted / measured - 1):+.0f} %"
            rate = f"{told['tokens_per_second']:.1f}" if "tokens_per_second" in told else ""
            there = "?" if predicted is None else f"{predicted / MIB:,.0f}"
            lines.append(f"| {mode} | {role} | {there} | {measured / MIB:,.0f} | {off} | {rate} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", metavar="MODE", help="which; all by default")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print figures in bytes as JSON")
    options = parser.parse_args()
    unknown = sorted(set(options.modes) - set(MODES))
    if unknown:
        parser.error(f"no mode {unknown[0]}; there are {', '.join(MODES)}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures: dict[str, Any] = {name: run(MODES[name], Path(folder)) for name in options.modes or MODES}
    imports = {"imports": resident_after(IMPORTS), "torch, transformers, peft": resident_after(BARE_IMPORTS)}
    if options.json:
        print(json.dumps({**figures, "interpreter": imports}))
        return
    print(as_table(figures))
    print("\n" + "; ".join(f"an interpreter with {name}: {size / MIB:,.0f} MiB" for name, size in imports.items()))


if __name__ == "__main__":
    main()
