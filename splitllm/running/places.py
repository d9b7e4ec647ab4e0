"""Where a run's adapters lie, and what its user can do with them. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from splitllm.recipe import Recipe, client_names, goes_by_rounds

ADAPTER = "adapter"


def adapter_folders(recipe: Recipe, directory: Path) -> list[Path]:
    """Where the adapters lie below a run's folder: one, or one of each client."""
    if recipe.lora.adapters == "shared" or goes_by_rounds(recipe):
        return [directory / ADAPTER]
    return [directory / ADAPTER / client for client in client_names(recipe)]


def where_next(recipe: Recipe, directory: Path, base: str) -> list[str]:
    """For the user: where the adapter is, or the clients' are that have one, and what can be done with it."""
    first, *others = [folder for folder in adapter_folders(recipe, directory) if folder.exists()]
    return [
        f"adapter: {first}" + (f", and those of {len(others)} other clients beside it" if others else ""),
        f"next: peft.PeftModel.from_pretrained(base_model, {str(first)!r}), or",
        f"      splitllm merge {first} --base {base} --output-dir {directory / 'merged'}",
    ]
