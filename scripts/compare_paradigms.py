"""Centralised, federated, split and hierarchical fine-tuning: the same recipe with other cuts, over ranks.

    python scripts/compare_paradigms.py                       # the whole grid, about 45 minutes on one core
    python scripts/compare_paradigms.py --quick               # a small one, to see that all of it runs
    python scripts/compare_paradigms.py --page docs/benchmarks/paradigms.md     # into the page, with its figure

Real text on the pretrained stories260K: E2E with each restaurant's rows on one client, and tinyshakespeare with each
speaker's on one. Every paradigm takes the same steps of as many rows, with the same learning rates to choose from: all
with the first seed (and twice the largest while that is the best), the best of them with the others. A run that is in
the output folder with the same recipe is not run again, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from chart import Panel, Point, write_chart
from pages import bullets, machine, table, write_page
from safetensors import safe_open

from splitllm.metrics import read_records
from splitllm.recipe import Recipe, changed_keys, load_recipe, tier_bounds
from splitllm.train import train

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "compare"
PACKAGES = ("torch", "transformers", "peft")
RATES = (8.0e-3, 1.6e-2, 3.2e-2)
RANKS = (1, 2, 4, 8)
SEEDS = (0, 1, 2)
ROWS, HELD_OUT = 2000, 150
EVERY = 10  # of a speaker's speeches every tenth is held out
ELSEWHERE = ("data.source:", "data.eval:")  # where rows lie is no part of what a run is
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "federated, rounds after every step": ("federated", {"rounds.cloud_every": 1}),
    "federated, one round, at the end": ("federated", {"rounds.cloud_every": 80}),
    "federated, fedex": ("federated", {"rounds.rule": "fedex"}),
    "federated, rows dealt at random": ("federated", {"data.partition": {"by": "iid"}}),
    "hierarchical, cloud after 10 steps, too": ("hierarchical", {"rounds.cloud_every": 10}),
    "split, one adapter for all": ("split", {"rounds": {}}),
    "federated, rounds after every step, moments averaged": (
        "federated",
        {"rounds.cloud_every": 1, "rounds.moments": "average"},
    ),
    "centralised, clipped at 1": ("centralised", {"train.clip_norm": 1.0}),
    "federated, clipped at 1": ("federated", {"train.clip_norm": 1.0}),
}
"""What the explanation is tested by: another value of one key, at the paradigm's best rate with rank 4."""
VARIED_RANK = 4


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    data: str
    paradigm: str
    rank: int
    rate: float
    seed: int
    variant: str = ""

    @property
    def name(self) -> str:
        end = f"-{self.variant.replace(', ', '-').replace(' ', '-')}" if self.variant else ""
        return f"{self.data}/{self.paradigm}-r{self.rank}-lr{self.rate:g}-seed{self.seed}{end}"


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        loss: held out, in nats a token.
        numbers: that one client trains.
        up: bytes over all cuts.
        down: the same downwards.
        error: of the averages of its rounds, as a share of the exact ones, the mean over rounds; 0 without.
    """

    loss: float
    numbers: int
    up: int
    down: int
    error: float = 0.0


def e2e_rows(shared: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    def rows(file: str) -> list[dict[str, str]]:
        with gzip.open(shared / "e2e" / file, "rt", encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        return [{**row, "owner": row["prompt"].split(" | ")[0].removeprefix("name : ")} for row in found]

    return rows("train.jsonl.gz"), rows("valid.jsonl.gz")


def shakespeare_rows(shared: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    speakers = json.loads((shared / "tinyshakespeare" / "by_speaker_min1000.json").read_text(encoding="utf-8"))
    rows = [
        (number % EVERY == 0, {"text": f"{speaker}:\n{speech}", "owner": speaker})
        for speaker, speeches in speakers.items()
        for number, speech in enumerate(speeches, 1)
    ]
    return [row for held, row in rows if not held], [row for held, row in rows if held]


DATA: dict[str, tuple[str, Callable[[Path], Any], dict[str, Any]]] = {
    "e2e": ("E2E by restaurant", e2e_rows, {}),
    "tinyshakespeare": ("tinyshakespeare by speaker", shakespeare_rows, {"format": "text", "max_length": 64}),
}
"""Title, rows to train on and rows held out, and what of the recipe's `data` is another."""


def write_rows(shared: Path, folder: Path, name: str) -> dict[str, Any]:
    """Rows drawn by a fixed seed into a folder, none of them in both files; returns the overrides that name them."""
    source, held_out = ([json.dumps(row) for row in rows] for rows in DATA[name][1](shared))
    known = set(source)
    paths = {}
    for key, rows, count in (("source", source, ROWS), ("eval", [r for r in held_out if r not in known], HELD_OUT)):
        paths[key] = folder / f"{name}-{key}.jsonl"
        paths[key].write_text("\n".join(random.Random(0).sample(rows, count)), encoding="utf-8")
    own = {f"data.{key}": value for key, value in DATA[name][2].items()}
    return {f"data.{key}": str(path) for key, path in paths.items()} | own


