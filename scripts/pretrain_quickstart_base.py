"""Pretrain the small GPT-2-architecture base of the quickstart, tokenizer included.

    python scripts/pretrain_quickstart_base.py --output recipes/quickstart-base --minutes 35

The text is of the same kind as the quickstart's (signatures and docstrings of Python code) but from other hands:
permissively licensed packages that happen to be installed, read with `ast` and never imported. Whole docstrings run on
one behind the other, so the quickstart still has its form (one sentence, then the end) and its packages to teach. A
docstring that contains a target of the quickstart is dropped. `scripts/check_quickstart_base.py` judges the result.
"""

from __future__ import annotations

import argparse
import math
import re
import sysconfig
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from splitllm.data.stdlib import normalised, signatures, stdlib_docstrings

LICENCES = {
    "Apache-2.0": "absl accelerate datasets grpc huggingface_hub peft pyarrow safetensors sortedcontainers "
    "tensorboard tokenizers transformers",
    "BSD": "click dateutil fsspec google grimp httpx2 httpcore2 idna importlinter jinja2 markdown markupsafe mpmath "
    "networkx numpy pandas psutil pygments sympy torch werkzeug",
    "BSD or Apache-2.0": "packaging",
    "MIT": "_pytest annotated_types anyio execnet h11 markdown_it mypy pip pluggy pydantic pydantic_core pytest rich "
    "setuptools truststore typer xdist yaml",
    "MIT-CMU": "PIL",
}
"""Packages to read, by licence. Copies of standard library modules (multiprocess, typing_extensions) are not here."""

SKIPPED = frozenset({"__pycache__", "_distutils", "_vendor", "tests", "test", "testing"})
END = "<|endoftext|>"
VOCABULARY, CONTEXT, BATCH = 2048, 256, 8
MATRIX_LR, OTHER_LR, FLOOR, WARMUP = 1e-2, 1e-2, 0.02, 0.01
LONGEST_DOCSTRING = 400
SHAPE = {"n_layer": 6, "n_embd": 144, "n_head": 4, "n_positions": CONTEXT, "activation_function": "gelu_pytorch_tanh"}
DROPOUTS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def documents() -> Iterator[tuple[str, str]]:
    """(package, text) of every module that has something to give."""
    rows = stdlib_docstrings()
    targets = {normalised(row["completion"]) for row in [*rows.train, *rows.eval]}
    site, seen = Path(sysconfig.get_path("purelib")), set[str]()
    for package in sorted(" ".join(LICENCES.values()).split()):
        for path in sorted([site / f"{package}.py", *(site / package).rglob("*.py")]):
            inside = path.relative_to(site)
            if not path.is_file() or SKIPPED.intersection(inside.parts):
                continue
            entries = list(module_entries(path.read_bytes(), targets, seen))
            if entries:
                yield package, f"# {'.'.join(inside.with_suffix('').parts)}\n" + "".join(entries)


def module_entries(source: bytes, targets: set[str], seen: set[str]) -> Iterator[str]:
    """Signature and docstring of all that the module documents, without repetitions or the quickstart's targets."""
    for signature, docstring in signatures(source):
        text = prose(docstring)
        key = normalised(text)
        sentences = {normalised(part) for part in re.split(r"(?<=[.!?])\s+|\n\n", text)}
        if key and key not in seen and not sentences & targets and len(signature) < 160:
            seen.add(key)
            body = text.replace("\n", "\n    ").replace("\n    \n", "\n\n")
            closing = '"""' if "\n" not in text else '\n    """'
            yield f"{signature}{body}{closing}\n\n"


def prose(docstring: str) -> str:
    """The docstring's first paragraphs without doctests, tables and formulas."""
    kept: list[str] = []
    for paragraph in docstring.strip().split("\n\n"):
        letters = sum(character.isalpha() or character.isspace() for character in paragraph)
        if ">>>" in paragraph or letters < 0.8 * len(paragraph):
            continue
        if sum(map(len, kept)) + len(paragraph) > LONGEST_DOCSTRING:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly `VOCABULARY` entries, the first of which ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def token_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> torch.Tensor:
    """All texts in random order, each behind an end token, as rows of `CONTEXT` tokens."""
    encoded = tokenizer(texts)["input_ids"]
    order = torch.randperm(len(texts), generator=generator).tolist()
    flat = torch.tensor([token for index in order for token in [tokenizer.eos_token_id, *encoded[index]]])
    return flat[: len(flat) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def share_of_peak(done: float) -> float:
    """Learning rate: linear warm-up, then a cosine down to `FLOOR`; `done` is the share of the time that is used."""
    if done < WARMUP:
        return max(done, 1e-3) / WARMUP
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimizers_of(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (after 400,000 tokens 4.45, and 5.43 with AdamW alone), AdamW for all else."""
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and ".h." in name]
    others = [parameter for name, parameter in named if parameter.ndim != 2 or ".h." not in name]
    muon = torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def train_step(model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer], batch_BS: torch.Tensor) -> float:
    """One step on all tokens of the batch; returns its loss."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=batch_BS, labels=batch_BS, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def pretrain(
    model: GPT2LMHeadModel, rows: torch.Tensor, minutes: float, generator: torch.Generator
) -> Iterator[tuple[float, int, float]]:
    """Train for so many minutes; yields (share of the time used, step, loss) at every step."""
    optimizers, start, step, order = optimizers_of(model), time.monotonic(), 0, torch.empty(0, dtype=torch.int64)
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        if len(order) < BATCH:
            order = torch.randperm(len(rows), generator=generator)
        batch_BS, order = rows[order[:BATCH]], order[BATCH:]
        for group, peak in peaks:
            group["lr"] = peak * share_of_peak(done)
        yield done, step, train_step(model, optimizers, batch_BS)
        step += 1


def save(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write the weights as bfloat16, leaving the model as it is."""
    copy = GPT2LMHeadModel(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Harvest, train the tokenizer, train the model, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=35.0)
    options = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    named = list(documents())
    texts = [text for _, text in named]
    sizes = Counter[str]()
    for package, text in named:
        sizes[package] += len(text)
    print(f"{sum(sizes.values()):,} characters: " + ", ".join(f"{name} {size:,}" for name, size in sizes.most_common()))
    tokenizer = train_tokenizer(texts)
    rows = token_stream(texts, tokenizer, generator)
    end = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **SHAPE, **DROPOUTS)
    model = GPT2LMHeadModel(config)
    print(f"{rows.numel():,} tokens, {model.num_parameters():,} parameters", flush=True)
    tokenizer.save_pretrained(options.output)
    held_back, rows = rows[:64], rows[64:]
    recent = deque[float](maxlen=200)
    for done, step, loss in pretrain(model, rows, options.minutes, generator):
        recent.append(loss)
        if step % 200 == 0:
            mean = sum(recent) / len(recent)
            print(f"{done:6.1%}  step {step}  {step * BATCH * CONTEXT:,} tokens  loss {mean:.3f}", flush=True)
            save(model, options.output)
    save(model, options.output)
    with torch.no_grad():
        loss = model(input_ids=held_back, labels=held_back).loss
    print(f"training loss at the end {sum(recent) / len(recent):.4f}, on rows held back {loss:.4f}")


if __name__ == "__main__":
    main()
