"""What loading a shard and running one step costs in memory, beside what the shard and its activations need.

    python scripts/bench_memory.py                 every case, as a Markdown table
    python scripts/bench_memory.py middle          one case
    python scripts/bench_memory.py --json ...      the figures as JSON

Checkpoints of random weights are written to a temporary folder (up to 1.8 GB, one at a time; --folder says where).
Each case is measured in a process of its own, by the peak of the resident set as Linux counts it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np

MIB = 2**20
STORED = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32_000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "vocab_size": 262_144, "hidden_size": 2048,
    "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
    "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A checkpoint and the shard of it that is measured.

    Attributes:
        family: base configuration.
        layers: of the whole model.
        stored, dtype: of the file's weights, and of the loaded ones.
        start, stop: the shard's blocks.
        cache: "cold" or "warm": whether the checkpoint is in the page cache when the shard is loaded.
        rows: of 16 tokens in a batch.
        steps: each with one batch, of other tokens each time.
        allocator: "default", or "returning": glibc gives every large block back to the system when it is freed.
    """

    family: dict[str, Any]
    layers: int
    stored: str
    dtype: str
    start: int
    stop: int
    cache: str
    rows: int
    steps: int
    allocator: str


CASES = {
    "middle-small-batch": Case(LLAMA, 12, "bfloat16", "bfloat16", 3, 9, "cold", 2, 1, "default"),
    "middle": Case(LLAMA, 12, "bfloat16", "bfloat16", 3, 9, "warm", 32, 1, "returning"),
    "middle-default-allocator": Case(LLAMA, 12, "bfloat16", "bfloat16", 3, 9, "warm", 32, 1, "default"),
    "middle-fp32-to-bf16": Case(LLAMA, 8, "float32", "bfloat16", 1, 7, "warm", 2, 1, "default"),
    "client-cold": Case(GEMMA, 3, "bfloat16", "bfloat16", 0, 1, "cold", 64, 4, "returning"),
    "client-warm": Case(GEMMA, 3, "bfloat16", "bfloat16", 0, 1, "warm", 64, 4, "returning"),
    "client-default-allocator": Case(GEMMA, 3, "bfloat16", "bfloat16", 0, 1, "warm", 64, 4, "default"),
    "block-default-allocator": Case(GEMMA, 3, "bfloat16", "bfloat16", 1, 2, "warm", 64, 4, "default"),
}
LENGTH = 16  # tokens of a row
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536"}


# Writing a checkpoint that is larger than what writing it takes.


def write_checkpoint(folder: Path, case: Case) -> int:
    """Write the checkpoint of a case; returns all bytes."""
    return write_shards(folder, case.family, case.layers, case.stored)


def write_shards(folder: Path, family: dict[str, Any], layers: int, stored: str) -> int:
    """Write config.json and one safetensors file for the table, one for the rest and one a block; returns all bytes."""
    (folder / "config.json").write_text(json.dumps({**family, "num_hidden_layers": layers, "dtype": stored}))
    parts = [_table(family), _outside(family), *(_block(family, layer) for layer in range(layers))]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        _write_file(folder / name, part, stored)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _table(config: dict[str, Any]) -> dict[str, list[int]]:
    return {"model.embed_tokens.weight": [config["vocab_size"], config["hidden_size"]]}


def _outside(config: dict[str, Any]) -> dict[str, list[int]]:
    head = {} if config["tie_word_embeddings"] else {"lm_head.weight": [config["vocab_size"], config["hidden_size"]]}
    return {"model.norm.weight": [config["hidden_size"]], **head}