def paradigms() -> dict[str, dict[str, Any]]:
    """Name -> what it lays over base.yaml."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((RECIPES / "paradigms.yaml").read_text(encoding="utf-8"))
    return found


def recipe_of(cell: Cell, data: Mapping[str, Any], stories: Path, train_keys: Mapping[str, Any]) -> Recipe:
    """base.yaml, its rows, the paradigm, and what is another in a variant, in this order."""
    by_owner = {"data.partition": {"by": "field", "field": "owner"}, "model.base": str(stories)}
    grid = {"lora.rank": cell.rank, "train.optimizer.lr": cell.rate, "seed": cell.seed, **train_keys}
    other = VARIANTS[cell.variant][1] if cell.variant else {}
    laid = {**by_owner, **data, **paradigms()[cell.paradigm], **grid, **other}
    return load_recipe(RECIPES / "base.yaml", [f"{key}={json.dumps(value)}" for key, value in laid.items()])


def is_done(recipe: Recipe, folder: Path) -> bool:
    """Whether a run of this recipe has ended there."""
    if not (folder / "summary.json").exists():
        return False
    return all(line.startswith(ELSEWHERE) for line in changed_keys(load_recipe(folder / "recipe.yaml"), recipe))


def outcome(recipe: Recipe, folder: Path) -> Outcome:
    """The run of a recipe: of one that is in the folder what it gave, else it is run now."""
    if not is_done(recipe, folder):
        shutil.rmtree(folder, ignore_errors=True)
        train(recipe, folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    traffic = summary["wire_bytes_up"], summary["wire_bytes_down"]
    errors = [record["error"] for record in read_records(folder / "metrics.jsonl") if record["event"] == "round"]
    error = statistics.mean(errors) if errors else 0.0
    return Outcome(summary["eval_loss_after"], client_numbers(recipe, folder), *traffic, error)


def client_numbers(recipe: Recipe, folder: Path) -> int:
    """How many numbers one client trains: those of the adapter in the blocks below the first cut."""
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    blocks = {int(name.partition(".layers.")[2].partition(".")[0]) for name in shapes}
    _, stop = tier_bounds(recipe, max(blocks) + 1)[0]
    mine = (shape for name, shape in shapes.items() if int(name.partition(".layers.")[2].partition(".")[0]) < stop)
    return sum(rows * columns for rows, columns in mine)


Run = Callable[[Cell], Outcome]


def choose(run: Run, options: argparse.Namespace, data: str, paradigm: str, rank: int) -> dict[str, Any]:
    """All rates with the first seed, twice the largest while that is the best; the best of them with the others."""
    first, *others = options.seeds
    by_rate = {rate: run(Cell(data, paradigm, rank, rate, first)) for rate in options.rates}
    best = min(by_rate, key=lambda rate: by_rate[rate].loss)
    while len(by_rate) > 1 and best == max(by_rate):
        by_rate[2 * best] = run(Cell(data, paradigm, rank, 2 * best, first))
        best = min(by_rate, key=lambda rate: by_rate[rate].loss)
    runs = [by_rate[best], *(run(Cell(data, paradigm, rank, best, seed)) for seed in others)]
    rates = {f"{rate:g}": found.loss for rate, found in by_rate.items()}
    return {"data": data, "paradigm": paradigm, "rank": rank, "rate": best, "rates": rates, **summed(runs)}


def vary(run: Run, options: argparse.Namespace, found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every variant at the best rate of its paradigm, with all seeds, beside its paradigm as it is."""
    for data, variant in product(options.varied, options.variants):
        paradigm = VARIANTS[variant][0]
        where = (data, paradigm, VARIED_RANK)
        plain = next((each for each in found if (each["data"], each["paradigm"], each["rank"]) == where), None)
        if plain is not None:
            cells = [Cell(*where, plain["rate"], seed, variant) for seed in options.seeds]
            yield {"data": data, "variant": variant, "plain": plain["losses"], **summed([run(cell) for cell in cells])}


def summed(runs: Sequence[Outcome]) -> dict[str, Any]:
    """The losses of all seeds, what is the same with each, and the mean of what is not."""
    means = {key: statistics.mean(getattr(one, key) for one in runs) for key in ("up", "down", "error")}
    return {"losses": [one.loss for one in runs], "numbers": runs[0].numbers, **means}


def measure(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    grid = product(options.data, options.ranks, paradigms())
    found = [choose(run, options, data, paradigm, rank) for data, rank, paradigm in grid]
    return {"results": found, "variants": list(vary(run, options, found))}


def runner(options: argparse.Namespace, rows: Mapping[str, Mapping[str, Any]]) -> Run:
    """What runs a cell, or finds that it has been run, and tells of it."""
    stories = options.shared / "stories260K"
    train_keys: dict[str, Any] = {} if options.steps is None else {"train.steps": options.steps}

    def run(cell: Cell) -> Outcome:
        found = outcome(recipe_of(cell, rows[cell.data], stories, train_keys), options.output / cell.name)
        print(f"{cell.name}: {found.loss:.4f}", flush=True)
        return found

    return run


def spread(losses: Sequence[float]) -> str:
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses) if len(losses) > 1 else 0.0:.4f}"


