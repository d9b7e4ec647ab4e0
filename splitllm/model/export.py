"""From the shards' adapter tensors to an ordinary PEFT adapter, and from that to a merged model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoTokenizer, PreTrainedModel

from splitllm.errors import CheckpointError
from splitllm.model.loading import load_config, quiet_transformers


def save_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: LoraConfig) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, the folder whole or not at all.

    Args:
        folder: to be written.
        tensors: the union of the shards' adapter tensors, by their names in a PEFT file.
        config: PEFT's configuration of the adapter on the unsplit model.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    whole = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    save_file(whole, temporary / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    described = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    described["inference_mode"] = True
    (temporary / CONFIG_NAME).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load_adapter(folder: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A PEFT LoRA adapter from a local folder.

    Raises:
        CheckpointError: there is none, or it is not LoRA.
    """
    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder}: not a PEFT adapter folder that can be read here ({first})") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{folder}: holds a {type(config).__name__}, not LoRA")
    return config, tensors


def unsplit_model(base: str, dtype: torch.dtype | None = None, revision: str | None = None) -> PreTrainedModel:
    """The whole text model, as Hugging Face loads it (the text part of a multimodal checkpoint)."""
    config = load_config(base, revision)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with quiet_transformers():
        model: PreTrainedModel = model_class.from_pretrained(
            base, config=config, dtype=dtype or "auto", revision=revision
        )
    return model.eval()


def with_adapter(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The unsplit model with the adapter on it.

    Raises:
        CheckpointError: the adapter's tensors are not those this base would have.
    """
    config, tensors = load_adapter(adapter)
    try:
        model = PeftModel.from_pretrained(base, str(adapter), config=config)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{adapter} does not fit this base: {str(error).splitlines()[0]}") from error
    own = sum(1 for name, _ in model.named_parameters() if ".lora_" in name)
    if own != len(tensors):
        raise CheckpointError(f"{adapter} has {len(tensors)} tensors, but this base takes {own}: another base model?")
    return model.eval()


def merge(adapter: Path, base: str, output_dir: Path) -> None:
    """Merge an adapter into its base and save an ordinary Hugging Face model, tokenizer included.

    Args:
        adapter: a PEFT adapter folder.
        base: the unsplit base, a folder or a hub name.
        output_dir: must not exist, or be empty.

    Raises:
        CheckpointError: adapter and base do not fit, or `output_dir` is in use.
    """
    if output_dir.exists() and any(output_dir.iterdir()):
        raise CheckpointError(f"--output-dir: {output_dir} is not empty; name a new folder")
    merged = with_adapter(unsplit_model(base), adapter).merge_and_unload()
    temporary = output_dir.with_name(f".{output_dir.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    with quiet_transformers():
        merged.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(base).save_pretrained(temporary)
    if output_dir.exists():
        output_dir.rmdir()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, output_dir)


def whole_model_loss(
    model: nn.Module, batches: Sequence[tuple[torch.Tensor, Sequence[int], torch.Tensor, torch.Tensor, torch.Tensor | None]]
) -> float:
    """Mean cross-entropy per predicted token by a plain forward of the unsplit model (no splitllm code in it).

    Args:
        model: a causal LM.
        batches: of (ids_BS, lengths, positions_N, targets_N, position_ids_BS), positions counting real tokens.
    """
    total, labels = 0.0, 0
    with torch.no_grad():
        for ids_BS, lengths, positions_N, targets_N, position_ids_BS in batches:
            logits_BSV = model(input_ids=ids_BS, position_ids=position_ids_BS, use_cache=False).logits
            logits_TV = torch.cat([row[:length] for row, length in zip(logits_BSV, lengths, strict=True)])
            wide_NV = logits_TV[positions_N].to(torch.promote_types(logits_TV.dtype, torch.float32))
            total += float(F.cross_entropy(wide_NV, targets_N, reduction="sum"))
            labels += targets_N.numel()
    return total / labels