def _block(config: dict[str, Any], layer: int) -> dict[str, list[int]]:
    width, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {
        "input_layernorm": [width], "post_attention_layernorm": [width],
        "self_attn.q_proj": [queries, width], "self_attn.k_proj": [keys, width], "self_attn.v_proj": [keys, width],
        "self_attn.o_proj": [width, queries], "mlp.gate_proj": [inner, width], "mlp.up_proj": [inner, width],
        "mlp.down_proj": [width, inner],
    }  # fmt: skip
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def _write_file(file: Path, shapes: dict[str, list[int]], stored: str) -> None:
    """One safetensors file of random weights; the same 1 Mi values again and again."""
    code, size = STORED[stored]
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size * int(np.prod(shape))]}
        end = header[name]["data_offsets"][1]
    values = np.random.default_rng(0).normal(0, 0.02, MIB).astype("<f4")
    chunk = (values.view("<u4") >> 16).astype("<u2").tobytes() if stored == "bfloat16" else values.tobytes()
    text = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for done in range(0, end, len(chunk)):
            handle.write(chunk[: end - done])
        handle.flush()
        os.fsync(handle.fileno())


# The page cache.


def set_cache(folder: Path, cache: str) -> float | None:
    """Bring the checkpoint into the page cache, or drop it from there; returns the share of it that is there now."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as handle:
            if cache == "cold":
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while handle.read(8 * MIB):
                    pass
    try:
        probes = [found for file in folder.glob("*.safetensors") for found in _probe(file)]
    except OSError:  # this file system cannot say
        return None
    return sum(probes) / len(probes)


def _probe(file: Path) -> Iterator[bool]:
    """Whether pages, one in every 4 MiB, can be read without waiting for the disk."""
    with file.open("rb", buffering=0) as handle:
        for position in range(0, file.stat().st_size, 4 * MIB):
            try:
                os.preadv(handle.fileno(), [bytearray(1)], position, os.RWF_NOWAIT)
                yield True
            except BlockingIOError:
                yield False


# Measuring, in a process of its own.


def resident() -> dict[str, int]:
    """This process's resident bytes: now, at its peak, without a file behind them, and with one."""
    keys = {"VmRSS": "now", "VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file"}
    pairs = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {keys[key]: int(value.split()[0]) * 1024 for key, value in pairs if key in keys}


