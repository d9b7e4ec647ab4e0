"""What the recipe allows on the wire: sizes, shapes and numbers, worked out before anything is listened to."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from splitllm.model.full import full_shapes
from splitllm.model.lora import block_of, in_model
from splitllm.plan import Plan
from splitllm.recipe import (
    Recipe,
    averaged_blocks,
    children_of,
    client_cuts,
    client_names,
    clients_below,
    goes_by_lanes,
    goes_by_rounds,
    holders,
    intervals,
    level_due,
    lora_of,
    own_blocks,
    sharing,
    side_that_trains,
    tier_of,
)
from splitllm.recipe.rounds import ONE_SHAPE, WITH_FROZEN, hides
from splitllm.roles import under_way
from splitllm.roles.checks import Allowed, Child
from splitllm.roles.round_checks import RoundBounds
from splitllm.roles.worker import TENANT
from splitllm.wire.assembling import Limits
from splitllm.wire.frames import aligned

STATES = 4  # of an adapter tensor: itself, two moments, and a count of steps
_WORDS = {32: torch.int32, 64: torch.int64}
OF_MICRO_BATCH = 4  # tensors of its request


def allowed(plan: Plan, name: str, client: int | None = None) -> Allowed:
    """What the children of server `name` may send.

    Args:
        plan: of the run; shapes are worked out on the meta device.
        name: of the server.
        client: in the lane of this one only; None: all together.
    """
    recipe = plan.recipe
    clients = clients_below(recipe, name) if client is None else [client]
    held = {role: held_by(plan, role, clients) for role in _subtree(recipe, name, clients)}
    children = [child for child in children_of(recipe, name) if child in held]
    return Allowed(
        children={child: _child(plan, child, clients, held) for child in children},
        steps=recipe.train.steps,
        accumulate=recipe.train.accumulate,
        rows=recipe.train.batch_size,
        length=recipe.data.max_length,
        width=plan.config.hidden_size,
        vocabulary=plan.config.vocab_size,
        targets=recipe.split.labels == "cloud",
        packed=recipe.data.pack,
        double=recipe.model.dtype == "float64",
        tiers={sharing(recipe, role): each.together for role, each in held.items()},
        rounds=_round_bounds(recipe, name),
    )


def _round_bounds(recipe: Recipe, name: str) -> RoundBounds | None:
    if not goes_by_rounds(recipe):
        return None
    rule = recipe.rounds.rule
    return RoundBounds(
        levels=len(intervals(recipe)),
        level=tier_of(recipe, name)[0],
        due=lambda steps: level_due(recipe, steps),
        side=lambda step: side_that_trains(recipe, step),
        any_rank=rule not in ONE_SHAPE,
        frozen=rule in WITH_FROZEN,
        anew=rule == "flora",
        moments=recipe.rounds.moments == "average",
        words=_WORDS[recipe.rounds.secure.bits] if hides(recipe) and tier_of(recipe, name)[0] == 1 else None,
        lanes=goes_by_lanes(recipe),
    )


@dataclass(frozen=True)
class Held:
    """The adapter tensors of one role, by their names in an adapter file -> shape.

    Attributes:
        together: those that are trained together.
        summed: the names of those among them that other roles hold as well.
        own: client -> those that are its own.
    """

    together: Mapping[str, torch.Size]
    summed: frozenset[str]
    own: Mapping[int, Mapping[str, torch.Size]]


def held_by(plan: Plan, name: str, clients: Collection[int]) -> Held:
    """What a role holds, of the own adapters those of these clients."""
    recipe, layers = plan.recipe, plan.config.num_hidden_layers
    (start, stop), own, counts = plan.role_bounds[name], own_blocks(recipe, layers), holders(recipe, layers)
    tier, index = tier_of(recipe, name)
    shapes = _shapes(plan, index if tier == 0 and goes_by_rounds(recipe) else None)
    blocks = {tensor: block_of(plan.config, in_model(tensor)) for tensor in shapes}
    together = {t: shapes[t] for t, block in blocks.items() if start <= block < stop and block not in own}
    first = {client: start for client in clients_below(recipe, name) if client in clients}
    if tier > 0:
        cuts = client_cuts(recipe)
        first = {client: max(start, cuts[client]) for client in first}
    mine = {client: _within(_shapes(plan, client), blocks, own, lowest, stop) for client, lowest in first.items()}
    return Held(together, frozenset(t for t in together if counts[blocks[t]] > 1), mine if own else {})


def _shapes(plan: Plan, client: int | None = None) -> dict[str, torch.Size]:
    """Of the whole adapter that all train together, or of a client's own."""
    lora = plan.recipe.lora if client is None else lora_of(plan.recipe, client)
    return plan.adapters[lora.rank]


