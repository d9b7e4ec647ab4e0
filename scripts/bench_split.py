"""What the split costs and what its head saves: training speed on GPT-2 small with E2E rows.

    python scripts/bench_split.py --output docs/benchmarks/split.md

Three ratios of real tokens per second, each the median over pairs of measurements of the same micro-batches back to
back: (a) three tiers over our own unsplit run, (b) three tiers over plain transformers + PEFT, (c) three tiers over
plain transformers + PEFT with every row padded to 512, as SplitLoRA does. The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bases import draw_gpt2_small
from pages import bullets, machine, table, write_page
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from splitllm.data import BatchStream, Corpus, MicroBatch, load_corpus
from splitllm.errors import SplitLLMError
from splitllm.model.loading import Checkpoint, quiet_transformers
from splitllm.model.lora import matched_modules
from splitllm.preflight import load_tokenizer
from splitllm.recipe import Recipe, role_bounds
from splitllm.roles.adapters import DTYPES
from splitllm.roles.assembly import Assembly, schedule_of

RANK, ALPHA = 4, 32  # SplitLoRA's
RATE, BATCH = 2.0e-4, 8
SAME_LOSS = {"float32": 1e-5, "bfloat16": 2e-3}  # relative, of the first micro-batch, where every adapter still adds 0
PACKAGES = ("torch", "transformers", "peft")
COLUMNS = ["", "ours, 3 tiers /", "weights", "#ours", "#theirs", "#ratio", "range of pairs", "#bar", ""]

Train = Callable[[Sequence[int]], tuple[int, float]]
"""Trains on the micro-batches with these numbers; returns their real tokens and the first one's mean loss."""


@dataclass(frozen=True)
class Case:
    """One ratio: ours over a rival, its bar, and the most micro-batches a measurement."""

    name: str
    rival: str
    bar: float
    steps: int = 1000


CASES = (
    Case("a", "ours, 1 tier", 0.97),
    Case("b", "PEFT, same batches", 1.15),
    Case("c", "PEFT, padded", 12.0, steps=2),  # it is slow
)


@dataclass(frozen=True)
class Result:
    """Speeds are real tokens per second, medians; `ratios` has one entry a pair."""

    case: str
    rival: str
    dtype: str
    bar: float
    ratio: float
    ours: float
    theirs: float
    ratios: list[float]

    @property
    def reached(self) -> bool:
        return self.ratio >= self.bar


def recipe_of(options: argparse.Namespace, base: Path, dtype: str, tiers: int) -> Recipe:
    split = {"tiers": {"client": 1, "edge": 1, "cloud": 1}, "cuts": [3, 9], "labels": "cloud"}
    whole = {"tiers": {"client": 1}, "cuts": [], "labels": "client"}
    return Recipe.model_validate(
        {
            "model": {"base": str(base), "tokenizer": str(options.tokenizer), "dtype": dtype},
            "split": split if tiers == 3 else whole,
            "lora": {"rank": RANK, "alpha": ALPHA},
            "data": {"source": str(options.data / "train.jsonl.gz"), "eval_fraction": 0.01, "limit": options.rows},
            "train": {
                "batch_size": BATCH,
                "optimizer": {"lr": RATE, "weight_decay": 0.01},
                "schedule": {"name": "constant"},
                "clip_norm": None,
            },
        }
    )


def ours(recipe: Recipe, corpus: Corpus) -> Train:
    """The real roles in this process, tied together as `splitllm train` does it."""
    checkpoint = Checkpoint(recipe.model.base)
    modules = matched_modules(checkpoint.config, None)
    bounds = role_bounds(recipe, checkpoint.config.num_hidden_layers)
    roles = Assembly(recipe, corpus, checkpoint, modules, bounds, schedule_of(recipe.train.schedule, 1)).build()
    (client,) = roles.clients

    def train(numbers: Sequence[int]) -> tuple[int, float]:
        reports = [asyncio.run(client.step(number)) for number in numbers]
        return sum(report.tokens for report in reports), reports[0].loss / reports[0].labels

    return train


