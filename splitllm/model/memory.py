"""What a role and each of its tenants will hold, in bytes, before anything is loaded.

Weights, adapters and optimisers follow from shapes; what a micro-batch keeps for its backward is found by
`splitllm.model.graphs`. Not counted: buffers, and what is in `roles.ledger` only, such as a head's chunk of logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from transformers import PreTrainedConfig

from splitllm.model.families import layout_of
from splitllm.model.full import full_shapes
from splitllm.model.graphs import NOBODY, Work, bytes_by_block
from splitllm.model.keyed import remembered
from splitllm.model.lora import adapter_dtype, adapter_shapes, block_of, in_model
from splitllm.model.quantized_bytes import saved_bytes
from splitllm.model.shard import meta_model
from splitllm.recipe import (
    LoraRecipe,
    Recipe,
    client_cuts,
    clients_below,
    full_blocks,
    lora_of,
    own_blocks,
    role_bounds,
    tenant_blocks,
    tier_of,
)

STEP_BYTES = 4  # AdamW counts the steps of each tensor in fp32
OPTIMIZER_BYTES: dict[str, Callable[[int, int], int]] = {
    "adamw": lambda held, tensors: 2 * held + STEP_BYTES * tensors,
    "sgd": lambda held, tensors: 0,
}
"""Optimiser -> its state from the first step on, given the adapter's bytes and its number of tensors."""
CROSSING = 4  # hidden states in and out, and the gradient of each


@dataclass(frozen=True)
class Price:
    """Bytes that a role or a tenant holds, by what they are for.

    Attributes:
        weights: frozen; of a role only, as its tenants share them.
        adapter: what trains.
        gradients: of the adapter, the step's sum.
        optimizer: its state for the adapter.
        activations: kept between forward and backward, and one block's graph where activations are checkpointed.
        messages: hidden states and gradients that come in and go out.
    """

    weights: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    messages: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))

    def __add__(self, other: Price) -> Price:
        """Both."""
        return Price(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def role_price(
    recipe: Recipe,
    config: PreTrainedConfig,
    modules: Sequence[str],
    name: str,
    *,
    rows: int | None = None,
    in_flight: int | None = None,
) -> Price:
    """What a role holds: a server before it has any tenant, a client with its own micro-batches.

    Args:
        recipe: as it was resolved.
        config: of the whole text model.
        modules: global names of the modules that LoRA adapts.
        name: of the role.
        rows: of a client's micro-batch; None for the recipe's batch size.
        in_flight: its micro-batches between forward and backward; None for the recipe's.

    Raises:
        RecipeError: `split.tiers` has no such role.
    """
    (tier, index), layers = tier_of(recipe, name), config.num_hidden_layers
    held = role_holding(recipe, config, modules, name)
    if tier > 0:
        return held
    (start, stop), under_way = role_bounds(recipe, layers)[name], in_flight or recipe.train.in_flight
    work = replace(work_of(recipe, config, modules, start, stop, rows=rows), lora=lora_of(recipe, index))
    crossing = (stop < layers) * CROSSING // 2 * hidden_bytes(recipe, config, rows, None)
    return replace(held, activations=_graphs(config, work, under_way), messages=under_way * crossing)


def tenant_price(
    recipe: Recipe,
    config: PreTrainedConfig,
    modules: Sequence[str],
    server: str,
    client: int,
    *,
    rows: int | None = None,
    length: int | None = None,
    in_flight: int = 1,
) -> Price:
    """What one client adds to a server.

    Args:
        recipe: as it was resolved, of two tiers or more.
        config: of the whole text model.
        modules: global names of the modules that LoRA adapts.
        server: its name.
        client: the client's number.
        rows: of a micro-batch; None for the recipe's batch size.
        length: tokens of its longest row; None for the recipe's limit.
        in_flight: its micro-batches between forward and backward.

    Raises:
        RecipeError: `split.tiers` has no such server.
    """
    layers, lora = config.num_hidden_layers, lora_of(recipe, client)
    entry, stop = _entry(recipe, layers, server, client), role_bounds(recipe, layers)[server][1]
    alone = tenant_blocks(recipe, layers)
    work = work_of(recipe, config, modules, entry, stop, rows=rows, length=length, own=alone)
    return replace(
        tenant_holding(recipe, config, modules, server, client),
        activations=_graphs(config, replace(work, lora=lora), in_flight),
        messages=in_flight * CROSSING * hidden_bytes(recipe, config, rows, length),
    )


def tenant_holding(
    recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str], server: str, client: int, *, processes: int = 1
) -> Price:
    """What of `tenant_price` does not depend on its micro-batches: its adapter, gradients and optimiser.

    With more `processes` than one it is what one of them holds.
    """
    tier_of(recipe, server)
    layers, lora = config.num_hidden_layers, lora_of(recipe, client)
    own, alone = own_blocks(recipe, layers), tenant_blocks(recipe, layers)
    entry, stop = _entry(recipe, layers, server, client), role_bounds(recipe, layers)[server][1]
    mine = [name for name in modules if block_of(config, name) in own]
    copied = [name for name in modules if block_of(config, name) in alone and name not in mine]
    trained = _on_server(recipe, _trained(recipe, lora, config, mine, entry, stop), processes)
    copy = adapter_bytes(config, recipe.lora, copied, entry, stop, dtype_of(recipe))
    return replace(trained, adapter=trained.adapter + copy, gradients=trained.gradients + copy)


