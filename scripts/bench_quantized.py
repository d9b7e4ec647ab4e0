"""What quantised weights save, and what they cost: memory while loading and in a step, and tokens a CPU second.

    python scripts/bench_quantized.py                          docs/benchmarks/quantization.md and .json
    python scripts/bench_quantized.py --blocks 1 --json        the figures alone, of a smaller shard

The shard is blocks of the size of Gemma 2B's (110 million numbers each) with random weights, LoRA of rank 8 on all
linear layers, and micro-batches of 8 x 64 tokens. Each case is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_memory import GEMMA, MIB, RETURNING, Case, resident, set_cache, settle, write_checkpoint
from pages import bullets, machine, table, write_page

FAMILY = {**GEMMA, "vocab_size": 1024, "intermediate_size": 16_384}
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "int8": {"method": "int8"},
    "nf4": {"method": "nf4"},
    "nf4, double": {"method": "nf4", "double": True},
}
DTYPES = ("bfloat16", "float32")
ROWS, LENGTH, STEPS = 8, 64, 6


def measure(folder: Path, method: str, dtype: str, *, loading: bool) -> dict[str, float]:
    """Load the middle shard and, unless that is all, add LoRA and take the steps; bytes and CPU seconds."""
    import torch

    from splitllm.model.loading import Checkpoint
    from splitllm.model.lora import adapter_parameters, add_lora, matched_modules
    from splitllm.model.memory import shard_bytes
    from splitllm.model.quantized import library
    from splitllm.model.quantized_bytes import saved_bytes, scratch_bytes
    from splitllm.model.shard import Shard
    from splitllm.model.trainable import Trainable
    from splitllm.recipe import LoraRecipe, OptimizerRecipe, QuantizationRecipe
    from splitllm.roles.worker import Worker

    torch.set_num_threads(1)
    torch.manual_seed(0)
    how = None if METHODS[method] is None else QuantizationRecipe.model_validate(METHODS[method])
    checkpoint, wide = Checkpoint(folder), getattr(torch, dtype)
    modules = matched_modules(checkpoint.config, "all-linear")
    library()
    stop = checkpoint.config.num_hidden_layers - 1
    before, clock = settle(), time.process_time()
    shard = Shard.cut(checkpoint, 1, stop, dtype=wide, quantization=how)
    load_seconds, loaded, config = time.process_time() - clock, resident(), checkpoint.config
    found = {
        "predicted weights": shard_bytes(config, 1, stop, False, wide) - saved_bytes(config, 1, stop, wide, how),
        "weights": Worker(shard, Trainable({}, OptimizerRecipe()), torch.device("cpu")).peak()["weights"],
        "load growth": loaded["peak"] - before["now"],
        "load CPU seconds": load_seconds,
    }
    if loading:
        return found
    add_lora(shard, LoraRecipe(targets="all-linear"), modules, seed=0)
    worker = Worker(shard, Trainable(adapter_parameters(shard), OptimizerRecipe()), torch.device("cpu"))
    clocks = [_step(worker, number, wide) for number in range(STEPS)]
    return found | {
        "scratch": 0 if how is None else scratch_bytes(config, wide),
        "activations": worker.peak()["activations of a batch"],
        "growth": resident()["peak"] - before["now"],
        "tokens a CPU second": ROWS * LENGTH / statistics.median(clocks[1:]),
    }


def _step(worker: Any, number: int, dtype: Any) -> float:
    """Forward, backward and one optimiser step of a micro-batch; its CPU seconds."""
    import torch

    from splitllm.model.joined import Rows
    from splitllm.model.randomness import MicroBatchId
    from splitllm.roles.worker import Ask

    clock, micro_batch = time.process_time(), MicroBatchId(number, 0, 0)
    worker.trainable.expect([micro_batch])
    inputs = torch.randn(ROWS * LENGTH, worker.shard.model.config.hidden_size, dtype=dtype)
    (run,) = worker.forward([Ask(Rows(micro_batch, (LENGTH,) * ROWS), inputs, input_gradient=True)])
    worker.backward([run], [torch.randn_like(run.output_TD)])
    worker.trainable.apply(worker.trainable.gradients(), 1.0, 1.0)
    return time.process_time() - clock


def run(blocks: int, parent: Path | None, *, loading: bool) -> dict[str, dict[str, float]]:
    """All cases, each in a fresh process, on one checkpoint."""
    case = Case(FAMILY, blocks + 2, "bfloat16", "bfloat16", 1, blocks + 1, "warm", ROWS, STEPS, "returning")
    figures = {}
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        write_checkpoint(Path(folder), case)
        for dtype in DTYPES[:1] if loading else DTYPES:
            for method in METHODS:
                set_cache(Path(folder), "warm")
                figures[f"{method}, {dtype}"] = _in_a_process(folder, method, dtype, loading)
    return figures


def _in_a_process(folder: str, method: str, dtype: str, loading: bool) -> dict[str, float]:
    environment = {**os.environ, **RETURNING, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--measure", method, dtype, "--folder", folder, *["--loading"][: int(loading)]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def lines_of(figures: dict[str, dict[str, float]]) -> list[str]:
    """As Markdown: a row a case."""
    sizes_of, times = ["#predicted", "#weights", "#load", "#step"], ["#load CPU-s", "#tokens/CPU-s", "#of plain"]
    rows = []
    for name, case in figures.items():
        plain = figures[f"plain, {name.rsplit(', ', 1)[1]}"]["tokens a CPU second"]
        sizes = [case[key] / MIB for key in ("predicted weights", "weights", "load growth", "growth")]
        speed = case["tokens a CPU second"]
        cells = [f"{size:,.1f}" for size in sizes]
        rows.append([name, *cells, f"{case['load CPU seconds']:.1f}", f"{speed:.1f}", f"{speed / plain:.2f}"])
    return table(["weights held as", *sizes_of, *times], rows)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written (220 MB a block)")
    parser.add_argument("--loading", action="store_true", help="load and take no step; in bf16")
    parser.add_argument("--json", action="store_true", help="print the figures and write no page")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/benchmarks/quantization.md")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, *options.measure, loading=options.loading)))
        return
    about = machine("torch", "transformers", "peft", "bitsandbytes") | {"torch threads": "1"}
    figures = run(options.blocks, options.folder, loading=options.loading)
    if options.json or options.loading:
        print(json.dumps(figures))
        return
    about["shard"] = f"blocks of 110,104,576 numbers, stored in bf16: {options.blocks}"
    lines = [*lines_of(figures), "", *bullets(about)]
    print("\n".join(lines))
    write_page(options.output, "bench_quantized.py", lines, {"machine": about, "results": figures})


if __name__ == "__main__":
    main()
