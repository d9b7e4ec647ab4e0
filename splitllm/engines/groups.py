"""The processes over which an engine spreads weights: those of torch's default group."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def join_group(device: torch.device) -> int:
    """Be in torch's default group: the one that is there, or one of this process alone, without a network.

    Args:
        device: where this process computes.

    Returns:
        How many processes are in it.
    """
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed asks for it
    if not dist.is_initialized():
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(BACKENDS[device.type], store=alone, rank=0, world_size=1)
    return dist.get_world_size()
