"""A shard's blocks by FSDP2: the frozen weights of each are spread over ranks, and whole only while it computes."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from splitllm.engines.groups import join_group
from splitllm.model.machine import return_at_once


class Fsdp2:
    """Spreads blocks over the ranks of torch's default group, which have to compute the same blocks in the same order.

    Args:
        device: where they compute.
    """

    def __init__(self, device: torch.device) -> None:
        return_at_once()  # blocks come and go, as in `engines.zero`
        self._mesh = init_device_mesh(device.type, (join_group(device),))

    def take(self, block: nn.Module) -> None:
        """Spread a block; of its weights this process holds a part from now on. Adapters come later, and stay whole."""
        if list(block.parameters()):  # else another shard has it
            fully_shard(block.requires_grad_(False), mesh=self._mesh, reshard_after_forward=True)
