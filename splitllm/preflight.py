"""Everything that can be wrong with a run, found before anything is loaded or written, and all of it at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedConfig

from splitllm.data import Corpus, load_corpus
from splitllm.data.sources import read_sources
from splitllm.engines.folders import unwritable
from splitllm.engines.zero import missing
from splitllm.errors import CheckpointError, RecipeError, SplitLLMError
from splitllm.model.export import load_adapter, tensor_shapes
from splitllm.model.families import dropouts, layout_of, set_dropouts
from splitllm.model.full import full_shapes
from splitllm.model.loading import Checkpoint, load_config, quiet_transformers
from splitllm.model.lora import block_of, matched_modules
from splitllm.model.machine import give_back
from splitllm.model.naming import in_text_model
from splitllm.model.proof import admit
from splitllm.plan import Plan
from splitllm.recipe import (
    LoraRecipe,
    Recipe,
    full_blocks,
    spreads_weights,
    tier_bounds,
)
from splitllm.roles.admission import problems as admission_problems
from splitllm.roles.per_rank import drops

T = TypeVar("T")
Shapes = dict[str, tuple[int, ...]]
NEUTRAL: dict[str, tuple[Any, ...]] = {  # PEFT's settings that change what an adapter computes, and a recipe has not
    "alpha_pattern": (None, {}),
    "rank_pattern": (None, {}),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian"),  # the others change the base as well
}


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


def prepare(
    recipe: Recipe,
    *,
    data: bool = True,
    client: int | None = None,
    tier: str | None = None,
    limits: bool = True,
    here: bool = False,
) -> Plan:
    """Check a recipe against its model, tokenizer and data.

    Args:
        recipe: what the user asks for.
        data: whether this machine has any; a server has none, and its plan an empty corpus.
        client: the only one whose rows are wanted.
        tier: the only one that is computed on this machine.
        limits: whether roles that take more than `split.memory_mib` gives them are refused.
        here: whether all tiers are computed on this machine, by this process.

    Raises:
        RecipeError: with every problem found.
    """
    problems = _Problems()
    config = problems.attempt(lambda: model_config(recipe))
    modules: list[str] | None = None
    layout = problems.attempt(lambda: layout_of(config)) if config is not None else None
    if config is not None and layout is not None:
        problems.lines += _cut_problems(recipe, config)
        problems.lines += _batching_problems(recipe, config) + _sharing_problems(recipe, config)
        shapes = problems.attempt(lambda: _admitted(config, recipe))
        if shapes is not None:
            problems.attempt(lambda: _check_tensors(recipe, shapes))
            modules = problems.attempt(lambda: matched_modules(config, _targets(recipe)))
        if shapes is not None and recipe.lora.start_from is not None:
            problems.attempt(lambda: _start_fits(recipe, config, shapes))
    problems.lines += _process_problems(recipe)
    problems.lines += _privacy_problems(recipe) if client is None else []
    problems.lines += _library_problems(recipe, tier) + _engine_problems(recipe, tier, here)
    lost = config is None and recipe.model.tokenizer is None  # that the base cannot be read was said already
    tokenizer = None if lost or not data else problems.attempt(lambda: load_tokenizer(recipe))
    if tokenizer is not None and config is not None and layout is not None:
        problems.lines += _vocabulary_problems(tokenizer, config, recipe)
    corpus = problems.attempt(lambda: _corpus(recipe, tokenizer, client)) if data else Corpus((), (), ())
    if problems.lines or config is None or modules is None or corpus is None:
        raise RecipeError(problems.lines)
    trained = [name for name in modules if _tier_trains(recipe, config, name)]
    if not trained:
        raise RecipeError([f"lora.tiers: {list(recipe.lora.tiers or ())} hold no module that lora.targets matches"])
    plan = Plan(recipe, config, corpus, tuple(trained), len(trained) == len(modules))
    if tier is not None or recipe.split.memory_mib:
        give_back()  # what the proof of the family took
    if lines := admission_problems(recipe, plan.admissions):
        raise RecipeError(lines)
    if limits:
        plan.refuse_beyond_limits()
    return plan


def model_config(recipe: Recipe) -> PreTrainedConfig:
    """The text model's configuration with the overrides of `model.random`.

    Raises:
        CheckpointError: it cannot be read, or an override names no setting of it.
    """
    config = load_config(recipe.model.base, recipe.model.revision)
    for key, value in (recipe.model.random or {}).items():
        if not hasattr(config, key):
            raise CheckpointError(f"model.random.{key}: {config.model_type} has no such setting")
        try:
            setattr(config, key, value)
        except (StrictDataclassError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise CheckpointError(f"model.random.{key}: {value!r} is no value for it ({reason})") from error
    if recipe.model.dropout is not None:
        set_dropouts(config, recipe.model.dropout)
    if getattr(config, "num_hidden_layers", 1) < 1:
        raise CheckpointError(f"model.base: its configuration has {config.num_hidden_layers} blocks: nothing to train")
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
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(f"model.tokenizer: cannot read a tokenizer from {name}: {reason}") from error


def _admitted(config: PreTrainedConfig, recipe: Recipe) -> Shapes:
    """The shapes of the model's tensors, if it can be built and cut: else nothing about its modules can be said."""
    shapes = tensor_shapes(config)
    admit(config, recipe.model.attention, packed=recipe.data.pack)
    return shapes