def size(count: float) -> str:
    return f"{count / 1e6:.2f}" if count else "0"


def result_table(results: Sequence[Mapping[str, Any]], data: str) -> list[str]:
    columns = ["#rank", "paradigm", "#held-out loss", "#over centralised", "#best rate"]
    rows = []
    for each in (r for r in results if r["data"] == data):
        same = [r for r in results if (r["data"], r["rank"]) == (data, each["rank"])]
        (central,) = (r["losses"] for r in same if r["paradigm"] == "centralised")
        over = statistics.mean(each["losses"]) / statistics.mean(central) - 1
        loss = f"**{spread(each['losses'])}**" if each == min(same, key=mean_loss) else spread(each["losses"])
        cells = [str(each["rank"]), each["paradigm"], loss, f"{over:+.2%}", f"{each['rate']:g}"]
        error = f"{each['error']:.1%}" if each["error"] else ""
        rows.append([*cells, error, f"{each['numbers']:,}", size(each["up"]), size(each["down"])])
    columns += ["#error of averages", "#numbers a client trains", "#MB up", "#MB down"]
    return table(columns, rows, DATA[data][0])


def mean_loss(result: Mapping[str, Any]) -> float:
    return float(statistics.mean(result["losses"]))


def rate_table(results: Sequence[Mapping[str, Any]], data: str) -> list[str]:
    mine = [each for each in results if each["data"] == data]
    rates = sorted({rate for each in mine for rate in each["rates"]}, key=float)
    rows = []
    for each in mine:
        cells = (f"{each['rates'][rate]:.4f}" if rate in each["rates"] else "" for rate in rates)
        rows.append([str(each["rank"]), each["paradigm"], *cells])
    return table(["#rank", "paradigm", *(f"#{rate}" for rate in rates)], rows, f"First seed by rate, {DATA[data][0]}")


def variant_table(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """Differences are taken seed by seed."""
    rows = []
    for each in variants:
        apart = [one / plain - 1 for one, plain in zip(each["losses"], each["plain"], strict=True)]
        worst = f"{min(apart):+.2%} to {max(apart):+.2%}"
        losses, error = [spread(each["plain"]), spread(each["losses"])], f"{each['error']:.1%}" if each["error"] else ""
        rows.append([each["data"], each["variant"], *losses, f"{statistics.mean(apart):+.2%}", worst, error])
    columns = ["data", "variant", "#as in the table", "#with it", "#difference", "#by seed", "#error of averages"]
    return table(columns, rows, f"One key changed, rank {VARIED_RANK}") if rows else []


def page(found: Mapping[str, Any], figure: str) -> list[str]:
    known = list(dict.fromkeys(each["data"] for each in found["results"]))
    lines = [*bullets(found["machine"]), "", f"![Held-out loss by rank and paradigm]({figure})"]
    for data in known:
        lines += result_table(found["results"], data)
    lines += variant_table(found["variants"])
    for data in known:
        lines += rate_table(found["results"], data)
    return lines


def panels(results: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """A panel for each data set; whiskers go from the least to the largest loss of the seeds."""
    lines: dict[str, dict[str, list[Point]]] = {}
    for r in results:
        point = Point(str(r["rank"]), mean_loss(r), min(r["losses"]), max(r["losses"]))
        lines.setdefault(r["data"], {}).setdefault(r["paradigm"], []).append(point)
    return [Panel(DATA[data][0], each, "rank of LoRA", "held-out loss") for data, each in lines.items()]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data", help="folder with the data")
    parser.add_argument("--output", type=Path, default=Path("out/compare"), help="folder of the runs")
    parser.add_argument("--page", type=Path, help="its marked part is replaced; default: page.md in the output folder")
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, help="default: those of the recipe")
    parser.add_argument("--varied", nargs="*", choices=list(DATA), default=["e2e"], help="data of one key changed")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="ranks 1 and 4, one rate, one seed, 10 steps")
    options = parser.parse_args()
    if options.quick:
        options.ranks, options.rates, options.seeds = [1, 4], [RATES[1]], [0]
        options.steps, options.varied, options.output = 10, [], options.output / "quick"
    options.page = options.page or options.output / "page.md"
    return options


def main() -> None:
    options = parse()
    logging.disable(logging.INFO)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    about = machine(*PACKAGES) | {"torch threads": "1"}
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        rows = {name: write_rows(options.shared, Path(folder), name) for name in options.data}
        found = {"machine": about, **measure(options, runner(options, rows))}
    figure = options.page.with_suffix(".svg")
    write_page(options.page, "compare_paradigms.py", page(found, figure.name), found)
    write_chart(figure, panels(found["results"]))
    print("\n".join(page(found, figure.name)))


if __name__ == "__main__":
    main()
