"""LoRA through PEFT, on shards: matched against the whole model, started as the whole model would start."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from splitllm.errors import RecipeError
from splitllm.model.dropout import AdapterDropout
from splitllm.model.families import layout_of_family
from splitllm.model.keyed import remembered
from splitllm.model.naming import PREFIX
from splitllm.model.randomness import seed_of
from splitllm.model.shard import BUILDING, Shard, meta_model
from splitllm.recipe import LoraRecipe

ADAPTER = "default"


def target_modules(config: PreTrainedConfig, targets: str | Sequence[str] | None) -> str | list[str]:
    """What PEFT is told to target: the recipe's word, or PEFT's own table for the family.

    Raises:
        RecipeError: the recipe names none and PEFT's table has no row for this family.
    """
    if targets is not None:
        return targets if isinstance(targets, str) else list(targets)
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config.model_type)
    if known is None:
        raise RecipeError(
            [f"lora.targets: PEFT has no default for {config.model_type}: name the modules or all-linear"]
        )
    return sorted(known)


def matched_modules(config: PreTrainedConfig, targets: str | Sequence[str] | None) -> list[str]:
    """Global names of the linear layers of the whole model that LoRA adapts, bottom up.

    Raises:
        RecipeError: nothing matches, or something outside the blocks does.
    """
    return list(_matched(config, targets if targets is None or isinstance(targets, str) else tuple(targets)))


@remembered(32)
def _matched(config: PreTrainedConfig, targets: str | tuple[str, ...] | None) -> list[str]:
    wanted = target_modules(config, targets)
    model, blocks = meta_model(config, torch.float32), _block_pattern(config.model_type)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    inside = [name for name in linear if blocks.match(name)]
    if wanted == "all-linear":
        return inside
    peft_config = LoraConfig(target_modules=wanted)
    found = [name for name, _ in model.named_modules() if name and check_target_module_exists(peft_config, name)]
    odd = [name for name in found if name not in inside]
    if odd:
        raise RecipeError(
            [f"lora.targets: {name} is no linear layer inside a block, and only those are adapted" for name in odd[:3]]
        )
    if not found:
        choices = ", ".join(sorted({name.rsplit(".", 1)[1] for name in inside}))
        raise RecipeError([f"lora.targets: {wanted} matches nothing in {config.model_type}; its blocks have {choices}"])
    return found


def block_of(config: PreTrainedConfig, name: str) -> int:
    """The global index of the block that a module or parameter belongs to."""
    match = _block_pattern(config.model_type).match(name)
    assert match, name
    return int(match.group(1))


@lru_cache(maxsize=32)
def _block_pattern(family: str) -> re.Pattern[str]:
    layout = layout_of_family(family)
    return re.compile(rf"{layout.base}\.{layout.blocks}\.(\d+)\.")


def lora_config(
    config: PreTrainedConfig, lora: LoraRecipe, modules: str | Sequence[str], base: str | None = None
) -> LoraConfig:
    """PEFT's configuration of this adapter for the modules given."""
    conv = config.model_type == "gpt2"  # its linear layers are Conv1D, stored transposed
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        fan_in_fan_out=conv,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )


def add_lora(shard: Shard, lora: LoraRecipe, modules: Sequence[str], seed: int) -> None:
    """Put the adapter into a shard; one without a matched module stays as it is, wholly frozen.

    Args:
        shard: receives trainable adapter tensors: fp32 over half-precision weights, else of the weights' dtype.
        lora: rank, alpha, dropout and variant.
        modules: the matched modules of the whole model (`matched_modules`).
        seed: with each parameter's global name it draws the initial A, so every cut starts alike.
    """
    config = shard.model.config
    own = [name for name in modules if shard.start <= block_of(config, name) < shard.stop]
    if not own:
        return
    training = shard.training
    peft_config = lora_config(config, lora, own)
    peft_config.fan_in_fan_out = isinstance(shard.model.get_submodule(own[0]), Conv1D)  # none is where it is quantised
    inject_adapter_in_model(peft_config, shard.model, ADAPTER)
    cast_adapter_dtype(shard.model, ADAPTER, autocast_adapter_dtype=True)
    for name, parameter in adapter_parameters(shard).items():
        if ".lora_A." in name:
            parameter.data.copy_(initial_a(name, parameter.shape, seed))
    if lora.dropout:
        for name in own:
            module = shard.model.get_submodule(name)
            assert isinstance(module, LoraLayer)
            module.lora_dropout[ADAPTER] = AdapterDropout(lora.dropout, name, block_of(config, name), shard.key)
    shard.train(training)


def initial_a(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """The initial A, fp32, as PEFT draws it but keyed.

    Args:
        name: in an adapter file.
        shape: rank and width in.
        seed: of the run.
    """
    start = torch.empty(tuple(shape), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed_of("lora_A", seed, name))
    with BUILDING:  # elsewhere a model may be built meanwhile, without initial values
        return nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)


def scaling_of(lora: LoraRecipe) -> float:
    """What the low-rank product is multiplied by: alpha / r, for rsLoRA alpha / sqrt(r) (arXiv 2312.03732)."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def adapter_parameters(shard: Shard) -> dict[str, nn.Parameter]:
    """The adapter's tensors in this shard by the names they have in a PEFT adapter file, in model order."""
    return _adapter_of(shard.model)


def adapter_shapes(config: PreTrainedConfig, lora: LoraRecipe, modules: Sequence[str]) -> dict[str, torch.Size]:
    """The shapes of the whole model's adapter tensors, by their names in an adapter file; nothing is allocated."""
    return dict(_adapter_shapes(config, lora.rank, lora.dora, tuple(modules)))


@remembered(32)
def _adapter_shapes(config: PreTrainedConfig, rank: int, dora: bool, modules: tuple[str, ...]) -> dict[str, torch.Size]:
    lora = LoraRecipe(rank=rank, dora=dora)
    with BUILDING:
        model = meta_model(config, torch.float32)
        inject_adapter_in_model(lora_config(config, lora, modules), model, ADAPTER, low_cpu_mem_usage=True)
    return {name: parameter.shape for name, parameter in _adapter_of(model).items()}


def _adapter_of(model: nn.Module) -> dict[str, nn.Parameter]:
    named = model.named_parameters()
    return {peft_name(name): parameter for name, parameter in named if f".{ADAPTER}" in name and ".lora_" in name}


def adapter_dtype(weights: torch.dtype) -> torch.dtype:
    """Of adapters over weights of a dtype: fp32 over half precision, as PEFT has it."""
    return torch.float32 if weights in (torch.float16, torch.bfloat16) else weights


def in_model(name: str) -> str:
    """A name in an adapter file without PEFT's prefix."""
    return name.removeprefix(PREFIX)


def peft_name(name: str) -> str:
    """A parameter's name in `adapter_model.safetensors` (DoRA's magnitude is stored without `.weight`)."""
    bare = name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")
    return PREFIX + re.sub(r"lora_magnitude_vector\.weight$", "lora_magnitude_vector", bare)
