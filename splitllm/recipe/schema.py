"""The recipe as pydantic models: one class a section, and what must hold between keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from splitllm.recipe.kinds import (
    Addresses,
    Betas,
    Codec,
    Count,
    Cuts,
    Fields,
    Fraction,
    Length,
    Mapping,
    MixedPrecision,
    NonNegative,
    NotNegative,
    Positive,
    Probability,
    Seed,
    Sources,
    Switch,
    Targets,
    Text,
    TierNames,
    Tiers,
    Trackers,
)
from splitllm.recipe.roles import find_role, known_roles


class Section(BaseModel):
    """A mapping in the recipe; unknown keys are refused, and a section left empty means its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        return {} if value is None else value


class ModelRecipe(Section):
    """The base model. With `random` (config overrides), `base` gives the config only and weights come from the seed."""

    base: Text = Field(description="a model folder or hub name")
    revision: Text | None = None
    tokenizer: Text | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    attention: Text | None = None
    random: Mapping | None = None


class SplitRecipe(Section):
    """Where the model is cut: tiers bottom-up with their counts, the first block of each tier above the bottom one."""

    tiers: Tiers = Field(description="tiers bottom-up with their counts, such as {client: 4, edge: 2, cloud: 1}")
    cuts: Cuts = ()
    labels: Literal["client", "cloud"] = Field(description="client (target token ids stay) or cloud (they leave)")


class LoraRecipe(Section):
    """What trains: LoRA, rsLoRA or DoRA on the modules `targets` (null: PEFT's table for the family)."""

    rank: Count = 8
    alpha: Count = 16
    dropout: Probability = 0.0
    targets: Targets | None = None
    tiers: TierNames | None = None
    rslora: Switch = False
    dora: Switch = False
    start_from: Text | None = None


class PartitionRecipe(Section):
    """How rows are shared out among the clients."""

    by: Literal["iid", "dirichlet", "field", "file", "own"] = "iid"
    field: Text | None = None
    alpha: Positive | None = None


class DataRecipe(Section):
    """The rows: where they come from, their format, and how they are shared out. `max_length` is in tokens."""

    source: Sources = Field(description="a path, a glob, a list of them, hub:NAME or builtin:stdlib-docstrings")
    eval: Sources | None = None
    eval_fraction: Fraction = 0.05
    format: Literal["prompt_completion", "chat", "text"] = "prompt_completion"
    fields: Fields = Field(default_factory=dict)
    partition: PartitionRecipe = Field(default_factory=PartitionRecipe)
    max_length: Length = 512
    pack: Switch = False
    limit: Count | None = None


class OptimizerRecipe(Section):
    """The optimizer and its numbers."""

    name: Literal["adamw"] = "adamw"
    lr: Positive = 2.0e-4
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1.0e-8
    weight_decay: NotNegative = 0.0


class ScheduleRecipe(Section):
    """The learning rate's schedule, by its name in `transformers.get_scheduler`."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: NonNegative = 0


class TrainRecipe(Section):
    """The loop. `batch_size` is rows of a micro-batch; `accumulate` is micro-batches a client a step."""

    steps: Count = 200
    batch_size: Count = 8
    accumulate: Count = 1
    in_flight: Count = 1
    optimizer: OptimizerRecipe = Field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = Field(default_factory=ScheduleRecipe)
    clip_norm: Positive | None = 1.0
    loss_weights: Literal["token", "tenant"] = "token"
    activation_checkpointing: Switch = False
    mixed_precision: MixedPrecision | None = None
    processes: Count = 1
    threads: Count | None = None
    eval_every: Count | None = None
    checkpoint_every: Count = 50
    keep: Count = 2
    log_every: Count = 1
    trackers: Trackers = ()
    verify_adapter: Switch = False


class WireRecipe(Section):
    """Roles on several machines. Memory is in MiB, times are in seconds; `up` and `down` are codecs."""

    addresses: Addresses = Field(default_factory=dict)
    certificates: Text | None = None
    up: Codec = "none"
    down: Codec = "none"
    feedback_mib: NonNegative = 256
    memory_mib: Count = 4096
    absent: Literal["wait", "drop"] = "wait"
    drop_after: Positive = 30.0
    keepalive: Positive = 10.0


class Recipe(Section):
    """One run, completely. `load_recipe` reads it from a file; it can also be built in Python."""

    seed: Seed = 0
    model: ModelRecipe
    split: SplitRecipe
    lora: LoraRecipe = Field(default_factory=LoraRecipe)
    data: DataRecipe
    train: TrainRecipe = Field(default_factory=TrainRecipe)
    wire: WireRecipe = Field(default_factory=WireRecipe)

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Recipe:
        broken: frozenset[str] = (info.context or {}).get("broken", frozenset())
        problems = [text for keys, text in _misfits(self) if not any(_covered(key, broken) for key in keys)]
        if problems:
            raise PydanticCustomError("together", "{problems}", {"problems": "\n".join(problems), "lines": problems})
        return self


def _misfits(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields what is wrong between keys that are right by themselves: the keys involved and the complaint."""
    yield from _split_misfits(recipe.split, recipe.lora)
    yield from _data_misfits(recipe.data)
    yield from _wire_misfits(recipe.wire, recipe.split)
    steps, schedule = recipe.train.steps, recipe.train.schedule
    if schedule.warmup_steps > steps:
        keys = ("train.schedule.warmup_steps", "train.steps")
        yield keys, f"{keys[0]}: {schedule.warmup_steps} is more than train.steps ({steps}); use at most {steps}"
    if schedule.name == "constant" and schedule.warmup_steps > 0:
        keys = ("train.schedule.name", "train.schedule.warmup_steps")
        yield keys, f"{keys[0]}: 'constant' has no warm-up; use constant_with_warmup, or warmup_steps: 0"


