"""Tiers that train all weights of their blocks instead of an adapter: which blocks, and what does not go with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitllm.recipe.cuts import tier_bounds
from splitllm.recipe.round_misfits import Misfit
from splitllm.recipe.rounds import goes_by_rounds

if TYPE_CHECKING:
    from splitllm.recipe.schema import Recipe

KEY = "train.full_tiers"


def full_blocks(recipe: Recipe, layers: int) -> frozenset[int]:
    """The blocks of which all weights train."""
    bounds = dict(zip(recipe.split.tiers, tier_bounds(recipe, layers), strict=True))
    return frozenset(block for tier in recipe.train.full_tiers or () for block in range(*bounds[tier]))


def full_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """Yields what does not go with `train.full_tiers`: the keys involved and the complaint."""
    tiers = recipe.train.full_tiers
    if tiers is None:
        return
    place, (clients, *servers) = f"{KEY}: {list(tiers)}", recipe.split.tiers
    for tier in tiers:
        if tier not in servers:
            known = f"use some of {', '.join(servers)}" if servers else "with one tier there is none; leave it out"
            what = "is the clients' tier, which trains adapters" if tier == clients else "is not a tier of split.tiers"
            yield (KEY, "split.tiers"), f"{KEY}: {tier!r} {what}; {known}"
        if tier in (recipe.lora.tiers or ()):
            yield (KEY, "lora.tiers"), f"{KEY}: {tier!r} is in lora.tiers, too; leave it out of one of the two"
        if tier in recipe.quantization:
            why = f"trains weights, and quantization.{tier} rounds them"
            yield (KEY, "quantization"), f"{place} {why}; leave one of the two out"
    for keys, wrong, advice in _alternatives(recipe):
        yield (KEY, *keys), f"{place} {wrong}; {advice}, or leave {KEY} out"


def _alternatives(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """What is set otherwise than it has to be: its keys, what is wrong, and what to use."""
    server = recipe.server
    if recipe.model.dtype == "bfloat16":
        wrong = "would lose most steps in bfloat16 weights, which are too coarse for them"
        yield ("model.dtype",), wrong, "use model.dtype: float32 with train.mixed_precision: bf16"
    if recipe.lora.adapters != "shared":
        wrong = f"trains one copy for all clients, and lora.adapters is {recipe.lora.adapters}"
        yield ("lora.adapters",), wrong, "use shared"
    if goes_by_rounds(recipe):
        yield ("rounds.replicas",), "is not averaged in rounds, which are of adapters", "use rounds.replicas: together"
    if recipe.split.client_cuts:
        wrong = "needs blocks that one tier alone holds, and with split.client_cuts some are on two"
        yield ("split.client_cuts",), wrong, "leave them out"
    if server.fsdp or server.zero.stage == 3:
        what = "server.fsdp" if server.fsdp else "server.zero.stage: 3"
        wrong = f"trains what {what} holds frozen"
        yield ("server.fsdp", "server.zero.stage"), wrong, "use server.zero.stage: 1 or 2"
