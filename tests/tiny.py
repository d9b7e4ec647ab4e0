"""A tiny base model on disk, rows for it and a recipe that fits both: what the tests of whole runs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from splitllm.model.loading import quiet_transformers

LAYERS, WORDS = 4, 29
CONFIGS = {
    "gpt2": lambda: GPT2Config(
        n_layer=LAYERS, n_embd=16, n_head=2, n_positions=32, vocab_size=WORDS + 3, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=WORDS + 3,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}


def save_base(folder: Path, config: PreTrainedConfig | None = None, *, words: int = WORDS) -> Path:
    """A model with random weights, and a tokenizer of `words` words `w0`, `w1`, ...; returns the folder."""
    torch.manual_seed(7)
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config or CONFIGS["gpt2"]()).save_pretrained(folder)
        save_tokenizer(folder, words)
    return folder


def save_tokenizer(folder: Path, words: int = WORDS) -> Path:
    names = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(words))]
    inner = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 40) -> Path:
    """Rows of different lengths in which a completion counts on where its prompt ends."""
    rows = []
    for number in range(count):
        words = [f"w{(number * 3 + place) % WORDS}" for place in range(3 + number % 7)]
        rows.append({"prompt": " ".join(words[:-2]), "completion": " ".join(words[-2:]), "group": f"g{number % 4}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain_recipe(base: Path, rows: Path) -> dict[str, Any]:
    """Three tiers, dropout, accumulation and two micro-batches in flight: as much as a short run can have."""
    return {
        "seed": 3,
        "model": {"base": str(base)},
        "split": {"tiers": {"client": 2, "edge": 1, "cloud": 1}, "cuts": [1, 3], "labels": "client"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"source": str(rows), "max_length": 24, "eval_fraction": 0.1},
        "train": {
            "steps": 4,
            "batch_size": 2,
            "accumulate": 2,
            "in_flight": 2,
            "optimizer": {"lr": 0.01},
            "schedule": {"name": "linear", "warmup_steps": 2},
            "checkpoint_every": 1,
            "threads": 1,
        },
    }


def write_recipe(folder: Path, family: str = "gpt2") -> Path:
    """Base, rows and recipe in `folder`; returns the recipe's path."""
    base = save_base(folder / "base", CONFIGS[family]())
    path = folder / "recipe.yaml"
    content = plain_recipe(base, write_rows(folder / "rows.jsonl"))
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