def _check_tensors(recipe: Recipe, shapes: Shapes) -> None:
    """Compare a local base with its configuration, reading no tensor; one on the hub is checked when it is loaded."""
    if recipe.model.random is None and Path(recipe.model.base).is_dir():
        Checkpoint(recipe.model.base).require(shapes)


def _targets(recipe: Recipe) -> str | list[str] | None:
    targets = recipe.lora.targets
    return list(targets) if isinstance(targets, tuple) else targets


def _trains(recipe: Recipe, tier: str) -> bool:
    return recipe.lora.tiers is None or tier in recipe.lora.tiers


def _tier_trains(recipe: Recipe, config: PreTrainedConfig, module: str) -> bool:
    block, bounds = block_of(config, module), tier_bounds(recipe, config.num_hidden_layers)
    names = list(recipe.split.tiers)
    return block not in full_blocks(recipe, config.num_hidden_layers) and any(
        _trains(recipe, name) for name, (start, stop) in zip(names, bounds, strict=True) if start <= block < stop
    )


def _cut_problems(recipe: Recipe, config: PreTrainedConfig) -> list[str]:
    layers = config.num_hidden_layers
    cuts = [("split.cuts", cut) for cut in recipe.split.cuts]
    cuts += [(f"split.client_cuts.{name}", cut) for name, cut in recipe.split.client_cuts.items()]
    bounds = dict(zip(recipe.split.tiers, tier_bounds(recipe, layers), strict=True))
    empty = [tier for tier in recipe.train.full_tiers or () if bounds[tier][0] >= bounds[tier][1]]
    nothing = [f"train.full_tiers: {tier!r} has no blocks with split.cuts: {list(recipe.split.cuts)}" for tier in empty]
    return [f"{line}; leave it out, or cut lower" for line in nothing] + [
        f"{key}: {cut} is not a place to cut {config.model_type}, which has {layers} blocks: use 1 to {layers}"
        for key, cut in cuts
        if not 1 <= cut <= layers
    ]


def _batching_problems(recipe: Recipe, config: PreTrainedConfig) -> list[str]:
    """A mask over a batch of several tenants would make each one's depend on the others."""
    rates = ", ".join(f"{name} {rate:g}" for name, rate in dropouts(config).items())
    if recipe.server.batching == "none" or not rates:
        return []
    return [
        f"server.batching: {recipe.server.batching} needs a base model without dropout of its own, and this one has "
        f"{rates}; set model.dropout: 0 (lora.dropout may stay), or batching: none"
    ]