def peft(recipe: Recipe, corpus: Corpus, width: int | None) -> Train:
    """A plain training loop: forward with `labels`, which computes all logits; backward; AdamW."""
    base = AutoModelForCausalLM.from_pretrained(recipe.model.base, dtype=DTYPES[recipe.model.dtype])
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.01)
    stream = stream_of(corpus)

    def step(batch: MicroBatch) -> float:
        ids_BS, labels_BS = padded(batch, width)
        loss = model(input_ids=ids_BS, labels=labels_BS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def train(numbers: Sequence[int]) -> tuple[int, float]:
        batches = [stream.take(number) for number in numbers]
        losses = [step(batch) for batch in batches]
        return sum(batch.tokens for batch in batches), losses[0]

    return train


def padded(batch: MicroBatch, width: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [B, S] as transformers takes them (-100: nothing is predicted), S the longest row or `width`."""
    lengths = torch.tensor(batch.lengths)
    width = max(batch.lengths) if width is None else width
    ids_BS = torch.zeros(len(lengths), width, dtype=torch.int64)
    ids_BS[:, : batch.ids_BS.shape[1]] = batch.ids_BS
    labels_BS = torch.full_like(ids_BS, -100)
    real_BS = torch.arange(width) < lengths[:, None]
    rows_T, columns_T = real_BS.nonzero(as_tuple=True)
    labels_BS[rows_T[batch.positions_N], columns_T[batch.positions_N] + 1] = batch.targets_N
    return ids_BS, labels_BS


def stream_of(corpus: Corpus) -> BatchStream:
    """The micro-batches of client 0, as the role itself takes them."""
    return BatchStream(corpus.train[0], BATCH, 0, 0)


def mirrored(corpus: Corpus, pairs: int, count: int) -> list[list[int]]:
    """Numbers of micro-batches for each pair: `count` of them, every second one as far from the longest as the one
    before is from the shortest, so that each pair has the corpus's mean length (on which ratio (c) depends)."""
    stream = stream_of(corpus)
    numbers = sorted(range(stream.batches_per_epoch), key=lambda number: stream.take(number).tokens)
    drawn = random.Random(0).sample(range(len(numbers) // 2), pairs * count // 2)
    chosen = [number for place in drawn for number in (numbers[place], numbers[-1 - place])]
    return [chosen[start : start + count] for start in range(0, len(chosen), count)]


def speed(train: Train, numbers: Sequence[int]) -> float:
    started = time.perf_counter()
    tokens, _ = train(numbers)
    return tokens / (time.perf_counter() - started)


def compare(
    case: Case, dtype: str, mine: Train, theirs: Train, batches: Sequence[Sequence[int]], warm_up: int
) -> Result:
    """Pairs on the same micro-batches, the order within a pair alternating so that a drift of the machine cancels."""
    check_same_loss(case, dtype, mine, theirs)
    speeds: list[tuple[float, float]] = []
    for pair, numbers in enumerate(batches):
        if pair % 2:
            rival = speed(theirs, numbers)
            own = speed(mine, numbers)
        else:
            own = speed(mine, numbers)
            rival = speed(theirs, numbers)
        note = " (warm-up, dropped)" if pair < warm_up else ""
        print(f"  ({case.name}) {dtype} pair {pair}: {own:.1f} / {rival:.1f} = {own / rival:.3f}{note}", flush=True)
        speeds.append((own, rival))
    kept = speeds[warm_up:]
    ratios = [own / rival for own, rival in kept]
    own, rival = (statistics.median(column) for column in zip(*kept, strict=True))
    return Result(case.name, case.rival, dtype, case.bar, statistics.median(ratios), own, rival, ratios)


def check_same_loss(case: Case, dtype: str, mine: Train, theirs: Train) -> None:
    """Train both on micro-batch 0: equal work finds an equal loss, as long as neither has been trained before."""
    (_, own), (_, rival) = mine([0]), theirs([0])
    print(f"  ({case.name}) {dtype} first loss: {own:.6f} ours, {rival:.6f} {case.rival}", flush=True)
    if not abs(own - rival) <= SAME_LOSS[dtype] * abs(rival):
        sys.exit(f"error: unequal work: {case.rival} has loss {rival} on the micro-batch where ours has {own}")


def run_dtype(dtype: str, base: Path, options: argparse.Namespace) -> list[Result]:
    recipes = {tiers: recipe_of(options, base, dtype, tiers) for tiers in (1, 3)}
    corpus = load_corpus(recipes[3].data, load_tokenizer(recipes[3]), clients=1, batch_size=BATCH, seed=0)
    rivals: dict[str, Callable[[], Train]] = {
        "a": lambda: ours(recipes[1], corpus),
        "b": lambda: peft(recipes[1], corpus, None),
        "c": lambda: peft(recipes[1], corpus, options.width),
    }
    results = []
    for case in (case for case in CASES if case.name in options.cases):
        batches = mirrored(corpus, options.warm_up + options.pairs, min(options.steps, case.steps))
        mine, theirs = ours(recipes[3], corpus), rivals[case.name]()
        results.append(compare(case, dtype, mine, theirs, batches, options.warm_up))
    return results


def page(results: Sequence[Result], about: dict[str, str], options: argparse.Namespace) -> list[str]:
    """The table, and what the numbers depend on."""
    rows = []
    for r in results:
        spread = f"{min(r.ratios):.3f} to {max(r.ratios):.3f}"
        numbers = [f"{r.ours:.1f}", f"{r.theirs:.1f}", f"**{r.ratio:.3f}**", spread, f"{r.bar:g}"]
        rows.append([f"({r.case})", r.rival, r.dtype, *numbers, "reached" if r.reached else "MISSED"])
    what = (
        f"Real tokens per second, medians of {options.pairs} pairs; {options.steps} micro-batches of {BATCH} rows "
        f"a measurement, in (c) 2; (c) pads to {options.width}."
    )
    return [*table(COLUMNS, rows), "", what, "", *bullets(about)]


def options_from_command_line() -> argparse.Namespace:
    shared = Path("../shared/data")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=shared / "e2e", help="folder with train.jsonl.gz of E2E")
    parser.add_argument("--tokenizer", type=Path, default=shared / "gpt2-tokenizer", help="GPT-2's, with config.json")
    parser.add_argument("--output", type=Path, default=Path("out/bench/split.md"), help="Markdown; JSON goes beside it")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="pairs dropped before those")
    parser.add_argument("--steps", type=int, default=4, help="micro-batches a measurement (even), 2 in (c)")
    parser.add_argument("--rows", type=int, default=8000, help="of E2E, the first ones")
    parser.add_argument("--width", type=int, default=512, help="to which (c) pads")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(SAME_LOSS), default=list(SAME_LOSS))
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=[c.name for c in CASES])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-bars", action="store_true", help="exit with 0 even if a bar is missed")
    parser.add_argument("--quick", action="store_true", help="a try of the script: 1 pair of 2 micro-batches, no bars")
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.warm_up, options.steps, options.width, options.no_bars = 1, 0, 2, 128, True
    if options.steps < 2 or options.steps % 2:
        parser.error(f"--steps {options.steps}: give an even number, as micro-batches are taken by twos")
    for path in (options.data / "train.jsonl.gz", options.tokenizer / "config.json"):
        if not path.exists():
            parser.error(f"{path} is missing: name the folders with --data and --tokenizer")
    return options


def main() -> None:
    options = options_from_command_line()
    torch.set_num_threads(options.threads)
    about = machine(*PACKAGES) | {"torch threads": str(options.threads)}
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        base = draw_gpt2_small(options.tokenizer, Path(folder))
        results = [result for dtype in options.dtypes for result in run_dtype(dtype, base, options)]
    lines = page(results, about, options)
    print("\n".join(["", *lines]))
    figures = [{**asdict(r), "reached": r.reached} for r in results]
    write_page(options.output, "bench_split.py", lines, {"machine": about, "results": figures})
    if not options.no_bars and not all(result.reached for result in results):
        sys.exit("error: a bar was missed")


if __name__ == "__main__":
    try:
        main()
    except SplitLLMError as error:
        sys.exit(f"error: {error}")