def _within(
    shapes: Mapping[str, torch.Size], blocks: Mapping[str, int], own: range, start: int, stop: int
) -> dict[str, torch.Size]:
    return {tensor: shapes[tensor] for tensor, block in blocks.items() if start <= block < stop and block in own}


def limits(plan: Plan, stop: int | None = None) -> Limits:
    """Bytes of one envelope, at most: a micro-batch's activations, or the states of all adapters.

    Args:
        plan: of the run.
        stop: what trains in full from this block on does not travel here; None: all of it may.
    """
    recipe, elsewhere = plan.recipe, {block for block in plan.full if stop is not None and block >= stop}
    owners = [None] if recipe.lora.adapters == "shared" else range(next(iter(recipe.split.tiers.values())))
    there = full_shapes(plan.config, elsewhere)
    shapes = [shape for owner in owners for name, shape in _shapes(plan, owner).items() if name not in there]
    states = sum(STATES * aligned(math.prod(shape) * _itemsize(recipe)) for shape in shapes)
    with_frozen = goes_by_rounds(recipe) and recipe.rounds.rule in WITH_FROZEN
    tensors = (STATES + with_frozen) * len(shapes) + OF_MICRO_BATCH
    if goes_by_rounds(recipe) and recipe.rounds.rule in (*WITH_FROZEN, "flexlora"):  # factors of any rank
        widest = [max(shape) ** 2 * _itemsize(recipe) for shape in _shapes(plan).values()]
        states += sum(map(aligned, widest))
    return Limits(payload_bytes=max(micro_batch_bytes(plan), states), tensors=tensors)


def micro_batch_bytes(plan: Plan) -> int:
    """Bytes of one micro-batch's request at most, whatever the codec."""
    return under_way.micro_batch_bytes(plan.recipe, plan.config)


def in_flight(plan: Plan, name: str) -> int:
    """Micro-batches that each client below a server may have under way at once; see `roles.under_way`."""
    return under_way.in_flight(plan.recipe, plan.config, plan.modules, name)


def _itemsize(recipe: Recipe) -> int:
    return 8 if recipe.model.dtype == "float64" else 4


def _child(plan: Plan, name: str, clients: Collection[int], held: Mapping[str, Held]) -> Child:
    """What a child speaks for: itself, and the roles below it that these clients' branches go through."""
    recipe = plan.recipe
    names, roles = client_names(recipe), _subtree(recipe, name, clients)
    below = [held[role] for role in roles]
    together = {tensor: shape for each in below for tensor, shape in each.together.items()}
    summed = {tensor for each in below for tensor in each.summed}
    own: dict[int, dict[str, torch.Size]] = {}
    for each in below:
        for client, tensors in each.own.items():
            own.setdefault(client, {}).update(tensors)
    everything = _largest([each.together for each in below] + list(own.values())) if goes_by_rounds(recipe) else {}
    averaged = averaged_blocks(recipe, plan.config.num_hidden_layers)
    each_steps = frozenset(role for role in roles if held[role].together)
    steps_alone = goes_by_rounds(recipe) and not goes_by_lanes(recipe)
    return Child(
        clients={number: names[number] for number in clients_below(recipe, name) if number in clients},
        roles={role: sharing(recipe, role) for role in roles},
        summed={tensor: shape for tensor, shape in together.items() if tensor in summed},
        normed=each_steps if steps_alone else frozenset(_training(recipe, together.keys() - summed)),
        own={client: len(_training(recipe, tensors)) for client, tensors in own.items()},
        adapter=everything
        or together | {f"{TENANT}{c}/{t}": shape for c, tensors in own.items() for t, shape in tensors.items()},
        averaged={t: s for t, s in everything.items() if block_of(plan.config, in_model(t)) in averaged},
    )


def _training(recipe: Recipe, names: Collection[str]) -> list[str]:
    """Those of which a step has a gradient; where A and B train by turns there are as many of each."""
    side = side_that_trains(recipe, 0)
    return [name for name in names if side is None or f".lora_{side}." in name]


def _largest(parts: Sequence[Mapping[str, torch.Size]]) -> dict[str, torch.Size]:
    """The shape of each tensor where it is largest."""
    whole: dict[str, torch.Size] = {}
    for name, shape in (entry for part in parts for entry in part.items()):
        whole[name] = max(whole.get(name, shape), shape, key=math.prod)
    return whole


def _subtree(recipe: Recipe, name: str, clients: Collection[int]) -> list[str]:
    """A role and all below it that the branches of these clients go through."""
    if not any(client in clients for client in clients_below(recipe, name)):
        return []
    return [name, *(role for child in children_of(recipe, name) for role in _subtree(recipe, child, clients))]
