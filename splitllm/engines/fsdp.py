"""A shard's blocks by FSDP2: the frozen weights of each are spread over ranks, and whole only while it computes."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from splitllm.engines.groups import join_group
from splitllm.model.lora import adapter_parameters
from splitllm.model.shard import Shard


def shard_by_fsdp2(shard: Shard, device: torch.device) -> None:
    """Spread the frozen weights of a shard's blocks over the ranks of torch's default group.

    Ranks have to compute the same blocks in the same order.

    Args:
        shard: with its adapters, which are left as they are on every rank.
        device: where it computes.
    """
    mesh = init_device_mesh(device.type, (join_group(device),))
    ignored = set(adapter_parameters(shard).values())
    for block in shard.own_blocks():
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
