"""What one block needs for a moment, beside what its graph keeps: results on the way, and gradients on the way back.

As in `graphs`, the blocks themselves run on fake tensors. Counted are the tensors that PyTorch makes; what kernels take
inside themselves is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig

from splitllm.model.graphs import Work, inputs_of, kept_by_layer, precision, staged
from splitllm.model.keyed import remembered
from splitllm.model.lora import block_of


def passing_bytes(config: PreTrainedConfig, work: Work) -> int:
    """Of the highest block: tensors alive at once, at most, in its forward and backward, less what its graph keeps.

    Args:
        config: of the whole text model.
        work: the micro-batch, and where it runs; where activations are checkpointed, as if they were not.
    """
    if work.start >= work.stop:
        return 0
    layer = _alike(config, work)
    block = replace(work, start=layer, stop=layer + 1, checkpointing=False)
    return _passing(config, block)


def _alike(config: PreTrainedConfig, work: Work) -> int:
    """The lowest block, the first of the model aside, that is of the kind of a work's highest."""
    types, adapted = getattr(config, "layer_types", None), dict[int, set[str]]()
    for name in work.modules:
        adapted.setdefault(block_of(config, name), set()).add(name.split(".", 3)[3])

    def kind(layer: int) -> tuple[object, ...]:
        return types and types[layer], adapted.get(layer), layer in work.own, layer in work.full

    last = work.stop - 1
    return next((layer for layer in range(1, last) if kind(layer) == kind(last)), last)


@remembered(256)
def _passing(config: PreTrainedConfig, work: Work) -> int:
    with staged(config, work, (work.start,)) as stage:
        kept = kept_by_layer(stage, config, work)[work.start]
        return _alive(lambda hidden_BSD: stage.run(work.start, hidden_BSD), config, work) - kept


def _alive(block: Callable[[torch.Tensor], torch.Tensor], config: PreTrainedConfig, work: Work) -> int:
    """Bytes of the tensors that a forward and its backward make and hold at once, at most."""
    hidden_BSD = inputs_of(config, work)
    with torch.enable_grad(), precision(work), _Alive() as alive:
        out_BSD = block(hidden_BSD)
        if out_BSD.requires_grad:
            torch.autograd.backward(out_BSD, torch.empty_like(out_BSD))
        most: int = alive.most
    return most


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, as long as somebody holds them.

    Attributes:
        now, most: their bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and look at what it made."""
        given: set[int] = set()
        tree_map_only(torch.Tensor, lambda each: given.add(each.untyped_storage()._cdata), (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda each: self._note(each, given), result)
        return result

    def _note(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known or storage._cdata in given:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.now -= size
