"""From the shards' adapter tensors to an ordinary PEFT adapter, and from that to a merged model."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from splitllm.checkpoint import writing
from splitllm.errors import CheckpointError
from splitllm.model.families import layout_of
from splitllm.model.keyed import remembered
from splitllm.model.loading import Checkpoint, load_config, quiet_transformers
from splitllm.model.shard import meta_model

PlainBatch = tuple[torch.Tensor, Sequence[int], torch.Tensor, torch.Tensor, torch.Tensor | None]
"""(ids_BS, lengths, positions_N, targets_N, position_ids_BS) of a micro-batch; positions count real tokens."""


def save_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: LoraConfig) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, the folder whole or not at all.

    Args:
        folder: to be written.
        tensors: the union of the shards' adapter tensors, by their names in a PEFT file.
        config: PEFT's configuration of the adapter on the unsplit model.

    Raises:
        OSError: it cannot be written, for want of space say.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    whole = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    described = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    described["inference_mode"] = True
    try:
        temporary.mkdir(parents=True)
        with writing(temporary):
            save_file(whole, temporary / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (temporary / CONFIG_NAME).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def renew_adapter(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put other values into some tensors of an adapter that lies there; at every moment it is whole.

    Raises:
        CheckpointError: there is none.
        OSError: it cannot be written, for want of space say; it is as it was.
    """
    _, held = load_adapter(folder)
    whole = held | {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    place = folder / SAFETENSORS_WEIGHTS_NAME
    temporary = place.with_name(f".{place.name}.writing")
    try:
        with writing(temporary):
            save_file(whole, temporary, metadata={"format": "pt"})
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def newest_adapter(folders: Sequence[Path]) -> Path | None:
    """The one whose tensors were written last; None if there is none."""
    there = [folder for folder in folders if (folder / SAFETENSORS_WEIGHTS_NAME).exists()]
    return max(there, key=lambda folder: (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_mtime_ns, default=None)


def load_adapter(folder: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A PEFT LoRA adapter from a local folder.

    Raises:
        CheckpointError: there is none, or it is not LoRA.
    """
    if inside := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}")):
        inner = f"one lies in it: name {folder / inside[0]}"
        raise CheckpointError(f"{folder}: not a PEFT adapter folder that can be read here ({inner})")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder}: not a PEFT adapter folder that can be read here ({first})") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{folder}: holds a {type(config).__name__}, not LoRA")
    return config, tensors


def unsplit_model(base: str, dtype: torch.dtype | None = None, revision: str | None = None) -> PreTrainedModel:
    """The whole model as `AutoModelForCausalLM` loads it; of a multimodal checkpoint that is the multimodal model.

    Raises:
        CheckpointError: its configuration or tensors are missing or misshapen; Hugging Face would draw those at random.
        FamilyError: it is no decoder of a known family.
    """
    config = load_config(base, revision)
    layout_of(config)
    Checkpoint(base, revision).require(tensor_shapes(config))
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto", revision=revision)
    return model.eval()


def tensor_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the unsplit model has (a tied head is the embedding).

    Raises:
        CheckpointError: the configuration's settings contradict one another.
    """
    return dict(_tensor_shapes(config))


@remembered(8)
def _tensor_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    try:
        with quiet_transformers():
            model = meta_model(config, torch.float32)
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"model.base: no model can be built from its configuration ({first})") from error
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(p.shape) for name, p in model.named_parameters() if name not in tied}


def with_adapter(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The unsplit model with the adapter on it.

    Raises:
        CheckpointError: the adapter's tensors are not those this base would have.
    """
    config, tensors = load_adapter(adapter)
    try:
        with warnings.catch_warnings(action="ignore"):  # of tensors that do not fit, which are counted below
            model = PeftModel.from_pretrained(base, str(adapter), config=config)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{adapter} does not fit this base: {first}") from error
    own = sum(1 for name, _ in model.named_parameters() if ".lora_" in name or ".modules_to_save." in name)
    if own != len(tensors):
        raise CheckpointError(f"{adapter} has {len(tensors)} tensors, but this base takes {own}: another base model?")
    return model.eval()


def take_off(model: PeftModel) -> None:
    """Take the adapter off its base, which is then as it was: PEFT leaves what `modules_to_save` names as trained."""
    base = model.get_base_model()
    wrapped = [(name, each) for name, each in base.named_modules() if isinstance(each, ModulesToSaveWrapper)]
    model.unload()
    for name, each in wrapped:
        base.set_submodule(name, each.original_module)


def merge(adapter: Path, base: str, output_dir: Path) -> None:
    """Merge an adapter into its base and save an ordinary Hugging Face model, with the base's tokenizer if it has one.

    Args:
        adapter: a PEFT adapter folder.
        base: the unsplit base, a folder or a hub name.
        output_dir: must not exist, or be empty.

    Raises:
        CheckpointError: adapter and base do not fit, one of them cannot be read, or `output_dir` is in use.
        FamilyError: the base is no decoder of a known family.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise CheckpointError(f"--output-dir: {output_dir} is not an empty folder; name a new one")
    if output_dir.resolve() == Path.cwd():
        raise CheckpointError(f"--output-dir: {output_dir} is the current directory; name a new one")
    load_adapter(adapter)
    merged = with_adapter(unsplit_model(base), adapter).merge_and_unload()
    temporary = output_dir.with_name(f".{output_dir.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with quiet_transformers(), writing(temporary):
            merged.save_pretrained(temporary)
            _copy_tokenizer(base, temporary)
        if output_dir.exists():
            output_dir.rmdir()
        os.replace(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_tokenizer(base: str, folder: Path) -> None:
    """Save the base's tokenizer; a base without one (drawn at random, say) is merged without."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError):
        return
    tokenizer.save_pretrained(folder)


def whole_model_loss(model: nn.Module, batches: Sequence[PlainBatch]) -> tuple[float, int]:
    """Summed cross-entropy and predicted tokens by a plain forward of the unsplit model (no splitllm code in it)."""
    total, labels = 0.0, 0
    with torch.no_grad():
        for ids_BS, lengths, positions_N, targets_N, position_ids_BS in batches:
            logits_BSV = model(input_ids=ids_BS, position_ids=position_ids_BS, use_cache=False).logits
            logits_TV = torch.cat([row[:length] for row, length in zip(logits_BSV, lengths, strict=True)])
            wide_NV = logits_TV[positions_N].to(torch.promote_types(logits_TV.dtype, torch.float32))
            total += float(F.cross_entropy(wide_NV, targets_N, reduction="sum"))
            labels += targets_N.numel()
    return total, labels
