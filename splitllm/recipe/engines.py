"""What servers hold their frozen weights with beyond the memory of one process: what does not go with it, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitllm.recipe.round_misfits import Misfit

if TYPE_CHECKING:
    from splitllm.recipe.schema import Recipe, ZeroRecipe


def engine_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """Yields what does not go with `server.zero` or `server.fsdp`: the keys involved and the complaint."""
    server = recipe.server
    yield from _zero_misfits(server.zero)
    if server.zero.stage is not None and server.fsdp:
        yield (
            ("server.fsdp", "server.zero.stage"),
            "server.fsdp: true beside server.zero.stage, which spreads the same weights; leave one of the two out",
        )
    for key, said in _used(recipe):
        yield from _run_misfits(recipe, key, said)


def spreads(recipe: Recipe) -> bool:
    """Whether servers spread their frozen weights over the processes of a tier."""
    return bool(_used(recipe))


def _used(recipe: Recipe) -> list[tuple[str, str]]:
    """Key, and it with its value."""
    server = recipe.server
    used = [("server.zero.stage", f"server.zero.stage: {server.zero.stage}")] if server.zero.stage is not None else []
    return used + ([("server.fsdp", "server.fsdp: true")] if server.fsdp else [])


def _zero_misfits(zero: ZeroRecipe) -> Iterator[Misfit]:
    place = "server.zero.offload_param"
    if zero.offload_param != "none" and zero.stage is None:
        advice = "use server.zero.stage: 3, or offload_param: none"
        yield (place, "server.zero.stage"), f"{place}: {zero.offload_param} needs stage 3; {advice}"
    if zero.offload_param == "nvme" and zero.nvme_path is None:
        yield (place, "server.zero.nvme_path"), f"{place}: nvme needs a folder; set server.zero.nvme_path"
    if zero.offload_param != "nvme" and zero.nvme_path is not None:
        keys = ("server.zero.nvme_path", place)
        advice = "use offload_param: nvme, or leave nvme_path out"
        yield keys, f"{keys[0]}: {zero.nvme_path} is not used with offload_param: {zero.offload_param}; {advice}"


def _run_misfits(recipe: Recipe, key: str, said: str) -> Iterator[Misfit]:
    _, *servers = recipe.split.tiers
    if not servers:
        yield (key, "split.tiers"), f"{said} is of servers, and with one tier there is none; leave it out"
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
    if recipe.train.processes > 1:
        why = "needs processes that compute the same in step, and those of train.processes do not"
        yield (key, "train.processes"), f"{said} {why}; use train.processes: 1, or leave it out"
    if recipe.model.dtype == "float64" and key != "server.fsdp":
        why = "has no float64 in DeepSpeed"
        yield (key, "model.dtype"), f"{said} {why}; use model.dtype: float32 or bfloat16, or server.fsdp: true"
