"""The base models that benchmarks draw at random."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

GPT2_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def draw_gpt2_small(tokenizer: Path, folder: Path) -> Path:
    """GPT-2 small with random weights, on which speed does not depend, and without dropout.

    Args:
        tokenizer: folder of GPT-2's, with `config.json`.
        folder: receives the checkpoint.
    """
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tokenizer, **GPT2_SMALL, **NO_DROPOUT)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