def _sharing_problems(recipe: Recipe, config: PreTrainedConfig) -> list[str]:
    """Micro-batches that stay whole, and are computed one by one, are never shared out."""
    server = recipe.server
    spreads = server.fsdp or server.zero.stage is not None
    if server.processes == 1 or spreads or server.batching != "none" or not drops(recipe, config):
        return []
    return [
        f"server.processes: {server.processes} would share nothing out, as micro-batches of which training drops "
        "something stay whole, and server.batching: none computes each by itself; set model.dropout: 0 and "
        "lora.dropout: 0, or model.dropout: 0 and batching: synchronous"
    ]


def _process_problems(recipe: Recipe) -> list[str]:
    counts, processes = list(recipe.split.tiers.values()), recipe.train.processes
    spread = counts[-2] if len(counts) > 1 else counts[0]
    if processes <= spread:
        return []
    names = list(recipe.split.tiers)
    name = names[-2] if len(names) > 1 else names[0]
    return [f"train.processes: {processes} cannot share {spread} {name}: use at most {spread}"]


def _privacy_problems(recipe: Recipe) -> list[str]:
    """Whoever adds noise tells what it costs, from the first round on."""
    noise = recipe.rounds.privacy.noise
    if not noise or find_spec("dp_accounting") is not None:
        return []
    return [
        f"rounds.privacy.noise: {noise:g} needs the library dp-accounting, which is not installed; "
        "pip install 'splitllm[privacy]', or leave noise out"
    ]


def _library_problems(recipe: Recipe, tier: str | None) -> list[str]:
    """Whether what quantises is there, on a machine that computes with quantised weights."""
    here = [name for name in recipe.quantization if tier in (None, name)]
    if not here or find_spec("bitsandbytes") is not None:
        return []
    method = recipe.quantization[here[0]].method
    advice = "install it here: pip install 'splitllm[bnb]', or leave this tier out"
    return [f"quantization.{here[0]}: {method} needs the package bitsandbytes; {advice}"]


def _engine_problems(recipe: Recipe, tier: str | None, here: bool) -> list[str]:
    """Whether what holds a server's frozen weights is there, on a machine of one: library, and folder for files."""
    zero, (first, *_) = recipe.server.zero, recipe.split.tiers
    if tier == first:
        return []
    found = _launch_problems(recipe)
    if zero.stage is None:
        return found
    found += [] if find_spec("deepspeed") is not None else [missing()]
    files = zero.offload_param == "nvme" and (here or tier is not None)
    return [*found, *unwritable(zero.nvme_path)] if files else found


def _launch_problems(recipe: Recipe) -> list[str]:
    """What the recipe alone would be refused for, and accelerate is told instead."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if not spreads_weights(recipe) or recipe.train.mixed_precision is not None or launched == "no":
        return []
    why = f"accelerate was launched with {launched}, with which server.fsdp and server.zero.stage: 3 save nothing"
    return [f"train.mixed_precision: {why}; set train.mixed_precision: no, and model.dtype: bfloat16 if wanted"]


def _vocabulary_problems(tokenizer: Any, config: PreTrainedConfig, recipe: Recipe) -> list[str]:
    found = []
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        found.append(
            f"model.tokenizer: its largest token id is {largest}, but the model has {config.vocab_size} embeddings: "
            "it belongs to another model"
        )
    places = getattr(config, "max_position_embeddings", None)
    if has_position_table(config) and places and recipe.data.max_length > places:
        longest = recipe.data.max_length
        found.append(f"data.max_length: {longest} is more than the model's {places} positions; use at most {places}")
    return found


def has_position_table(config: PreTrainedConfig) -> bool:
    """Whether the family has a learned position table, which limits the length of rows."""
    try:
        return layout_of(config).positions is not None
    except SplitLLMError:
        return False


def _corpus(recipe: Recipe, tokenizer: Any | None, client: int | None) -> Corpus | None:
    """Every client's examples; without a tokenizer the files are read all the same, for what is wrong with them."""
    if tokenizer is None:
        for key, source in (("data.source", recipe.data.source), ("data.eval", recipe.data.eval)):
            if source is not None:
                read_sources(source, key)
        return None
    clients = next(iter(recipe.split.tiers.values()))
    batch_size, seed = recipe.train.batch_size, recipe.seed
    return load_corpus(recipe.data, tokenizer, clients=clients, batch_size=batch_size, seed=seed, client=client)


