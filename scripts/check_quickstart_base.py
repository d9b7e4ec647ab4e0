"""Judge the quickstart's base with plain transformers and PEFT (none of splitllm's training code).

    python scripts/check_quickstart_base.py --base recipes/quickstart-base --steps 200

It prints the held-out loss, a mean over the tokens of the completions and their end tokens, of: the base as it is; the
same architecture trained from scratch, all its parameters, on the recipe's rows for the recipe's steps (best of several
learning rates); and the base after LoRA fine-tuning on them. The base must beat the second, and the third must be
at least 15 % below the first.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, get_scheduler

from splitllm.data.stdlib import stdlib_docstrings

Row = tuple[list[int], int]
"""Token ids of prompt, completion and end token, and the length of the prompt."""


def encode(rows: list[dict[str, str]], tokenizer: AutoTokenizer, max_length: int) -> list[Row]:
    """Tokenise and cut at `max_length`; rows without a completion token left are dropped."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows])["input_ids"]
    pairs = zip(prompts, completions, strict=True)
    encoded = [((prompt + rest + [tokenizer.eos_token_id])[:max_length], len(prompt)) for prompt, rest in pairs]
    return [(ids, start) for ids, start in encoded if len(ids) > start]


def summed_loss(model: PreTrainedModel, rows: list[Row]) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the completions' tokens, and how many these are."""
    longest = max(len(ids) for ids, _ in rows)
    ids_BS = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels_BS = torch.tensor([[-100] * start + ids[start:] + [-100] * (longest - len(ids)) for ids, start in rows])
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits[:, :-1]
    labels_N = labels_BS[:, 1:].flatten()
    return cross_entropy(logits_BSV.flatten(0, 1), labels_N, reduction="sum"), int((labels_N >= 0).sum())


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: list[Row]) -> float:
    """Mean loss a completion token over all rows."""
    model.eval()
    rows = sorted(rows, key=lambda row: len(row[0]))
    parts = [summed_loss(model, rows[start : start + 32]) for start in range(0, len(rows), 32)]
    return float(sum(loss.item() for loss, _ in parts) / sum(count for _, count in parts))


def batches(rows: list[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Epoch after epoch, each in its own order."""
    generator = random.Random(seed)
    while True:
        order = generator.sample(rows, len(rows))
        yield from (order[start : start + size] for start in range(0, len(order) - size + 1, size))


def train(model: PreTrainedModel, rows: list[Row], lr: float, options: argparse.Namespace) -> float:
    """Train what requires a gradient for the recipe's steps; returns the seconds that this took."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    scheduler = get_scheduler(options.schedule, optimizer, options.warmup, options.steps)
    stream, start = batches(rows, options.rows, seed=0), time.monotonic()
    model.train()
    for _ in range(options.steps):
        loss, count = summed_loss(model, next(stream))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return time.monotonic() - start


def options_from_command_line() -> argparse.Namespace:
    """The defaults are those of `recipes/quickstart.yaml`, but for the schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("recipes/quickstart-base"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=32, help="rows of a step, all clients together")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--targets", default="c_attn,c_proj,c_fc", help="names joined by commas, or all-linear")
    parser.add_argument("--lr", type=float, nargs="*", default=[3e-3], help="learning rates to try with LoRA")
    parser.add_argument("--scratch-lr", type=float, nargs="*", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--schedule", default="cosine")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=0, help="print so many held-out completions")
    return parser.parse_args()


def lora_of(base: PreTrainedModel, options: argparse.Namespace) -> PreTrainedModel:
    """The base with an adapter as in the recipe."""
    targets = options.targets if options.targets == "all-linear" else options.targets.split(",")
    lora = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    return get_peft_model(base, lora)


def main() -> None:
    """Measure base, from scratch, and LoRA."""
    options = options_from_command_line()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    corpus = stdlib_docstrings()
    train_rows, eval_rows = (encode(rows, tokenizer, options.max_length) for rows in (corpus.train, corpus.eval))
    tokens = sum(len(ids) for ids, _ in train_rows) / len(train_rows)
    print(f"{len(train_rows)} training rows of {tokens:.1f} tokens on average, {len(eval_rows)} held out")
    before = held_out_loss(AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32), eval_rows)
    print(f"base before fine-tuning           {before:.4f}", flush=True)
    for lr in options.scratch_lr:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.base), dtype=torch.float32)
        seconds = train(model, train_rows, lr, options)
        print(f"from scratch, lr {lr:<8g}         {held_out_loss(model, eval_rows):.4f}  ({seconds:.0f} s)", flush=True)
    for lr in options.lr:
        torch.manual_seed(0)
        model = lora_of(AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32), options)
        seconds = train(model, train_rows, lr, options)
        after = held_out_loss(model, eval_rows)
        print(
            f"base after LoRA, lr {lr:<8g}      {after:.4f}  {after / before - 1:+.1%}  ({seconds:.0f} s)", flush=True
        )
    for row in corpus.eval[:: len(corpus.eval) // options.samples] if options.samples else []:
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        print(row["prompt"] + tokenizer.decode(written[0, prompt["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main()
