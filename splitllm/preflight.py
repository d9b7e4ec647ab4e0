"""Everything that can be wrong with a run, found before anything is loaded or written, and all of it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer, PreTrainedConfig

from splitllm.data import Corpus, load_corpus
from splitllm.errors import CheckpointError, RecipeError, SplitLLMError
from splitllm.model.export import load_adapter
from splitllm.model.families import layout_of
from splitllm.model.loading import load_config, quiet_transformers
from splitllm.model.lora import block_of, matched_modules
from splitllm.model.proof import admit
from splitllm.recipe import Recipe, what_leaves_the_device

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a run needs to know before weights are loaded.

    Attributes:
        recipe: the resolved recipe.
        config: of the text model.
        corpus: every client's examples.
        modules: global names of the modules that LoRA adapts, on the tiers that train.
        every_module_trains: whether those are all that the targets match.
    """

    recipe: Recipe
    config: PreTrainedConfig
    corpus: Corpus
    modules: tuple[str, ...]
    every_module_trains: bool

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First block and block after the last of every tier, bottom up."""
        return tier_bounds(self.recipe, self.config.num_hidden_layers)


@dataclass
class _Problems:
    """Collects the complaints of checks that do not depend on one another."""

    lines: list[str] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        try:
            yield
        except SplitLLMError as error:
            self.lines += [line for line in str(error).splitlines() if line not in self.lines]

    def attempt(self, check: Callable[[], T]) -> T | None:
        with self.collecting():
            return check()
        return None


def prepare(recipe: Recipe) -> Plan:
    """Check a recipe against its model, tokenizer and data.

    Raises:
        RecipeError: with every problem found.
    """
    problems = _Problems()
    config = problems.attempt(lambda: model_config(recipe))
    modules: list[str] | None = None
    if config is not None:
        admitted = problems.attempt(lambda: admit(config, recipe.model.attention, packed=recipe.data.pack) or True)
        problems.lines += _cut_problems(recipe, config)
        if admitted:
            modules = problems.attempt(lambda: matched_modules(config, _targets(recipe)))
        if recipe.lora.start_from is not None:
            problems.attempt(lambda: _start_fits(recipe, config))
    problems.lines += _process_problems(recipe)
    tokenizer = problems.attempt(lambda: load_tokenizer(recipe))
    if tokenizer is not None and config is not None:
        problems.lines += _vocabulary_problems(tokenizer, config, recipe)
    corpus = problems.attempt(lambda: _corpus(recipe, tokenizer)) if tokenizer is not None else None
    if problems.lines or config is None or modules is None or corpus is None:
        raise RecipeError(problems.lines)
    trained = [name for name in modules if _tier_trains(recipe, config, name)]
    if not trained:
        raise RecipeError([f"lora.tiers: {list(recipe.lora.tiers or ())} hold no module that lora.targets matches"])
    return Plan(recipe, config, corpus, tuple(trained), len(trained) == len(modules))


def check(recipe: Recipe) -> list[str]:
    """Every problem of a recipe, one line each; none if it can run."""
    try:
        prepare(recipe)
    except RecipeError as error:
        return error.problems
    return []


def describe(recipe: Recipe) -> list[str]:
    """What a recipe will do, for `splitllm validate`."""
    plan = prepare(recipe)
    tiers = [
        f"  {name} x{count}: blocks {start}..{stop - 1}" + (" (trains)" if _trains(recipe, name) else " (frozen)")
        for (name, count), (start, stop) in zip(recipe.split.tiers.items(), plan.bounds, strict=True)
    ]
    shares = [
        f"  {share.client}: {share.examples} rows, {share.tokens} tokens, {share.labels} labels"
        + (f" ({', '.join(share.groups)})" if share.groups else "")
        for share in plan.corpus.shares
    ]
    held_out = sum(len(part) for part in plan.corpus.eval)
    return [
        f"model: {recipe.model.base} ({plan.config.model_type}, {plan.config.num_hidden_layers} blocks)",
        *tiers,
        f"LoRA: rank {recipe.lora.rank} on {len(plan.modules)} modules",
        "data:",
        *shares,
        f"  held out: {held_out} rows",
        f"leaves the device: {what_leaves_the_device(recipe)}",
        "the recipe is valid",
    ]


def model_config(recipe: Recipe) -> PreTrainedConfig:
    """The text model's configuration with the overrides of `model.random`.

    Raises:
        CheckpointError: it cannot be read, or an override names no setting of it.
    """
    config = load_config(recipe.model.base, recipe.model.revision)
    for key, value in (recipe.model.random or {}).items():
        if not hasattr(config, key):
            raise CheckpointError(f"model.random.{key}: {config.model_type} has no such setting")
        setattr(config, key, value)
    return config


def load_tokenizer(recipe: Recipe) -> Any:
    """The recipe's tokenizer.

    Raises:
        CheckpointError: there is none to be read.
    """
    name = recipe.model.tokenizer or recipe.model.base
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(name, revision=recipe.model.revision)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"model.tokenizer: cannot read a tokenizer from {name}: {first}") from error


def tier_bounds(recipe: Recipe, layers: int) -> list[tuple[int, int]]:
    """First block and block after the last of every tier, bottom up."""
    edges = [0, *recipe.split.cuts, layers]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _targets(recipe: Recipe) -> str | list[str] | None:
    targets = recipe.lora.targets
    return list(targets) if isinstance(targets, tuple) else targets


def _trains(recipe: Recipe, tier: str) -> bool:
    return recipe.lora.tiers is None or tier in recipe.lora.tiers


def _tier_trains(recipe: Recipe, config: PreTrainedConfig, module: str) -> bool:
    block, bounds = block_of(config, module), tier_bounds(recipe, config.num_hidden_layers)
    names = list(recipe.split.tiers)
    return any(_trains(recipe, name) for name, (start, stop) in zip(names, bounds, strict=True) if start <= block < stop)


def _cut_problems(recipe: Recipe, config: PreTrainedConfig) -> list[str]:
    layers = config.num_hidden_layers
    beyond = [cut for cut in recipe.split.cuts if not 1 <= cut <= layers]
    return [
        f"split.cuts: {cut} is not a place to cut {config.model_type}, which has {layers} blocks: use 1 to {layers}"
        for cut in beyond
    ]


def _process_problems(recipe: Recipe) -> list[str]:
    counts, processes = list(recipe.split.tiers.values()), recipe.train.processes
    spread = counts[-2] if len(counts) > 1 else counts[0]
    if processes <= spread:
        return []
    names = list(recipe.split.tiers)
    name = names[-2] if len(names) > 1 else names[0]
    return [f"train.processes: {processes} cannot share {spread} {name}: use at most {spread}"]


def _vocabulary_problems(tokenizer: Any, config: PreTrainedConfig, recipe: Recipe) -> list[str]:
    found = []
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        found.append(
            f"model.tokenizer: its largest token id is {largest}, but the model has {config.vocab_size} embeddings: "
            "it belongs to another model"
        )
    places = getattr(config, "max_position_embeddings", None)
    if layout_of_positions(config) and places and recipe.data.max_length > places:
        found.append(f"data.max_length: {recipe.data.max_length} is more than the model's {places} positions")
    return found


def layout_of_positions(config: PreTrainedConfig) -> bool:
    """Whether the family has a learned position table, which limits the length of rows."""
    try:
        return layout_of(config).positions is not None
    except SplitLLMError:
        return False


def _corpus(recipe: Recipe, tokenizer: Any) -> Corpus:
    clients = next(iter(recipe.split.tiers.values()))
    return load_corpus(recipe.data, tokenizer, clients=clients, batch_size=recipe.train.batch_size, seed=recipe.seed)


def _start_fits(recipe: Recipe, config: PreTrainedConfig) -> None:
    """The recipe must say what the adapter it starts from says."""
    lora = recipe.lora
    peft_config, tensors = load_adapter(Path(str(lora.start_from)))
    pairs = {
        "rank": (lora.rank, peft_config.r),
        "alpha": (lora.alpha, peft_config.lora_alpha),
        "rslora": (lora.rslora, peft_config.use_rslora),
        "dora": (lora.dora, peft_config.use_dora),
    }
    wrong = [
        f"lora.{key}: {ours} here, {theirs} in {lora.start_from}; set lora.{key}={str(theirs).lower()}"
        for key, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    matched = set(matched_modules(config, _targets(recipe)))
    stored = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors}
    if stored != {name for name in matched if _tier_trains(recipe, config, name)}:
        wrong.append(f"lora.targets: {lora.start_from} adapts other modules than this recipe: {_sample(stored, matched)}")
    if wrong:
        raise RecipeError(wrong)


def _sample(stored: set[str], matched: set[str]) -> str:
    more, less = sorted(stored - matched)[:2], sorted(matched - stored)[:2]
    return "; ".join(
        part for part in (f"only in the adapter {more}" if more else "", f"only in the recipe {less}" if less else "") if part
    )