def _start_fits(recipe: Recipe, config: PreTrainedConfig, shapes: Shapes) -> None:
    """The recipe must say what the adapter it starts from says."""
    lora = recipe.lora
    peft_config, named = load_adapter(Path(str(lora.start_from)))
    tensors = in_text_model(named, layout_of(config))
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
    wrong += [
        f"lora.start_from: {lora.start_from}: {name}={value!r} in its adapter_config.json has no place in a recipe"
        for name, neutral in NEUTRAL.items()
        if (value := getattr(peft_config, name, None)) not in neutral
    ]
    in_full = {name: tensor.shape for name, tensor in tensors.items() if ".lora_" not in name}
    if peft_config.modules_to_save and in_full != full_shapes(config, full_blocks(recipe, config.num_hidden_layers)):
        kept = f"{lora.start_from} has all weights of {', '.join(peft_config.modules_to_save)}"
        wrong.append(f"train.full_tiers: {kept}, of which this recipe trains others or none in full; use its tiers")
    if peft_config.modules_to_save:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in in_full}
    matched = set(matched_modules(config, _targets(recipe)))
    stored = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors}
    trained = {name for name in matched if _tier_trains(recipe, config, name)}
    if stored != trained:
        others = f"{lora.start_from} adapts other modules than this recipe: {_sample(stored, trained)}"
        wrong.append(f"lora.targets: {others}; use its lora.targets, lora.tiers and train.full_tiers")
    elif not wrong:
        wrong += [
            f"lora.start_from: {lora.start_from}: {line}" for line in _misshapen(tensors, stored, shapes, lora)[:5]
        ]
    if wrong:
        raise RecipeError(wrong)


def _misshapen(tensors: Mapping[str, torch.Tensor], modules: set[str], shapes: Shapes, lora: LoraRecipe) -> list[str]:
    """Adapter tensors that are missing, or made for other widths (GPT-2 stores its weights transposed)."""
    wrong = []
    for module in sorted(modules):
        name = f"base_model.model.{module}.lora_"
        a, b = tensors.get(f"{name}A.weight"), tensors.get(f"{name}B.weight")
        if a is None or b is None or (lora.dora and f"{name}magnitude_vector" not in tensors):
            wrong.append(f"tensors of {module} are missing")
        elif (b.shape[0], a.shape[-1]) not in (shapes[f"{module}.weight"], shapes[f"{module}.weight"][::-1]):
            widths = f"{a.shape[-1]} to {b.shape[0]}"
            wrong.append(f"{module} is adapted from {widths}, the base has {list(shapes[f'{module}.weight'])}")
        elif (a.shape[0], b.shape[-1]) != (lora.rank, lora.rank):
            wrong.append(f"{module} has rank {a.shape[0]} and {b.shape[-1]}, its adapter_config.json says {lora.rank}")
    kinds = ("A.weight", "B.weight", *(("magnitude_vector",) if lora.dora else ()))
    known = {f"base_model.model.{module}.lora_{kind}" for module in modules for kind in kinds}
    return wrong + [f"tensor {name} is none of LoRA's" for name in sorted(tensors.keys() - known)]


def _sample(stored: set[str], matched: set[str]) -> str:
    more, less = sorted(stored - matched)[:2], sorted(matched - stored)[:2]
    return "; ".join(
        part
        for part in (f"only in the adapter {more}" if more else "", f"only in the recipe {less}" if less else "")
        if part
    )
