"""ZeRO stage 3 for the frozen matrices of a shard's blocks: each is whole only while it is computed with.

DeepSpeed partitions them over ranks, keeps the parts on the device, in host memory or in files, and gathers them; what
is gathered when is decided here (decision 20). Adapters are never touched, and vectors (norms, biases) stay whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from splitllm.model.shard import Shard


@dataclass(frozen=True)
class _Saved:
    """Stands in a graph for a view of a matrix that is not kept with it."""

    owner: nn.Module
    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Partitioned:
    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._init: Any = None
        self._open: nn.Module | None = None
        self._gathered: Any = None
        self._pointers: dict[int, nn.Parameter] = {}
        self._matrices: dict[nn.Module, list[nn.Parameter]] = {}
        self.gathers = 0

    def take(self, block: nn.Module) -> None:
        from deepspeed import zero
        matrices = [p for p in block.parameters() if p.dim() > 1]
        for p in matrices:
            p.requires_grad_(False)
        if self._init is None:
            self._init = zero.Init(module=nn.ParameterList(matrices), config_dict_or_path=self._config)
            self._first = matrices[0]
        else:
            self._first.convert_to_zero_parameters(param_list=matrices)

    def attach(self, shard: Shard) -> None:
        for module in shard.model.modules():
            own = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
            if own:
                module.register_forward_pre_hook(lambda m, _a: self._begin(m))
                module.register_forward_hook(lambda *_: self._end(), always_call=True)

    def _begin(self, module):
        self._need(module)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._hooks = hooks

    def _end(self):
        self._hooks.__exit__()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
            p = self._pointers.get(tensor.untyped_storage().data_ptr())
            if p is None:
                return tensor
            assert self._open is not None
            return _Saved(self._open, p, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _unpack(self, held: torch.Tensor | _Saved) -> torch.Tensor:
            if isinstance(held, torch.Tensor):
                return held
            self._need(held.owner)
            return held.parameter.data.as_strided(held.size, held.stride, held.offset)

    def _need(self, module: nn.Module) -> None:
        if module is self._open:
            return
        from deepspeed import zero
        self.release()
        own = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
        self._gathered = zero.GatheredParameters(own)
        self._gathered.__enter__()
        self.gathers += 1
        self._open, self._pointers = module, {p.untyped_storage().data_ptr(): p for p in own}

    def release(self) -> None:
        if self._gathered is not None:
            self._gathered.__exit__(None, None, None)
        self._open, self._gathered, self._pointers = None, None, {}


def default_group() -> None:
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed.ops
    deepspeed.ops.__compatible_ops__["shm_comm"] = False
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