def role_holding(
    recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str], name: str, *, processes: int = 1
) -> Price:
    """What of `role_price` does not depend on micro-batches: weights, adapter, gradients and optimiser.

    With more `processes` than one the optimiser is what one of them holds.
    """
    (tier, index), layers = tier_of(recipe, name), config.num_hidden_layers
    start, stop = role_bounds(recipe, layers)[name]
    weights = role_weights(recipe, config, name)
    if tier == 0:
        return replace(_trained(recipe, lora_of(recipe, index), config, modules, start, stop), weights=weights)
    shared = [module for module in modules if block_of(config, module) not in own_blocks(recipe, layers)]
    adapted, in_full = _trained(recipe, recipe.lora, config, shared, start, stop), _in_full(recipe, config, name)
    trained = _on_server(recipe, adapted + in_full, processes)
    published = tenant_blocks(recipe, layers) != own_blocks(recipe, layers)
    return replace(trained, weights=weights, adapter=(1 + published) * trained.adapter)


def role_weights(recipe: Recipe, config: PreTrainedConfig, name: str) -> int:
    """The frozen weights of a role's shard."""
    (start, stop), tier = role_bounds(recipe, config.num_hidden_layers)[name], tier_of(recipe, name)[0]
    how = recipe.quantization.get(list(recipe.split.tiers)[tier])
    whole = shard_bytes(config, start, stop, has_head(recipe, tier), dtype_of(recipe))
    return whole - saved_bytes(config, start, stop, dtype_of(recipe), how) - full_bytes(recipe, config, start, stop)


def full_bytes(recipe: Recipe, config: PreTrainedConfig, start: int, stop: int) -> int:
    """What trains in full of blocks `start` to `stop - 1`."""
    return sum(map(math.prod, _full_shapes(recipe, config, start, stop))) * dtype_of(recipe).itemsize


def _full_shapes(recipe: Recipe, config: PreTrainedConfig, start: int, stop: int) -> list[torch.Size]:
    blocks = full_blocks(recipe, config.num_hidden_layers).intersection(range(start, stop))
    return list(full_shapes(config, blocks).values())


def _entry(recipe: Recipe, layers: int, server: str, client: int) -> int:
    """The block at which a client enters a server."""
    return max(role_bounds(recipe, layers)[server][0], client_cuts(recipe)[client])


def work_of(
    recipe: Recipe,
    config: PreTrainedConfig,
    modules: Sequence[str],
    start: int,
    stop: int,
    *,
    rows: int | None = None,
    length: int | None = None,
    own: range = NOBODY,
) -> Work:
    """One micro-batch of a recipe in blocks `start` to `stop - 1`; rows and length are the recipe's unless given."""
    return Work(
        lora=recipe.lora,
        modules=tuple(modules),
        start=start,
        stop=stop,
        rows=rows or recipe.train.batch_size,
        length=length or recipe.data.max_length,
        dtype=dtype_of(recipe),
        attention=recipe.model.attention,
        checkpointing=recipe.train.activation_checkpointing,
        packed=recipe.data.pack,
        mixed=recipe.train.mixed_precision is not None,
        own=own,
        full=full_blocks(recipe, config.num_hidden_layers),
    )


def has_head(recipe: Recipe, tier: int) -> bool:
    """Whether a tier, by its number from the bottom, has the final norm, the output projection and the loss."""
    return tier == (0 if recipe.split.labels == "client" else len(recipe.split.tiers) - 1)


def activation_bytes(config: PreTrainedConfig, work: Work) -> int:
    """What the graph of one micro-batch keeps from its forward to its backward."""
    return sum(bytes_by_block(config, work))


def recomputed_bytes(config: PreTrainedConfig, work: Work) -> int:
    """The graph of the largest block, which a backward builds again where activations are checkpointed; 0 otherwise."""
    return max(bytes_by_block(config, replace(work, checkpointing=False)), default=0) if work.checkpointing else 0


