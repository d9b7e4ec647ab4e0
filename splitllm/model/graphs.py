"""What the graph of a micro-batch keeps for its backward, in bytes, found without memory for it.

The blocks themselves run on PyTorch's fake tensors, which have shapes and no contents, take the CPU's kernels and save
what those save; on another device kernels may save other things. Of blocks that are alike two run, and all others cost
what the second did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel

from splitllm.model.families import layout_of
from splitllm.model.full import train_in_full
from splitllm.model.joined import Joined, Rows
from splitllm.model.keyed import remembered
from splitllm.model.lora import adapter_dtype, adapter_parameters, add_lora, block_of
from splitllm.model.randomness import MicroBatchId
from splitllm.model.shard import NoPositions, Passthrough, Shard, meta_model
from splitllm.model.tenants import Tenants
from splitllm.recipe import LoraRecipe

TENANTS = 2  # in the batch where adapters are their own: from two on they are stacked
NOBODY = range(0)
NOTHING: frozenset[int] = frozenset()

Kind = tuple[object, ...]
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """One micro-batch in blocks `start` to `stop - 1`: all that its graph depends on beside the configuration.

    Attributes:
        lora: the adapter.
        modules: global names of the modules that it adapts, in the whole model. Where any lies below `start`, the
            gradient of the input is wanted too.
        start: the first block that runs.
        stop: the block after the last.
        rows: of the micro-batch, all of them full.
        length: of each row, in tokens.
        dtype: of the weights.
        attention: transformers' `attn_implementation`; None for its default.
        checkpointing: whether only the blocks' inputs are kept; one block's graph comes back in the backward.
        packed: whether rows hold several documents.
        mixed: whether the forward runs under bf16 autocast.
        own: the global blocks whose adapter is each tenant's own; there another tenant is taken to be in the batch.
        full: the global blocks of which all weights train.
    """

    lora: LoraRecipe = field(hash=False)
    modules: tuple[str, ...]
    start: int
    stop: int
    rows: int
    length: int
    dtype: torch.dtype
    attention: str | None = None
    checkpointing: bool = False
    packed: bool = False
    mixed: bool = False
    own: range = NOBODY
    full: frozenset[int] = NOTHING

    def trains_below(self, config: PreTrainedConfig) -> bool:
        """Whether anything trains below its first block, so that the gradient of its input is wanted."""
        return any(block < self.start for block in (*(block_of(config, name) for name in self.modules), *self.full))


def bytes_by_block(config: PreTrainedConfig, work: Work) -> tuple[int, ...]:
    """What each block keeps, from `work.start` on; masks and tables that blocks share count with the lowest.

    Args:
        config: of the whole text model.
        work: the micro-batch, and where it runs.
    """
    if work.start >= work.stop:
        return ()
    stretch, stands_for = _stretch(config, work)
    kept = dict(zip(stretch.layers, _kept_by(config, stretch), strict=True))
    return tuple(kept[stand_in] for stand_in in stands_for.values())


@dataclass(frozen=True)
class Stage:
    """Blocks without contents that stand for all blocks of a work, inside PyTorch's fake tensors.

    Attributes:
        shard: has these blocks, and those of no other layer.
        calls: layer -> what the model calls its block with beside the hidden states.
        weights: all weights and adapters.
    """

    shard: Shard
    calls: Mapping[int, Call]
    weights: Sequence[nn.Parameter]

    def run(self, layer: int, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """One block."""
        layout, (args, kwargs) = self.shard.layout, self.calls[layer]
        out_BSD: torch.Tensor = getattr(getattr(self.shard.model, layout.base), layout.blocks)[layer](
            hidden_BSD, *args, **kwargs
        )
        return out_BSD


@contextmanager
def staged(config: PreTrainedConfig, work: Work, layers: Sequence[int]) -> Iterator[Stage]:
    """Build these blocks of a work, and stay among fake tensors meanwhile."""
    model, layout = meta_model(config, work.dtype, work.attention), layout_of(config)
    slots: nn.ModuleList = getattr(getattr(model, layout.base), layout.blocks)
    calls = _calls(model, work)
    for layer in layers:
        getattr(getattr(model, layout.base), layout.blocks)[layer] = slots[layer]
    with torch.device("meta"):
        shard = _shard(model, work, layers)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = {layer: tree_map_only(torch.Tensor, mode.from_tensor, calls[layer]) for layer in layers}
        weights = _with_tenants(shard.to_empty(device="cpu"), work, layers)
        yield Stage(shard, faked, weights)


def inputs_of(config: PreTrainedConfig, work: Work) -> torch.Tensor:
    """Hidden states below the lowest block, of all tenants that are taken to be in the batch."""
    hidden_BSD = torch.empty(work.rows * _tenants(work), work.length, config.hidden_size, dtype=work.dtype)
    return hidden_BSD.requires_grad_(work.trains_below(config))


def precision(work: Work) -> AbstractContextManager[object]:
    """The context of its forward."""
    return torch.autocast("cpu", torch.bfloat16) if work.mixed else nullcontext()


@dataclass(frozen=True)
class Stretch:
    """Blocks that stand for all of a work: two of each kind. Those of two works that are alike keep as much.

    Attributes:
        kinds: of these blocks, bottom up.
        asked: the work, wherever it is in the model.
        layers: these blocks, in the first such work that was asked for.
        work: that.
    """

    kinds: tuple[Kind, ...]
    asked: Work
    layers: tuple[int, ...] = field(compare=False)
    work: Work = field(compare=False)


def _stretch(config: PreTrainedConfig, work: Work) -> tuple[Stretch, dict[int, int]]:
    """What stands for a work; and layer of the work -> that of the block which keeps as much."""
    kinds = _kinds(config, work)
    first = {kind: layer for layer, kind in reversed(kinds.items())}
    second = {kind: layer for layer, kind in reversed(kinds.items()) if layer != first[kind]}
    layers = tuple(sorted({*first.values(), *second.values()}))
    anywhere = replace(work, modules=(), start=0, stop=0, own=NOBODY, full=NOTHING)
    stands_for = {layer: layer if layer == first[kind] else second[kind] for layer, kind in kinds.items()}
    return Stretch(tuple(kinds[layer] for layer in layers), anywhere, layers, work), stands_for


@remembered(256)
def _kept_by(config: PreTrainedConfig, stretch: Stretch) -> tuple[int, ...]:
    with staged(config, stretch.work, stretch.layers) as stage:
        return tuple(kept_by_layer(stage, config, stretch.work).values())


@remembered(8)
def _shapes(config: PreTrainedConfig) -> tuple[tuple[tuple[str, torch.Size], ...], ...]:
    """Of every block, its parameters."""
    model, layout = meta_model(config, torch.float32), layout_of(config)
    slots: nn.ModuleList = getattr(getattr(model, layout.base), layout.blocks)
    return tuple(tuple((name, each.shape) for name, each in block.named_parameters()) for block in slots)


def _kinds(config: PreTrainedConfig, work: Work) -> dict[int, Kind]:
    """Layer -> what it has in common with those that keep as much."""
    adapted: dict[int, list[str]] = {}
    for name in work.modules:
        adapted.setdefault(block_of(config, name), []).append(name.split(".", 3)[3])
    types, trains = getattr(config, "layer_types", None), work.trains_below(config)
    kinds: dict[int, Kind] = {}
    for layer in range(work.start, work.stop):
        own, full, here = layer in work.own, layer in work.full, tuple(adapted.get(layer, ()))
        kinds[layer] = (types and types[layer], _shapes(config)[layer], here, own, full, trains)
        trains = trains or full or layer in adapted
    return kinds


class _Recorder(Passthrough):
    """In the slot of every block: notes what the model would call the block with."""

    call: Call = ((), {})

    def forward(self, hidden_BSD: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The input itself."""
        self.call = args, kwargs
        return hidden_BSD


