"""What servers spread over their processes, or hold beyond their memory: what does not go with it, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitllm.recipe.round_misfits import Misfit
from splitllm.recipe.rounds import goes_by_rounds

if TYPE_CHECKING:
    from splitllm.recipe.schema import Recipe, ZeroRecipe

STAGE = "server.zero.stage"


def engine_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """Yields what does not go with `server.zero` or `server.fsdp`: the keys involved and the complaint."""
    server, stage = recipe.server, recipe.server.zero.stage
    yield from _zero_misfits(server.zero)
    used = [(STAGE, f"{STAGE}: {stage}")] if stage is not None else []
    if used and server.fsdp:
        yield ("server.fsdp", STAGE), f"server.fsdp: true beside {used[0][1]}; leave one of the two out"
    used += [("server.fsdp", "server.fsdp: true")] if server.fsdp else []
    for key, said in used:
        yield from _place_misfits(recipe, key, said)
        if key == "server.fsdp" or stage == 3:
            yield from _weights_misfits(recipe, key, said)
        else:
            yield from _optimizer_misfits(recipe, said)
    if stage is not None and recipe.model.dtype == "float64":
        advice = "use model.dtype: float32 or bfloat16, or leave it out"
        yield (STAGE, "model.dtype"), f"{STAGE}: {stage} has no float64 in DeepSpeed; {advice}"


def spreads_weights(recipe: Recipe) -> bool:
    """Whether servers spread their frozen weights over their processes."""
    return recipe.server.fsdp or recipe.server.zero.stage == 3


def _zero_misfits(zero: ZeroRecipe) -> Iterator[Misfit]:
    param, optimizer, path = (f"server.zero.{key}" for key in ("offload_param", "offload_optimizer", "nvme_path"))
    if zero.offload_param != "none" and zero.stage != 3:
        yield (param, STAGE), f"{param}: {zero.offload_param} needs {STAGE}: 3; set that, or offload_param: none"
    if zero.offload_optimizer == "nvme":
        why = "is for what DeepSpeed trains by stage 3, which adapters are not; in stages 1 and 2 it writes nothing"
        yield (optimizer,), f"{optimizer}: nvme {why}; use cpu or none"
    elif zero.offload_optimizer != "none" and zero.stage not in (1, 2):
        advice = f"use {STAGE}: 1 or 2, or offload_optimizer: none"
        yield (optimizer, STAGE), f"{optimizer}: {zero.offload_optimizer} is of stages 1 and 2; {advice}"
    if zero.offload_param == "nvme" and zero.nvme_path is None:
        yield (param, path), f"{param}: nvme needs a folder for its files; set {path}"
    if zero.offload_param != "nvme" and zero.nvme_path is not None:
        advice = "use offload_param: nvme, or leave it out"
        yield (path, param), f"{path}: {zero.nvme_path} is not used by offload_param: {zero.offload_param}; {advice}"


def _place_misfits(recipe: Recipe, key: str, said: str) -> Iterator[Misfit]:
    if len(recipe.split.tiers) == 1:
        yield (key, "split.tiers"), f"{said} is of servers, and with one tier there is none; leave it out"
    if recipe.train.processes > 1:
        why = "needs processes that compute the same in step, and those of train.processes do not"
        yield (key, "train.processes"), f"{said} {why}; use train.processes: 1, or leave it out"


def _weights_misfits(recipe: Recipe, key: str, said: str) -> Iterator[Misfit]:
    _, *servers = recipe.split.tiers
    for tier in servers:
        if tier in recipe.quantization:
            why = f"does not hold quantised weights, and quantization.{tier} asks for them"
            yield (key, "quantization"), f"{said} {why}; leave one of the two out"
    if recipe.train.mixed_precision == "bf16":
        why = "saves nothing with train.mixed_precision: bf16, which keeps a copy of every weight for the backward"
        yield (key, "train.mixed_precision"), f"{said} {why}; use model.dtype: bfloat16 with mixed_precision: no"
    if recipe.lora.dora and (recipe.lora.tiers is None or not set(servers).isdisjoint(recipe.lora.tiers)):
        why = "does not go with lora.dora, which takes the norms of whole weights in every forward"
        yield (key, "lora.dora", "lora.tiers"), f"{said} {why}; use lora.dora: false, or leave it out"


def _optimizer_misfits(recipe: Recipe, said: str) -> Iterator[Misfit]:
    """All that an optimiser steps has to step together, and there has to be something."""
    _, *servers = recipe.split.tiers
    adapted = servers if recipe.lora.tiers is None else recipe.lora.tiers
    if servers and set(servers).isdisjoint((*adapted, *(recipe.train.full_tiers or ()))):
        why = f"spreads the state of what servers train, and lora.tiers: {list(adapted)} has none of them"
        yield (STAGE, "lora.tiers"), f"{said} {why}; use stage 3, or leave it out"
    if recipe.train.optimizer.name != "adamw":
        why = f"spreads AdamW's state, and train.optimizer.name is {recipe.train.optimizer.name}"
        yield (STAGE, "train.optimizer.name"), f"{said} {why}; use adamw, or leave it out"
    if recipe.server.batching == "continuous":
        why = "is for servers that step once for all clients, and server.batching is continuous"
        yield (STAGE, "server.batching"), f"{said} {why}; use synchronous or none, or leave it out"
    if goes_by_rounds(recipe):
        why = "is for adapters of which all tensors step together, and rounds average some of them"
        yield (STAGE, "rounds.replicas"), f"{said} {why}; use rounds.replicas: together, or leave it out"
