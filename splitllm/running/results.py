"""What every run has at its end, wherever its roles were: the adapter of the unsplit base, and the summary."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splitllm.errors import CheckpointError
from splitllm.federated.export import folded
from splitllm.metrics import Metrics
from splitllm.model.export import load_adapter, newest_adapter, renew_adapter, save_adapter
from splitllm.model.full import block_names
from splitllm.model.lora import block_of, lora_config, matched_modules, target_modules
from splitllm.model.naming import PREFIX, names_in_unsplit, rename_tensors
from splitllm.model.quantizing import round_weight
from splitllm.plan import Plan
from splitllm.recipe import LoraRecipe, QuantizationRecipe, goes_by_rounds, lora_of, own_blocks
from splitllm.recipe.rounds import ONE_SHAPE
from splitllm.roles.worker import TENANT
from splitllm.running.base import base_folder
from splitllm.running.places import adapter_folders
from splitllm.running.state import Totals

logger = logging.getLogger(__name__)
PACKAGES = ("splitllm", "torch", "transformers", "peft", "accelerate", "datasets")


def export(plan: Plan, directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the adapter, or every client's, as one of the unsplit base into its folder below the run's.

    Args:
        plan: of the run.
        directory: of the run.
        tensors: all that trains, as `roles.assembly.adapter_in` names it.
    """
    for client in range(len(adapter_folders(plan.recipe, directory))):
        export_of(plan, directory, tensors, client)


def export_of(plan: Plan, directory: Path, tensors: Mapping[str, torch.Tensor], client: int) -> None:
    """Write the adapter of one client; where all share one, client 0 stands for all."""
    recipe, own = plan.recipe, f"{TENANT}{client}/"
    base = base_folder(recipe, directory)
    full = block_names(plan.config, plan.full)
    names = names_in_unsplit(base, [*plan.modules, *full], recipe.model.revision)
    mine = {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
    lora = recipe.lora if goes_by_rounds(recipe) else lora_of(recipe, client)
    config = adapter_config(plan, lora, base, {module: names[module] for module in plan.modules})
    config.modules_to_save = [names[block] for block in full] or None
    folder = adapter_folders(recipe, directory)[client]
    together = {name: tensor for name, tensor in tensors.items() if not name.startswith(TENANT)}
    scaled = goes_by_rounds(recipe) and recipe.rounds.rule not in ONE_SHAPE
    adapter, config = folded(together | mine, config, scaled=scaled)
    save_adapter(folder, rename_tensors(adapter, names), config)


def log_round(metrics: Metrics, step: int, reports: Sequence[Mapping[str, Any]]) -> None:
    """One line for each average of a round; who was left out is named to the user, too.

    Args:
        metrics: of the run.
        step: steps done.
        reports: of the servers that averaged.
    """
    for report in reports:
        metrics.log("round", step=step, **report)
        if report["void"] is not None:
            metrics.say(f"step {step}: the round of {report['role']} is void ({report['void']})")
        for sender, reason in report["rejected"].items():
            metrics.say(f"step {step}: {report['role']} left {sender} out of its average ({reason})")


def renew(plan: Plan, directory: Path, clients: Sequence[int]) -> None:
    """Give all adapters what the one that was written last has of the common part, which has gone on until then."""
    recipe, config = plan.recipe, plan.config
    own = own_blocks(recipe, config.num_hidden_layers)
    common = [module for module in plan.modules if block_of(config, module) not in own]
    if recipe.lora.adapters != "common" or not common:
        return
    modules = names_in_unsplit(base_folder(recipe, directory), common, recipe.model.revision)
    folders = [adapter_folders(recipe, directory)[client] for client in clients]
    if (newest := newest_adapter(folders)) is None:
        return
    beginnings = tuple(f"{PREFIX}{module}." for module in modules.values())
    tensors = {name: tensor for name, tensor in load_adapter(newest)[1].items() if name.startswith(beginnings)}
    for folder in folders:
        try:
            renew_adapter(folder, tensors)
        except CheckpointError as error:
            logger.warning("left as it is: %s", error)


def adapter_config(plan: Plan, lora: LoraRecipe, base: str, modules: Mapping[str, str]) -> Any:
    """PEFT's configuration on the unsplit base.

    The targets are as the recipe names them, or every module by its full name where those would match more.
    """
    recipe = plan.recipe
    targets = target_modules(plan.config, recipe.lora.targets)
    as_named = plan.every_module_trains and targets != "all-linear" and all(a == b for a, b in modules.items())
    config = lora_config(plan.config, lora, targets if as_named else sorted(modules.values()), base)
    config.revision = recipe.model.revision
    return config


def round_base(plan: Plan, directory: Path, unsplit: nn.Module) -> None:
    """Give the whole model the weights that a run's quantised ones stand for."""
    recipe, methods = plan.recipe, dict[int, QuantizationRecipe]()
    for tier, (start, stop) in zip(recipe.split.tiers, plan.bounds, strict=True):
        if tier in recipe.quantization:
            methods |= dict.fromkeys(range(start, stop), recipe.quantization[tier])
    linear = {name: methods.get(block_of(plan.config, name)) for name in matched_modules(plan.config, "all-linear")}
    names = names_in_unsplit(base_folder(recipe, directory), linear, recipe.model.revision)
    for name, how in linear.items():
        if how is not None:
            round_weight(unsplit.get_submodule(names[name]), how)


def summary_of(
    totals: Totals,
    numbers: int,
    memory: Mapping[str, Any],
    leaves: str,
    unsplit: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What `summary.json` holds.

    Args:
        totals: over the run.
        numbers: that train.
        memory: its peaks, by their keys in the summary.
        leaves: in words what leaves the device.
        unsplit: losses of the adapter on the unsplit base, by their keys in the summary.
    """
    return {
        "eval_loss_before": totals.loss_before,
        "eval_loss_after": totals.loss_after,
        **(unsplit or {}),
        "train_tokens": totals.tokens,
        "train_seconds": round(totals.seconds, 3),
        "tokens_per_second": round(totals.tokens / max(totals.seconds, 1e-9), 1),
        "wire_bytes_up": totals.bytes_up,
        "wire_bytes_down": totals.bytes_down,
        "trainable_parameters": numbers,
        **memory,
        "leaves_the_device": leaves,
        "versions": {name: version(name) for name in PACKAGES},
    }
