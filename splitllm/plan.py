"""A checked recipe: what every command needs to know of it, whether there is room, and what it says of itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedConfig

from splitllm.data import Corpus
from splitllm.errors import RecipeError
from splitllm.model.full import full_shapes
from splitllm.model.lora import adapter_shapes, block_of
from splitllm.model.machine import available_bytes, device_bytes, device_here, resident_bytes
from splitllm.recipe import (
    Recipe,
    ServerRecipe,
    client_cuts,
    client_names,
    full_blocks,
    goes_by_lanes,
    goes_by_rounds,
    own_blocks,
    quantization_line,
    role_bounds,
    rounds_line,
    tier_bounds,
    what_leaves_the_device,
)
from splitllm.roles.admission import Admission, admissions, lines_of
from splitllm.roles.fitting import Needs, device_needs, needs_of_limits, role_needs, shortage, together_needs
from splitllm.roles.ledger import Ledger

NEED_CONTINUOUS = ("wait", "starve", "gradient_wait", "park_after")


@dataclass(frozen=True)
class Plan:
    """What a run needs to know before weights are loaded.

    Attributes:
        recipe: the resolved recipe.
        config: of the text model.
        corpus: every client's examples.
        modules: global names of the modules that LoRA adapts, on the tiers that train.
        every_module_trains: whether those are all that the targets match.
    """

    recipe: Recipe
    config: PreTrainedConfig
    corpus: Corpus
    modules: tuple[str, ...]
    every_module_trains: bool

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First block and block after the last of every tier, bottom up."""
        return tier_bounds(self.recipe, self.config.num_hidden_layers)

    @property
    def role_bounds(self) -> dict[str, tuple[int, int]]:
        """The same of every role."""
        return role_bounds(self.recipe, self.config.num_hidden_layers)

    @cached_property
    def admissions(self) -> dict[str, Admission]:
        """Server right above clients -> whom it takes in; none without `server.memory_mib`."""
        return admissions(self.recipe, self.config, self.modules)

    @cached_property
    def ledger(self) -> Ledger:
        """What every role will hold; the interpreter is this one, as it is when this is first asked for."""
        return Ledger(self.recipe, self.config, self.modules, resident_bytes())

    def refuse_beyond_limits(self) -> None:
        """Be sure that no role takes more than `split.memory_mib` gives its tier.

        Raises:
            RecipeError: one does, with what would fit.
        """
        if self.recipe.split.memory_mib:
            self.refuse_unless(needs_of_limits)

    def refuse_unless(self, *needs: Needs) -> None:
        """Be sure of room, before anything is loaded.

        Raises:
            RecipeError: there is none, with what would fit.
        """
        short = [shortage(self.recipe, self.config, self.modules, self.ledger, each) for each in needs]
        if lines := [line for each in short for line in each]:
            raise RecipeError(lines)

    @cached_property
    def adapters(self) -> dict[int, dict[str, torch.Size]]:
        """Rank -> the shapes of what trains of the whole model, by name, for all ranks of the recipe."""
        lora = self.recipe.lora
        ranks = {own.rank for own in lora.clients.values() if own.rank is not None} | {lora.rank}
        loras = {rank: lora.model_copy(update={"rank": rank}) for rank in ranks}
        full = full_shapes(self.config, self.full)
        return {rank: adapter_shapes(self.config, each, self.modules) | full for rank, each in loras.items()}

    @cached_property
    def full(self) -> frozenset[int]:
        """The blocks of which all weights train."""
        return full_blocks(self.recipe, self.config.num_hidden_layers)

    def tier_lines(self) -> list[str]:
        """What every tier holds, bottom up."""
        pairs = zip(self.recipe.split.tiers.items(), self.bounds, strict=True)
        held = [(name, count, f"blocks {a}..{b - 1}" if a < b else "no blocks") for (name, count), (a, b) in pairs]
        lines = [f"{name} x{count}: {blocks}" for name, count, blocks in held]
        if self.recipe.split.client_cuts:
            cuts = sorted(set(client_cuts(self.recipe)))
            name, count, _ = held[0]
            lines[0] = f"{name} x{count}: blocks {', '.join(f'0..{cut - 1}' for cut in cuts[:-1])} or 0..{cuts[-1] - 1}"
        return lines


