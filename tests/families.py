"""Tiny random models of every family, and recipes and rows for them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from splitllm.data.corpus import Corpus
from splitllm.data.examples import Example
from splitllm.model.loading import Checkpoint, quiet_transformers
from splitllm.model.lora import matched_modules
from splitllm.recipe import Recipe, full_blocks, role_bounds, tier_bounds
from splitllm.roles.assembly import Assembly, Roles, schedule_of

LAYERS, VOCABULARY = 6, 61
SCALE = 0.1
"""Of the random weights: wide enough that attention is not flat."""
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {**SIZES, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"] * 2


def _gpt2(dropout: float = 0.0) -> PreTrainedConfig:
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes = {"n_layer": LAYERS, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    return transformers.GPT2Config(**sizes, **rates, bos_token_id=1, eos_token_id=2)


CONFIGS = {
    "gpt2": _gpt2,
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA, layer_types=MIXED),
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "granite": lambda: transformers.GraniteConfig(
        **SIZES, embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, attention_multiplier=0.3
    ),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
}

TARGETS = dict.fromkeys(("phi3", "olmo2", "granite", "cohere"), "all-linear")  # no row in PEFT's table

DROPOUT = {"gpt2 with dropout": lambda: _gpt2(0.2)}  # in the embeddings, the attention and the residual stream


@cache
def checkpoint_folder(family: str) -> Path:
    """A checkpoint of random weights, large enough that a wrong cut shows."""
    config = {**CONFIGS, **DROPOUT}[family]()
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=SCALE)
        else:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.05)
    folder = Path(tempfile.mkdtemp(prefix=f"{family.split()[0]}-"))
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


def examples(count: int, seed: int, longest: int = 14) -> tuple[Example, ...]:
    """Rows of random tokens and lengths; about half of the tokens are learned."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = rng.integers(3, VOCABULARY, rng.integers(4, longest)).astype(np.int32)
        targets = np.arange(len(ids)) >= rng.integers(1, len(ids) - 1)
        rows.append(Example(ids, targets))
    return tuple(rows)


def corpus(clients: int, rows: int = 12) -> Corpus:
    """Rows of every client; the clients differ."""
    train = tuple(examples(rows, seed=client) for client in range(clients))
    held_out = tuple(examples(3, seed=100 + client) for client in range(clients))
    return Corpus(train, held_out, ())


def recipe(family: str, cuts: list[int], labels: str = "cloud", dtype: str = "float64", **changes: Any) -> Recipe:
    """A recipe of as many tiers as the cuts make; `changes` are sections merged in."""
    names = {1: ["client"], 2: ["client", "cloud"], 3: ["client", "edge", "cloud"]}.get(
        len(cuts) + 1, ["client", *(f"edge{number}" for number in range(len(cuts) - 1)), "cloud"]
    )
    counts = {1: [2], 2: [2, 1]}.get(len(names), [2, 2, *[1] * (len(names) - 2)])
    raw: dict[str, Any] = {
        "model": {"base": str(checkpoint_folder(family)), "dtype": dtype},
        "split": {"tiers": dict(zip(names, counts, strict=True)), "cuts": cuts, "labels": labels},
        "lora": {"rank": 4, "alpha": 8, "targets": TARGETS.get(family)},
        "data": {"source": "unused"},
        "train": {
            "steps": 5,
            "batch_size": 3,
            "accumulate": 2,
            "clip_norm": 0.5,
            "optimizer": {"lr": 1e-2},
            "schedule": {"warmup_steps": 1},
        },
    }
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    return Recipe.model_validate(raw)


def roles_of(recipe: Recipe, rows: Corpus) -> Roles:
    """The roles of a recipe, in this process."""
    base = Checkpoint(recipe.model.base)
    modules = matched_modules(base.config, recipe.lora.targets)
    layers = base.config.num_hidden_layers
    tiers, bounds = list(recipe.split.tiers), tier_bounds(recipe, layers)
    if recipe.lora.tiers is not None:
        held = [bound for name, bound in zip(tiers, bounds, strict=True) if name in recipe.lora.tiers]
        blocks = {block for start, stop in held for block in range(start, stop)}
        modules = [name for name in modules if int(name.split(".")[2]) in blocks]
    modules = [name for name in modules if int(name.split(".")[2]) not in full_blocks(recipe, layers)]
    schedule = schedule_of(recipe.train.schedule, recipe.train.steps)
    return Assembly(recipe, rows, base, modules, role_bounds(recipe, layers), schedule).build()
