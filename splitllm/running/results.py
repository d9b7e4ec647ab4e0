"""What every run has at its end, wherever its roles were: the adapter of the unsplit base, and the summary."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from splitllm.model.export import renew_adapter, save_adapter
from splitllm.model.lora import lora_config, target_modules
from splitllm.model.naming import names_in_unsplit, rename_tensors
from splitllm.preflight import Plan
from splitllm.recipe import LoraRecipe, lora_of
from splitllm.roles.worker import TENANT
from splitllm.running.base import base_folder
from splitllm.running.places import adapter_folders
from splitllm.running.state import Totals

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
    modules = names_in_unsplit(base, plan.modules, recipe.model.revision)
    mine = {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
    config = adapter_config(plan, lora_of(recipe, client), base, modules)
    folder = adapter_folders(recipe, directory)[client]
    save_adapter(folder, rename_tensors(_common(tensors) | mine, modules), config)


def renew(plan: Plan, directory: Path, tensors: Mapping[str, torch.Tensor], client: int) -> None:
    """Write what is not a client's own into the adapter that was written of one client; the rest stays as it is."""
    recipe = plan.recipe
    modules = names_in_unsplit(base_folder(recipe, directory), plan.modules, recipe.model.revision)
    renew_adapter(adapter_folders(recipe, directory)[client], rename_tensors(_common(tensors), modules))


def _common(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(TENANT)}


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
