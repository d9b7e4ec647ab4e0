"""Names in the unsplit model: the same, or under `language_model` where the checkpoint is multimodal."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from splitllm.model.families import STANDARD
from splitllm.model.loading import load_config
from splitllm.model.lora import matched_modules
from splitllm.model.naming import in_text_model, names_in_unsplit, rename_tensors
from tests.families import CONFIGS, GEMMA, MIXED, checkpoint_folder

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("multimodal")
    Gemma3Config(text_config={**GEMMA, "layer_types": MIXED}, vision_config=VISION).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_text_model_keeps_its_names(family: str) -> None:
    modules = matched_modules(CONFIGS[family](), None)
    assert names_in_unsplit(str(checkpoint_folder(family)), modules) == {name: name for name in modules}


def test_the_text_part_of_a_multimodal_model_gets_its_longer_names(multimodal: str) -> None:
    modules = matched_modules(load_config(multimodal), None)
    names = names_in_unsplit(multimodal, modules)
    assert names["model.layers.0.self_attn.q_proj"] == "model.language_model.layers.0.self_attn.q_proj"
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(Gemma3Config.from_pretrained(multimodal))
    assert set(names.values()) <= {name for name, _ in whole.named_modules()}
    assert len(set(names.values())) == len(modules)


def test_tensors_go_to_the_longer_names_and_back(multimodal: str) -> None:
    modules = names_in_unsplit(multimodal, matched_modules(load_config(multimodal), None))
    kinds = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    tensors = {f"base_model.model.{name}.{kind}": number for number, name in enumerate(modules) for kind in kinds}
    renamed = rename_tensors(tensors, modules)
    assert len(renamed) == len(tensors)
    assert renamed["base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"] == 0
    assert in_text_model(renamed, STANDARD) == tensors
    assert in_text_model(tensors, STANDARD) == tensors