def refuse_without_room(plan: Plan, name: str | None = None) -> None:
    """Compare what a role, or all roles in one process, will hold with what this machine has left.

    Args:
        plan: of the run.
        name: of the role; None: all of them.

    Raises:
        RecipeError: there is no room, with what would fit.
    """
    device = device_here()
    on_device, free = device_bytes(device), available_bytes()
    if on_device is not None:
        plan.refuse_unless(device_needs(name, on_device, f"memory of {device}"))
    elif free is not None:
        where = "memory of this machine"
        started = int(os.environ.get("WORLD_SIZE", "1"))
        elsewhere = started - int(os.environ.get("LOCAL_WORLD_SIZE", started))
        plan.refuse_unless(together_needs(free, where) if name is None else role_needs(name, free, where, elsewhere))


def describe(plan: Plan) -> list[str]:
    """What a recipe will do, for `splitllm validate`."""
    recipe = plan.recipe
    tiers = [
        f"  {line} ({_what_trains(plan, range(*bounds))})"
        for line, bounds in zip(plan.tier_lines(), plan.bounds, strict=True)
    ]
    shares = [
        f"  {share.client}: {share.examples} rows, {share.tokens} tokens, {share.labels} labels"
        + (f" ({', '.join(share.groups)})" if share.groups else "")
        for share in plan.corpus.shares
    ]
    held_out = sum(len(part) for part in plan.corpus.eval)
    return [
        f"model: {recipe.model.base} ({plan.config.model_type}, {plan.config.num_hidden_layers} blocks)",
        *tiers,
        *_client_lines(plan),
        f"LoRA: rank {recipe.lora.rank} on {len(plan.modules)} modules, adapters: {recipe.lora.adapters}"
        + _common(plan),
        *([f"quantization: {quantization_line(recipe)}"] if recipe.quantization else []),
        f"server.batching: {recipe.server.batching}" + _without_effect(recipe.server),
        *_spread(recipe.server),
        *lines_of(recipe, plan.admissions),
        "data:",
        *shares,
        f"  held out: {held_out} rows",
        f"leaves the device: {what_leaves_the_device(recipe)}",
        *([f"rounds: {rounds_line(recipe)}"] if goes_by_rounds(recipe) else []),
        "the recipe is valid",
    ]


def _what_trains(plan: Plan, blocks: range) -> str:
    """Of a tier of these blocks."""
    if not plan.full.isdisjoint(blocks):
        return "trains in full"
    return "trains" if any(block_of(plan.config, module) in blocks for module in plan.modules) else "frozen"


def _common(plan: Plan) -> str:
    """Which blocks all clients train together, and when these step, where that is not all with every step."""
    recipe, layers = plan.recipe, plan.config.num_hidden_layers
    first, server = own_blocks(recipe, layers).stop, recipe.server
    if recipe.lora.adapters != "common":
        return ""
    when = "with everybody"
    if goes_by_lanes(recipe):
        some = f"{server.step_tenants} steps of clients" if server.step_tenants else ""
        some = f"{server.step_tokens} tokens" if server.step_tokens else some
        when = f"after {some or 'as many steps as a server has clients'}"
    return f" in blocks {first}..{layers - 1}, stepped {when}"


def _without_effect(server: ServerRecipe) -> str:
    """Keys that were set for another kind of batching."""
    set_ = [key for key in NEED_CONTINUOUS if getattr(server, key) != ServerRecipe.model_fields[key].default]
    if server.batching == "continuous" or not set_:
        return ""
    return f" (nothing comes of {', '.join(f'server.{key}' for key in set_)}, which are for continuous)"


def _spread(server: ServerRecipe) -> list[str]:
    """What the processes of a server share, where they share more than one process has to."""
    zero = server.zero
    engine = "server.fsdp" if server.fsdp else f"server.zero.stage: {zero.stage}" if zero.stage is not None else None
    if engine is None and server.processes == 1:
        return []
    spread = ["rows of batches"] if server.processes > 1 else []
    if engine is not None:
        what = "optimiser states" if zero.stage in (1, 2) else "frozen matrices"
        alone = server.processes == 1 and zero.offload_param == zero.offload_optimizer == "none"
        spread.append(f"{what} by {engine}" + (", which saves nothing in one process" if alone else ""))
    return [f"server.processes: {server.processes}, with {' and '.join(spread)}"]


def _client_lines(plan: Plan) -> list[str]:
    """Of every client what is not as for all: its blocks, and its own adapter."""
    recipe, lines = plan.recipe, []
    for name in client_names(recipe):
        own = recipe.lora.clients.get(name)
        said = [f"{key} {value}" for key, value in (own.model_dump(exclude_none=True) if own else {}).items()]
        if name in recipe.split.client_cuts:
            start, stop = plan.role_bounds[name]
            said.insert(0, f"blocks {start}..{stop - 1}")
        if said:
            lines.append(f"  {name}: {', '.join(said)}")
    return lines
