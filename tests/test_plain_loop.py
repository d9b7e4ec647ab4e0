"""The one-tier run of a recipe equals a training loop of transformers and PEFT that knows nothing of this project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from splitllm import load_recipe, train
from tests.families import checkpoint_folder

STEPS, RATE, CLIP = 6, 5e-3, 0.7
ROWS = [
    ("the cat sat on", " the mat"),
    ("a dog ran to the", " old red house by the river"),
    ("the river", " is long and cold"),
    ("an old house on the hill", " fell"),
    ("the red", " cat ran"),
]


def write_tokenizer(folder: Path) -> Path:
    words = sorted({word for row in ROWS for text in row for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


def write_recipe(tmp_path: Path, family: str, dtype: str) -> Path:
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in ROWS]
    data.write_text("\n".join(lines) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
model: {{base: {checkpoint_folder(family)}, tokenizer: {write_tokenizer(tmp_path / "tokenizer")}, dtype: {dtype}}}
split: {{tiers: {{client: 1}}, labels: client}}
lora: {{rank: 4, alpha: 8}}
data: {{source: {data}, eval: {data}, format: prompt_completion, max_length: 32}}
train:
  steps: {STEPS}
  batch_size: {len(ROWS)}
  threads: 1
  clip_norm: {CLIP}
  optimizer: {{lr: {RATE}, weight_decay: 0.01}}
  schedule: {{name: linear, warmup_steps: 2}}
""")
    return recipe


def plain_batch(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows, labels = [], []
    for prompt, completion in ROWS:
        head, tail = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(head + tail)
        labels.append([-100] * len(head) + tail)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([row + [-100] * (longest - len(row)) for row in labels])


def mean_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The model's own loss; transformers takes it in fp32 even in fp64, so there it is taken from the logits."""
    output = model(input_ids=ids, labels=labels)
    if output.logits.dtype == torch.float32:
        loss: torch.Tensor = output.loss
        return loss
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def plain_losses(folder: Path, tokenizer_folder: Path, start: Path, dtype: torch.dtype) -> list[float]:
    """Loss of every step; the start of the adapter is read from a file."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "q_proj", "v_proj"]))
    model.load_adapter(str(start), "default", is_trainable=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    ids, labels = plain_batch(AutoTokenizer.from_pretrained(tokenizer_folder))
    losses = []
    for _ in range(STEPS):
        loss = mean_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 2e-6)])
def test_losses_equal_those_of_a_plain_loop(family: str, dtype: str, tolerance: float, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, family, dtype)
    start = tmp_path / "start"
    train(load_recipe(path, ["train.steps=1", "train.schedule.warmup_steps=1"]), start)  # a first step at rate 0
    train(load_recipe(path), tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [event["loss"] for event in events if event["event"] == "train"]
    theirs = plain_losses(checkpoint_folder(family), tmp_path / "tokenizer", start / "adapter", getattr(torch, dtype))
    assert theirs[-1] < theirs[0]
    assert ours == pytest.approx(theirs, rel=tolerance)


def test_mixed_precision_follows_full_precision(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "llama", "float32")
    full = train(load_recipe(path), tmp_path / "full")
    mixed = train(load_recipe(path, ["train.mixed_precision=bf16"]), tmp_path / "mixed")
    assert mixed["eval_loss_after"] == pytest.approx(full["eval_loss_after"], rel=5e-3)
    assert mixed["eval_loss_after"] != full["eval_loss_after"]
