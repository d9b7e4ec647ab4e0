"""How many micro-batches are under way at once on a role, and how large each is as it travels."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from splitllm.model.memory import activation_bytes, recomputed_bytes, work_of
from splitllm.policy.admission import MIB
from splitllm.recipe import Recipe, clients_below, parent_of, role_bounds, role_names, tenant_blocks
from splitllm.wire.frames import aligned

INDEX_BYTES = 4


def micro_batch_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """Bytes of one micro-batch's request at most, whatever the codec."""
    tokens = recipe.train.batch_size * recipe.data.max_length
    item = 8 if recipe.model.dtype == "float64" else 4
    return aligned(tokens * config.hidden_size * item) + 3 * aligned(tokens * INDEX_BYTES)


def in_flight(recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str], name: str) -> int:
    """Micro-batches that each client below a server of a deployment may have under way at once.

    The recipe's number, or fewer where `wire.memory_mib` would not hold their activations: each is held as its request,
    as the server's own question or answer and, between forward and backward, as the graph of the server's blocks.
    """
    start, stop = role_bounds(recipe, config.num_hidden_layers)[name]
    work = work_of(recipe, config, modules, start, stop, own=tenant_blocks(recipe, config.num_hidden_layers))
    graph = activation_bytes(config, work) + recomputed_bytes(config, work)
    held = 2 * micro_batch_bytes(recipe, config) + graph
    affordable = recipe.wire.memory_mib * MIB // (held * len(clients_below(recipe, name)))
    return max(1, min(recipe.train.in_flight, affordable))


def at_once(recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str], name: str) -> int:
    """The same as it comes out for a role: by what it may, what those above it may, and a step has."""
    limits, above = [recipe.train.in_flight, recipe.train.accumulate], name
    clients = next(iter(role_names(recipe).values()))
    while len(recipe.split.tiers) > 1 and above is not None:
        limits += [] if above in clients else [in_flight(recipe, config, modules, above)]
        parent = parent_of(recipe, above)
        if parent is None:
            break
        above = parent
    return min(limits)