class _Saved:
    """A tensor saved for the backward; it goes when its node of the graph does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.storage = tensor, tensor.untyped_storage()


def _calls(model: PreTrainedModel, work: Work) -> dict[int, Call]:
    """Layer -> what the model calls its block with beside the hidden states; leaves every slot without a block.

    Masks are made for real, since a model that sees fake tensors takes every row for a packed one.
    """
    layout = layout_of(model.config)
    base = getattr(model, layout.base)
    recorders = nn.ModuleList(_Recorder(block) for block in getattr(base, layout.blocks))
    setattr(base, layout.blocks, recorders)
    for name in (layout.embeddings, layout.norm):
        setattr(base, name, Passthrough(getattr(base, name)))
    model.set_output_embeddings(Passthrough(model.get_output_embeddings()))
    if layout.positions:
        setattr(base, layout.positions, NoPositions())
    rows, length = work.rows * _tenants(work), work.length
    inputs_BSD = torch.zeros(1, 1, 1, dtype=work.dtype).expand(rows, length, model.config.hidden_size)
    position_ids_BS = (torch.arange(length) % max(1, length // 2)).expand(rows, length) if work.packed else None
    with torch.no_grad():
        model.eval()
        base(inputs_embeds=inputs_BSD, position_ids=position_ids_BS, use_cache=False)
    return {layer: recorder.call for layer, recorder in enumerate(recorders) if isinstance(recorder, _Recorder)}


def _tenants(work: Work) -> int:
    return TENANTS if any(work.start <= layer < work.stop for layer in work.own) else 1


def _shard(model: PreTrainedModel, work: Work, layers: Sequence[int]) -> Shard:
    """The shard that has only these layers, with the adapter that all tenants share, in training."""
    config, layout = model.config, layout_of(model.config)
    shard = Shard(model, layout, work.start, work.stop, embeddings=None, head=None, seed=0).requires_grad_(False)
    shared = [name for name in work.modules if (layer := block_of(config, name)) in layers and layer not in work.own]
    add_lora(shard, work.lora, shared, seed=0)
    train_in_full(shard, work.full.intersection(layers))
    for parameter in adapter_parameters(shard).values():
        parameter.data = parameter.data.to(adapter_dtype(work.dtype))
    if work.checkpointing:
        shard.checkpoint_activations()
    return shard.train()


def _with_tenants(shard: Shard, work: Work, layers: Sequence[int]) -> list[nn.Parameter]:
    """Say whose rows are in the batch and give each tenant its own adapter; returns all weights and adapters."""
    lengths, clients = (work.length,) * work.rows, range(_tenants(work))
    members = tuple(Rows(MicroBatchId(0, client, 0), lengths, work.start) for client in clients)
    shard.key.joined = Joined(members)  # and no micro-batch: that would seed torch's own generator
    adapters: list[nn.Parameter] = []
    if len(clients) > 1:
        modules = [name for name in work.modules if block_of(shard.model.config, name) in layers]
        tenants, dtype = Tenants(shard, modules, work.own, seed=0), adapter_dtype(work.dtype)
        for client in clients:
            adapters.extend(tenants.add(client, work.start, work.lora, dtype, torch.device("cpu")).values())
    return [*shard.parameters(), *adapters]


def kept_by_layer(stage: Stage, config: PreTrainedConfig, work: Work) -> dict[int, int]:
    """Layer -> what its block adds, where these layers run one after another."""
    tenants, hidden_BSD = _tenants(work), inputs_of(config, work)
    apart = {parameter.untyped_storage()._cdata for parameter in stage.weights}
    saved: WeakSet[_Saved] = WeakSet()

    def keep(tensor: torch.Tensor) -> _Saved:
        handle = _Saved(tensor)
        saved.add(handle)
        return handle

    def held() -> int:
        storages = {handle.storage._cdata: handle.storage.nbytes() for handle in saved}
        return sum(size for storage, size in storages.items() if storage not in apart)

    kept, before, hooks = {}, 0, torch.autograd.graph.saved_tensors_hooks(keep, lambda handle: handle.tensor)
    with torch.enable_grad(), precision(work), hooks:
        for layer in stage.calls:
            hidden_BSD = stage.run(layer, hidden_BSD)
            kept[layer], before = (held() - before) // tenants, held()
    return kept
