"""ZeRO stage 3 for the frozen matrices of a shard's blocks: each is whole only while it is computed with.

DeepSpeed partitions them over ranks, keeps the parts on the device, in host memory or in files, and puts them together
again; which is whole when is decided here (decision 20). Vectors (norms, biases) and adapters stay as they are.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from splitllm.engines.compiled import open_dead_locks
from splitllm.engines.folders import Folder
from splitllm.engines.groups import environment, join_group, rank_of
from splitllm.errors import RecipeError
from splitllm.model.machine import return_at_once
from splitllm.model.shard import Shard
from splitllm.model.spread_bytes import BUFFERS
from splitllm.recipe import ZeroRecipe

FILE_OPERATORS = ("async_io", "pin_memory")  # which DeepSpeed compiles to read and write files


@dataclass(frozen=True)
class _Saved:
    """Stands in a graph for a matrix, or a view of it, so that the graph does not hold it."""

    owner: nn.Module
    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Partitioned:
    """The frozen matrices of one base, in parts.

    No more than one module's are whole at a time, in forwards and in backwards. Ranks have to compute the same
    modules in the same order. Files are removed at the end of the process, or by `close`.

    Args:
        zero: where parts are kept.
        largest: numbers of the largest matrix that will be taken.
        device: where matrices are put together.

    Raises:
        RecipeError: DeepSpeed or what it needs is not installed, or the folder for files cannot be written.
    """

    def __init__(self, zero: ZeroRecipe, largest: int, device: torch.device) -> None:
        self._deepspeed, self._device = library(zero, device), device
        self._size = join_group(device)
        self._folder = Folder(zero.nvme_path) if zero.offload_param == "nvme" else None
        return_at_once()  # matrices come and go: an allocator that kept their memory would soon have all of it
        self._config = self._configuration(zero, largest, device)
        self._first: Any = None
        self._whole: nn.Module | None = None
        self._gathered: Any = None
        self._pointers: dict[int, nn.Parameter] = {}
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []

    def take(self, block: nn.Module) -> None:
        """Partition the matrices of a block; of each this process holds its part from now on."""
        matrices = [parameter.requires_grad_(False) for parameter in block.parameters() if parameter.dim() > 1]
        if not matrices:
            return
        if self._first is None:
            half = {"bf16": {"enabled": matrices[0].dtype == torch.bfloat16}}  # otherwise files hold fp32
            with rank_of(self._device):
                self._deepspeed.zero.Init(module=nn.ParameterList(matrices), config_dict_or_path=self._config | half)
            self._first = matrices[0]
        else:
            self._first.convert_to_zero_parameters(param_list=matrices)

    def attach(self, shard: Shard) -> None:
        """Make what was taken whole wherever this shard, or this replica of it, computes with it."""
        for module in shard.model.modules():
            if _parts_of(module):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end, always_call=True)

    def release(self) -> None:
        """Let nothing be whole."""
        if self._gathered is not None:
            self._gathered.__exit__(None, None, None)
        self._whole, self._gathered, self._pointers = None, None, {}

    def close(self) -> None:
        """Remove the files; nothing can be computed afterwards."""
        self.release()
        if self._folder is not None:
            self._folder.remove()

    def _configuration(self, zero: ZeroRecipe, largest: int, device: torch.device) -> dict[str, Any]:
        stage: dict[str, Any] = {"stage": 3, "memory_efficient_linear": False}
        if zero.offload_param != "none":
            stage["offload_param"] = {"device": zero.offload_param, "pin_memory": device.type == "cuda"}
        if self._folder is not None:
            buffers = {"buffer_count": BUFFERS, "buffer_size": -(-largest // self._size)}
            stage["offload_param"] |= {"nvme_path": str(self._folder.path), **buffers}
        return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage}

    def _begin(self, module: nn.Module, _inputs: object) -> None:
        self._need(module)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._hooks.append(hooks)

    def _end(self, *_: object) -> None:
        self._hooks.pop().__exit__()

    def _need(self, module: nn.Module) -> None:
        """Make a module's matrices whole, and no others."""
        if module is self._whole:
            return
        self.release()
        parts = _parts_of(module)
        gathered = self._deepspeed.zero.GatheredParameters(parts)
        gathered.__enter__()
        self._gathered = gathered
        self._whole, self._pointers = module, {part.untyped_storage().data_ptr(): part for part in parts}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        parameter = self._pointers.get(tensor.untyped_storage().data_ptr())
        if parameter is None or self._whole is None:
            return tensor
        return _Saved(self._whole, parameter, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        self._need(saved.owner)
        return saved.parameter.data.as_strided(saved.size, saved.stride, saved.offset)


def _parts_of(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_tensor")]


def library(zero: ZeroRecipe, device: torch.device) -> Any:
    """DeepSpeed, imported where a recipe asks for it and nowhere else.

    Args:
        zero: what it is for.
        device: where this process computes; it has to be the same in all calls.

    Raises:
        RecipeError: it or libaio is not installed.
    """
    try:
        with environment(DS_ACCELERATOR=device.type):
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        raise RecipeError([missing()]) from error
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it writes to standard output
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor` is deprecated", FutureWarning)
    # its collective for ranks of one CPU machine takes minutes to compile, and adds in another order than gloo
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if zero.offload_param == "nvme":
        if not deepspeed.ops.__compatible_ops__["async_io"]:
            why = "needs libaio and a C++ compiler; install the package libaio-dev (Debian) or libaio-devel (Fedora)"
            raise RecipeError([f"server.zero.offload_param: nvme {why}"])
        open_dead_locks(*FILE_OPERATORS)
    return deepspeed


def missing() -> str:
    """What to do where DeepSpeed is not installed."""
    return "server.zero: DeepSpeed is not installed; install it with: pip install 'splitllm[deepspeed]'"
