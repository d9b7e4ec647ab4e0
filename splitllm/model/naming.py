"""Names of the text model's modules inside the unsplit model as Hugging Face loads it.

They are the same unless the checkpoint is multimodal: there `model.layers.0` is `model.language_model.layers.0`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from splitllm.model.families import Layout
from splitllm.model.loading import bare_name, quiet_transformers

T = TypeVar("T")
PREFIX = "base_model.model."  # what PEFT puts before the names in an adapter file


def names_in_unsplit(base: str, modules: Iterable[str], revision: str | None = None) -> dict[str, str]:
    """Text-model module name -> its name in `AutoModelForCausalLM.from_pretrained(base)`."""
    names = list(modules)
    config = AutoConfig.from_pretrained(base, revision=revision)
    if config.get_text_config(decoder=True) is config:
        return {name: name for name in names}
    with quiet_transformers(), init_empty_weights(), no_init_weights():
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    by_bare = {bare_name(name): name for name, _ in whole.named_modules()}
    return {name: by_bare[bare_name(name)] for name in names}


def rename_tensors(tensors: Mapping[str, T], modules: Mapping[str, str]) -> dict[str, T]:
    """Tensors of an adapter file under the unsplit model's names.

    Args:
        tensors: of adapted modules, and of blocks that train in full.
        modules: text-model name of each of these -> its name in the unsplit model.
    """
    return {_renamed(name, modules): tensor for name, tensor in tensors.items()}


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    bare = name.removeprefix(PREFIX)
    module, adapter, kind = bare.partition(".lora_")
    if not adapter:
        module = next(each for each in modules if bare.startswith(f"{each}."))
        kind = bare.removeprefix(module)
    return f"{PREFIX}{modules[module]}{adapter}{kind}"


def in_text_model(tensors: Mapping[str, T], layout: Layout) -> dict[str, T]:
    """Adapter tensors, named as any unsplit model has them, under the text model's own names."""
    return {f"{PREFIX}{layout.base}.{bare_name(name.removeprefix(PREFIX))}": t for name, t in tensors.items()}
