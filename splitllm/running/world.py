"""The processes of a run under `accelerate launch`: who this one is, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from splitllm.errors import RecipeError
from splitllm.recipe import TrainRecipe

LOOPBACK = "lo"
ENGINES = {  # that accelerate can be told to use: by which variable it hands that on, and our key
    "DeepSpeed": ("ACCELERATE_USE_DEEPSPEED", "server.zero"),
    "FSDP": ("ACCELERATE_USE_FSDP", "server.fsdp"),
}


@dataclass(frozen=True)
class World:
    """One process among its peers.

    Attributes:
        accelerator: placement and trackers.
        half: whether forwards run under bf16 autocast.
    """

    accelerator: Accelerator
    half: bool = False

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def size(self) -> int:
        """How many processes run."""
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward under the run's mixed precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext()

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def sum_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add tensors of the same names over all processes, in the order of ranks, so that it is repeatable."""
        if self.size == 1 or not tensors:
            return tensors
        names = sorted(tensors)
        summed: dict[str, torch.Tensor] = {}
        for dtype in sorted({tensors[name].dtype for name in names}, key=str):
            group = [name for name in names if tensors[name].dtype == dtype]
            flat = torch.cat([tensors[name].reshape(-1) for name in group])
            parts = [torch.empty_like(flat) for _ in range(self.size)]
            dist.all_gather(parts, flat)
            for part in parts[1:]:
                parts[0].add_(part)
            pieces = torch.split(parts[0], [tensors[name].numel() for name in group])
            summed.update({name: piece.reshape(tensors[name].shape) for name, piece in zip(group, pieces, strict=True)})
        return summed

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Add plain numbers over all processes, place by place."""
        if self.size == 1:
            return list(numbers)
        flat = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        dist.all_reduce(flat)
        return [float(value) for value in flat.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process; all of them get the same answer."""
        return self.sum_numbers([float(flag)])[0] > 0


@dataclass(frozen=True)
class Processes:
    """How many processes a recipe expects of one start.

    Attributes:
        count: of them.
        key: of the recipe, which says so.
    """

    count: int
    key: str

    def mismatch(self, started: int) -> str:
        """What to do where another number was started."""
        if started < self.count:
            how = (
                f"start {self.count}: accelerate launch --multi_gpu --num_processes {self.count}, on CPUs with "
                f"ACCELERATE_USE_CPU=true before it (accelerate's own --cpu starts one only), or set {self.key}=1"
            )
        else:
            how = f"launch {self.count}, or set {self.key}={started}"
        return f"{self.key}: the recipe expects {self.count}, but {started} run; {how}"


def share_cores(train: TrainRecipe, processes: Processes) -> None:
    """Give this process its part of the machine's cores; the first thing to do, before anything is computed.

    Args:
        train: `threads` is read.
        processes: that the recipe expects.

    Raises:
        RecipeError: the recipe expects another number of processes than were started, or accelerate was launched with
            an engine of its own.
    """
    for engine, (switch, key) in ENGINES.items():
        if os.environ.get(switch, "false").lower() == "true":
            what = f"accelerate was launched with {engine}, which it would not use here"
            raise RecipeError([f"{key}: {what}; choose it in the recipe, and launch with recipes/accelerate/*.yaml"])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes.count:
        raise RecipeError([processes.mismatch(started)])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", started))
    if 1 < started == local:  # all on this machine: nobody else has to reach them
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    torch.set_num_threads(train.threads or max(1, len(os.sched_getaffinity(0)) // local))


def open_world(train: TrainRecipe, project_dir: Path, processes: Processes) -> World:
    """Join the processes of this run; returns when all are here.

    From here on transformers writes files on rank 0 only: what every rank does for itself, such as the proof that a
    family can be cut, comes before.

    Args:
        train: `mixed_precision` and `trackers` are read.
        project_dir: where trackers write.
        processes: that the recipe expects.

    Raises:
        RecipeError: accelerate sees another number of processes than the recipe, or was launched for fp16.
    """
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=list(train.trackers) or None, project_dir=str(project_dir)
    )
    if accelerator.num_processes != processes.count:
        raise RecipeError([processes.mismatch(accelerator.num_processes)])
    precision = train.mixed_precision or accelerator.mixed_precision
    if precision not in ("no", "bf16"):
        raise RecipeError([f"train.mixed_precision: accelerate was launched with {precision}; use bf16, or no"])
    return World(accelerator, half=precision == "bf16")