def shard_bytes(config: PreTrainedConfig, start: int, stop: int, head: bool, dtype: torch.dtype) -> int:
    """The frozen weights of blocks `start` to `stop - 1`, and of final norm and output projection with a head.

    The embedding table counts as a tied head's projection only: a shard that embeds reads its rows from the file.
    """
    layout, shapes = layout_of(config), _weight_shapes(config)
    base = layout.base + "."

    def held(name: str) -> bool:
        if name.startswith(f"{base}{layout.blocks}."):
            return start <= block_of(config, name) < stop
        if not name.startswith(base) or name.startswith(f"{base}{layout.norm}."):
            return head
        return not name.startswith(f"{base}{layout.embeddings}.") and (
            layout.positions is None or not name.startswith(f"{base}{layout.positions}.") or start == 0
        )

    return sum(math.prod(shape) for name, shape in shapes.items() if held(name)) * dtype.itemsize


def largest_matrix(config: PreTrainedConfig, start: int, stop: int) -> int:
    """Numbers of the largest matrix in blocks `start` to `stop - 1`; 0 without blocks."""
    return max(map(math.prod, block_matrices(config, start, stop)), default=0)


def block_matrices(config: PreTrainedConfig, start: int, stop: int) -> list[torch.Size]:
    """The shapes of all matrices in blocks `start` to `stop - 1`."""
    layout, shapes = layout_of(config), _weight_shapes(config)
    inside = {name: shape for name, shape in shapes.items() if name.startswith(f"{layout.base}.{layout.blocks}.")}
    return [shape for name, shape in inside.items() if len(shape) > 1 and start <= block_of(config, name) < stop]


def adapter_bytes(
    config: PreTrainedConfig, lora: LoraRecipe, modules: Sequence[str], start: int, stop: int, dtype: torch.dtype
) -> int:
    """An adapter's tensors in blocks `start` to `stop - 1`: fp32 over half-precision weights, else as the weights."""
    return sum(map(math.prod, _shapes(config, lora, modules, start, stop))) * adapter_dtype(dtype).itemsize


def _graphs(config: PreTrainedConfig, work: Work, in_flight: int) -> int:
    return in_flight * activation_bytes(config, work) + recomputed_bytes(config, work)


def hidden_bytes(recipe: Recipe, config: PreTrainedConfig, rows: int | None = None, length: int | None = None) -> int:
    """The hidden states of one micro-batch."""
    tokens: int = (rows or recipe.train.batch_size) * (length or recipe.data.max_length)
    return tokens * int(config.hidden_size) * dtype_of(recipe).itemsize


def _trained(
    recipe: Recipe, lora: LoraRecipe, config: PreTrainedConfig, modules: Sequence[str], start: int, stop: int
) -> Price:
    adapter = adapter_bytes(config, lora, modules, start, stop, dtype_of(recipe))
    tensors = len(_shapes(config, lora, modules, start, stop))
    optimizer = OPTIMIZER_BYTES[recipe.train.optimizer.name](adapter, tensors)
    return Price(adapter=adapter, gradients=adapter, optimizer=optimizer)


def _in_full(recipe: Recipe, config: PreTrainedConfig, name: str) -> Price:
    """Of a server's blocks that train in full: themselves, gradients and optimiser."""
    bounds = role_bounds(recipe, config.num_hidden_layers)[name]
    held, tensors = full_bytes(recipe, config, *bounds), len(_full_shapes(recipe, config, *bounds))
    optimizer = OPTIMIZER_BYTES[recipe.train.optimizer.name](held, tensors)
    return Price(adapter=held, gradients=_sums_at_once(recipe, name) * held, optimizer=optimizer)


def _sums_at_once(recipe: Recipe, name: str) -> int:
    """Gradients of a server at once, at most: micro-batches that come before their turn in the sum wait for it."""
    return recipe.train.accumulate * len(clients_below(recipe, name))


def _on_server(recipe: Recipe, trained: Price, processes: int) -> Price:
    """A spread optimiser holds beside its part of the state a part of the adapter."""
    if recipe.server.zero.stage not in (1, 2):
        return trained
    return replace(trained, optimizer=-(-(trained.optimizer + trained.adapter) // processes))


def _shapes(
    config: PreTrainedConfig, lora: LoraRecipe, modules: Sequence[str], start: int, stop: int
) -> list[torch.Size]:
    shapes = shapes_of(config, lora, modules)
    return [shape for name, shape in shapes.items() if start <= block_of(config, in_model(name)) < stop]


def shapes_of(config: PreTrainedConfig, lora: LoraRecipe, modules: Sequence[str]) -> dict[str, torch.Size]:
    """The tensors of an adapter of the whole model, by their names in an adapter file."""
    return adapter_shapes(config, lora, modules) if modules else {}


def dtype_of(recipe: Recipe) -> torch.dtype:
    """That of a recipe's weights."""
    dtype: torch.dtype = getattr(torch, recipe.model.dtype)
    return dtype


@remembered(8)
def _weight_shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Every parameter of the whole model, a tied projection as well as the table."""
    model = meta_model(config, torch.float32)
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
