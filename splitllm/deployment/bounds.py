"""What the recipe allows on the wire: sizes, shapes and numbers, worked out before anything is listened to."""

from __future__ import annotations

import math

from splitllm.model.lora import adapter_shapes, block_of
from splitllm.preflight import Plan
from splitllm.recipe import Recipe, children_of, clients_below, role_names, tier_of
from splitllm.roles.checks import Allowed, Child
from splitllm.wire.assembling import Limits
from splitllm.wire.frames import aligned

MIB = 2**20
STATES = 4  # of an adapter tensor: itself, two moments, and a count of steps
OF_MICRO_BATCH = 4  # tensors of its request
INDEX_BYTES = 4
PEFT_PREFIX = "base_model.model."


def allowed(plan: Plan, name: str) -> Allowed:
    """What the children of server `name` may send.

    Args:
        plan: of the run; shapes are worked out on the meta device.
        name: of the server.
    """
    recipe = plan.recipe
    shapes = adapter_shapes(plan.config, recipe.lora, plan.modules)
    below = tier_of(recipe, name)[0]
    names, counts = list(recipe.split.tiers), list(recipe.split.tiers.values())
    tier_by_name = {tensor: _tier_holding(plan, tensor) for tensor in shapes}
    summed = {tensor: shape for tensor, shape in shapes.items() if _below(tier_by_name[tensor], below, counts, True)}
    normed = frozenset(tensor for tensor in shapes if _below(tier_by_name[tensor], below, counts, False))
    return Allowed(
        children={child: _child(recipe, child) for child in children_of(recipe, name)},
        steps=recipe.train.steps,
        accumulate=recipe.train.accumulate,
        rows=recipe.train.batch_size,
        length=recipe.data.max_length,
        width=plan.config.hidden_size,
        vocabulary=plan.config.vocab_size,
        targets=recipe.split.labels == "cloud",
        packed=recipe.data.pack,
        summed=summed,
        normed=normed,
        tiers={tier: {t: shapes[t] for t in shapes if names[tier_by_name[t]] == tier} for tier in names},
    )


def limits(plan: Plan) -> Limits:
    """Bytes of one envelope, at most: a micro-batch's activations, or the states of all adapters."""
    shapes = adapter_shapes(plan.config, plan.recipe.lora, plan.modules)
    states = sum(STATES * aligned(math.prod(shape) * _itemsize(plan.recipe)) for shape in shapes.values())
    return Limits(payload_bytes=max(micro_batch_bytes(plan), states), tensors=STATES * len(shapes) + OF_MICRO_BATCH)


def micro_batch_bytes(plan: Plan) -> int:
    """Bytes of one micro-batch's request at most, whatever the codec."""
    recipe = plan.recipe
    tokens = recipe.train.batch_size * recipe.data.max_length
    width = plan.config.hidden_size
    return aligned(tokens * width * _itemsize(recipe)) + 3 * aligned(tokens * INDEX_BYTES)


def in_flight(plan: Plan, name: str) -> int:
    """Micro-batches that each client below a server may have under way at once.

    The recipe's number, or fewer where `wire.memory_mib` would not hold their activations: each is held as its request,
    as the server's own question or answer and, between forward and backward, as the graph of the server's blocks.
    """
    recipe = plan.recipe
    start, stop = plan.bounds[tier_of(recipe, name)[0]]
    held = 2 * micro_batch_bytes(plan) + graph_bytes(plan, stop - start)
    affordable = recipe.wire.memory_mib * MIB // (held * len(clients_below(recipe, name)))
    return max(1, min(recipe.train.in_flight, affordable))


def graph_bytes(plan: Plan, blocks: int) -> int:
    """What the graph of one micro-batch through so many blocks keeps for its backward, about.

    A rule of thumb, right within a factor of 2 over the families: of each block and token 8 numbers a channel, 4 a unit
    of the MLP, and the attention scores of all heads, which some implementations keep; where activations are
    checkpointed, that of one block, and one number a channel of the others.
    """
    recipe, config = plan.recipe, plan.config
    width, length = config.hidden_size, recipe.data.max_length
    units = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    token: int = 8 * width + 4 * units + config.num_attention_heads * length
    if recipe.train.activation_checkpointing:
        token, blocks = token + blocks * width, min(1, blocks)
    return _itemsize(recipe) * blocks * recipe.train.batch_size * length * token


def _itemsize(recipe: Recipe) -> int:
    return 8 if recipe.model.dtype == "float64" else 4


def _child(recipe: Recipe, name: str) -> Child:
    clients = next(iter(role_names(recipe).values()))
    return Child({number: clients[number] for number in clients_below(recipe, name)}, _subtree(recipe, name))


def _subtree(recipe: Recipe, name: str) -> dict[str, str]:
    """A role and all below it -> their tiers."""
    tier = list(role_names(recipe))[tier_of(recipe, name)[0]]
    found = {name: tier}
    for child in children_of(recipe, name):
        found.update(_subtree(recipe, child))
    return found


def _tier_holding(plan: Plan, tensor: str) -> int:
    block = block_of(plan.config, tensor.removeprefix(PEFT_PREFIX))
    return next(tier for tier, (start, stop) in enumerate(plan.bounds) if start <= block < stop)


def _below(tier: int, server: int, counts: list[int], shared: bool) -> bool:
    return tier < server and (counts[tier] > 1) == shared
