"""The processes over which an engine spreads weights: those of torch's default group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Meanwhile these variables are set where they are not; child processes would take them for their own."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def rank_of(device: torch.device) -> AbstractContextManager[None]:
    """What DeepSpeed reads where no launcher has set it, while it starts."""
    return environment(LOCAL_RANK=str(device.index or 0))


def join_group(device: torch.device) -> int:
    """Be in torch's default group: the one that is there, or one of this process alone, without a network.

    Args:
        device: where this process computes.

    Returns:
        How many processes are in it.
    """
    if not dist.is_initialized():
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(BACKENDS[device.type], store=alone, rank=0, world_size=1)
    return dist.get_world_size()