def _split_misfits(split: SplitRecipe, lora: LoraRecipe) -> Iterator[tuple[tuple[str, ...], str]]:
    wanted = len(split.tiers) - 1
    names = ", ".join(split.tiers)
    if len(split.cuts) != wanted:
        advice = f"{len(split.tiers)} tiers ({names}) need {wanted} cut{'' if wanted == 1 else 's'}"
        yield ("split.cuts", "split.tiers"), f"split.cuts: {list(split.cuts)} has {len(split.cuts)}; {advice}"
    for name in lora.tiers or ():
        if name not in split.tiers:
            keys = ("lora.tiers", "split.tiers")
            yield keys, f"lora.tiers: {name!r} is not a tier of split.tiers; use some of {names}"


_FIELDS = {"prompt_completion": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}
_PARTITION_NEEDS = {"iid": (), "dirichlet": ("field", "alpha"), "field": ("field",), "file": (), "own": ()}


def _data_misfits(data: DataRecipe) -> Iterator[tuple[tuple[str, ...], str]]:
    if data.pack and data.format != "text":
        keys = ("data.pack", "data.format")
        yield keys, f"data.pack: true needs data.format: text, not {data.format}; use pack: false or format: text"
    for field in data.fields:
        if field not in _FIELDS[data.format]:
            keys, known = ("data.fields", "data.format"), ", ".join(_FIELDS[data.format])
            yield keys, f"data.fields.{field}: format {data.format} has no such field; use {known}"
    by = data.partition.by
    for key in ("field", "alpha"):
        given, needed = getattr(data.partition, key) is not None, key in _PARTITION_NEEDS[by]
        keys = (f"data.partition.{key}", "data.partition.by")
        if needed and not given:
            example = "a field of the rows, such as group" if key == "field" else "a number above 0, such as 0.5"
            yield keys, f"{keys[0]}: missing; by: {by} needs {example}"
        elif given and not needed:
            yield keys, f"{keys[0]}: by: {by} does not use it; leave it out"
    sources = (data.source,) if isinstance(data.source, str) else data.source
    if by == "file" and any(source.startswith(("builtin:", "hub:")) for source in sources):
        keys = ("data.partition.by", "data.source")
        yield keys, f"{keys[0]}: 'file' needs local files, not {sources[0]}; use iid, dirichlet or field"


def _wire_misfits(wire: WireRecipe, split: SplitRecipe) -> Iterator[tuple[tuple[str, ...], str]]:
    keys = ("wire.addresses", "split.tiers")
    servers = dict(list(split.tiers.items())[1:])
    taken: dict[str, str] = {}
    for name, address in wire.addresses.items():
        if find_role(servers, name) is None:
            advice = f"use some of {known_roles(servers)}" if servers else "split.tiers has none; leave it out"
            yield keys, f"wire.addresses: {name!r} is not a server of split.tiers; {advice}"
        elif (other := taken.setdefault(address.lower(), name)) != name:
            yield keys, f"wire.addresses: {other} and {name} are both at {address}; give each its own"


def _covered(key: str, broken: frozenset[str]) -> bool:
    return any(key == entry or key.startswith(f"{entry}.") for entry in broken)