def settle() -> dict[str, int]:
    """Give freed memory back, start the peak anew and return what is resident.

    Where the kernel does not let the peak be reset it keeps its old value, and what is measured can only be too large.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident()


def measure(case: Case, folder: Path) -> dict[str, float]:
    """Prove the family, load the shard, add LoRA and take the steps; figures in bytes and seconds."""
    import torch

    from splitllm.model.loading import Checkpoint
    from splitllm.model.lora import adapter_parameters, add_lora, matched_modules
    from splitllm.model.proof import admit
    from splitllm.model.shard import Shard
    from splitllm.model.trainable import Trainable
    from splitllm.recipe import LoraRecipe, OptimizerRecipe
    from splitllm.roles.worker import Worker

    torch.set_num_threads(1)
    torch.manual_seed(0)
    imported, clock = settle(), time.perf_counter()
    checkpoint = Checkpoint(folder)
    admit(checkpoint.config)
    proved, proof_s = resident(), time.perf_counter() - clock

    before, clock = settle(), time.perf_counter()
    shard = Shard.cut(checkpoint, case.start, case.stop, dtype=getattr(torch, case.dtype))
    load_s, loaded = time.perf_counter() - clock, resident()
    lookups = _lookups(shard, case) if shard.embeddings is not None else 0
    lora = LoraRecipe(rank=8, alpha=16, targets="all-linear")
    add_lora(shard, lora, matched_modules(checkpoint.config, "all-linear"), seed=0)
    worker = Worker(shard, Trainable(adapter_parameters(shard), OptimizerRecipe()), torch.device("cpu"))
    for step in range(case.steps):
        _step(worker, case, step)
    after, held = resident(), worker.peak()
    return {
        "weights": held["weights"],
        "adapter": held["adapter and optimiser"],
        "activations": _live_in_a_step(worker, case),
        "saved activations": held["activations of a batch"],
        "load growth": loaded["peak"] - before["now"],
        "lookup growth": lookups,
        "growth": after["peak"] - before["now"],
        "file growth": after["file"] - before["file"],
        "table": case.family["vocab_size"] * case.family["hidden_size"] * getattr(torch, case.dtype).itemsize,
        "imports": imported["now"],
        "proof peak": proved["peak"] - imported["now"],
        "proof left": before["now"] - imported["now"],
        "proof seconds": proof_s,
        "load seconds": load_s,
    }


def _inputs(shard: Any, case: Case) -> Any:
    """Distinct random tokens for a shard that embeds them, else random activations."""
    import torch

    config, tokens = shard.model.config, case.rows * LENGTH
    if shard.embeddings is not None:
        return torch.randperm(config.vocab_size)[:tokens].reshape(case.rows, LENGTH)
    return torch.randn(tokens, config.hidden_size, dtype=getattr(torch, case.dtype))


def _lookups(shard: Any, case: Case) -> int:
    """Growth of the peak by embedding some batches."""
    before = settle()
    for _ in range(case.steps):
        shard.embed(_inputs(shard, case))
    return resident()["peak"] - before["now"]


def _step(worker: Any, case: Case, step: int) -> None:
    """One micro-batch forward and backward, one optimiser step."""
    import torch

    from splitllm.model.joined import Rows
    from splitllm.model.randomness import MicroBatchId
    from splitllm.roles.worker import Ask

    micro_batch, lengths = MicroBatchId(step, 0, 0), (LENGTH,) * case.rows
    worker.trainable.expect([micro_batch])
    gradient = worker.shard.embeddings is None
    inputs = _inputs(worker.shard, case)
    (run,) = worker.forward([Ask(Rows(micro_batch, lengths), inputs, input_gradient=gradient)])
    worker.backward([run], [torch.randn_like(run.output_TD)])
    worker.trainable.apply(worker.trainable.gradients(), 1.0, 1.0)


def _live_in_a_step(worker: Any, case: Case) -> int:
    """Bytes of tensors alive at once, at most, in one more step, beside the weights, the adapter and its optimiser."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _step(worker, case, case.steps)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(live)


# All of it.


def run_cases(names: Sequence[str], parent: Path | None) -> dict[str, dict[str, float | None]]:
    """Measure cases, each in a fresh process; those of one checkpoint follow one another and share it."""
    figures: dict[str, dict[str, float | None]] = {}
    for _, group in groupby(names, key=lambda name: (CASES[name].family["model_type"], CASES[name].stored)):
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            size = 0
            for name in group:
                size = size or write_checkpoint(Path(folder), CASES[name])
                cached = set_cache(Path(folder), CASES[name].cache)
                figures[name] = {"checkpoint": size, "cached": cached, **_in_a_process(name, folder)}
    return figures


def _in_a_process(name: str, folder: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if CASES[name].allocator == "returning":
        environment.update(RETURNING)
    command = [sys.executable, __file__, "--measure", name, "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def as_table(figures: dict[str, dict[str, float | None]]) -> str:
    """The figures as Markdown: a row each, a column a case; MiB, seconds, and the cached share of the checkpoint."""
    lines = ["| | " + " | ".join(figures) + " |", "|---|" + "---:|" * len(figures)]
    for key in next(iter(figures.values())):
        cells = [_cell(key, case[key]) for case in figures.values()]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.2f}" if key == "cached" or key.endswith("seconds") else f"{value / MIB:,.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which; all by default")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print figures in bytes as JSON")
    parser.add_argument("--measure", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        parser.error(f"no case {unknown[0]}; there are {', '.join(CASES)}")
    if options.measure:
        print(json.dumps(measure(CASES[options.measure], options.folder)))
        return
    figures = run_cases(options.cases or list(CASES), options.folder)
    print(json.dumps(figures) if options.json else as_table(figures))


if __name__ == "__main__":
    main()
