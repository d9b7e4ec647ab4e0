"""A program: a shard whose matrices lie in files, then a plain one; it fails where they are not what they should be."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from splitllm.engines.places import places_of
from splitllm.engines.zero import BUFFERS, Partitioned, library
from splitllm.model.loading import Checkpoint
from splitllm.model.machine import one_arena, resident_bytes, return_at_once
from splitllm.model.memory import largest_matrix, shard_bytes
from splitllm.model.shard import Shard
from splitllm.recipe import ZeroRecipe

MIB = 2**20
BESIDE = 48 * MIB
"""Activations, buffers of the reader, and pages of libraries that a first step brings in."""


def main(folder: Path, dtype: torch.dtype) -> None:
    """Load, step, compare, and leave nothing behind."""
    torch.set_num_threads(1)
    one_arena()
    return_at_once()
    base, files = Checkpoint(folder / "base"), folder / "files"
    zero = ZeroRecipe(stage=3, offload_param="nvme", nvme_path=str(files))
    library(zero, torch.device("cpu"))
    largest = largest_matrix(base.config, 1, 6)
    block = shard_bytes(base.config, 1, 2, False, dtype)
    buffers = BUFFERS * dtype.itemsize * largest
    before = resident_bytes()
    partitioned = Partitioned(zero, largest, torch.device("cpu"))
    shard = Shard.cut(base, 1, 6, dtype=dtype, take=partitioned.take)
    partitioned.attach(shard)
    grown, highest, held = resident_bytes() - before, peak() - before, places_of(shard.parameters())
    on_disk = sum(file.stat().st_size for file in files.rglob("*") if file.is_file())
    assert held.files > 50 * MIB * dtype.itemsize and held.host == 0 and held.device < MIB, held
    assert held.files <= on_disk < held.files + MIB, (held, on_disk)
    assert grown < held.device + buffers + BESIDE, grown / MIB
    assert highest < held.device + block + buffers + BESIDE, highest / MIB
    gradients = [_gradient(shard, dtype)]
    stepped = peak() - before
    assert stepped < held.device + block + buffers + BESIDE, stepped / MIB
    gradients.append(_gradient(Shard.cut(base, 1, 6, dtype=dtype), dtype))
    assert torch.equal(*gradients)
    sizes = {"in files": held.files, "growth": grown, "peak of loading": highest, "peak": stepped}
    sys.stdout.write(f"MiB: { ({name: size // MIB for name, size in sizes.items()}) }\n")


def peak() -> int:
    """What this program had resident at most; unlike `ru_maxrss` it does not begin with what its parent had."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _gradient(shard: Shard, dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.randn(1, 16, 1024, generator=torch.Generator().manual_seed(0))
    hidden_BSD = drawn.to(dtype).requires_grad_()
    shard.blocks(hidden_BSD).square().sum().backward()
    assert hidden_BSD.grad is not None
    return hidden_BSD.grad


if __name__ == "__main__":
    main(Path(sys.argv[1]), getattr(torch, sys.argv[2]))
