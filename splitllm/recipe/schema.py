"""The recipe as pydantic models: one class a section, and what must hold between keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from splitllm.recipe.kinds import (
    Addresses,
    Betas,
    ClientCuts,
    Codec,
    Count,
    Cuts,
    Fields,
    Fraction,
    Intervals,
    Length,
    Mapping,
    MixedPrecision,
    NonNegative,
    NotNegative,
    PlaceHere,
    Positive,
    Probability,
    Seed,
    Share,
    Sources,
    Switch,
    Targets,
    Text,
    TierNames,
    Tiers,
    Trackers,
)
from splitllm.recipe.roles import find_role, known_roles
from splitllm.recipe.rounds import rounds_misfits

Rule = Literal[
    "fedavg", "fedex", "flora", "ffa", "rolora", "flexlora", "hetlora", "trimmed_mean", "median"
]  # as in `federated.aggregate.RULES`


class Section(BaseModel):
    """A mapping in the recipe; unknown keys are refused, and a section left empty means its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        return {} if value is None else value


class ModelRecipe(Section):
    """The base model. With `random` (config overrides), `base` gives the config only and weights come from the seed.

    `dropout` replaces the base model's own rates; null keeps them.
    """

    base: Text = Field(description="a model folder or hub name")
    revision: Text | None = None
    tokenizer: Text | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    attention: Text | None = None
    dropout: Probability | None = None
    random: Mapping | None = None


class SplitRecipe(Section):
    """Where the model is cut: tiers bottom-up with their counts, the first block of each tier above the bottom one.

    `client_cuts` are the first blocks above single clients, where they are not the first of `cuts`.
    """

    tiers: Tiers = Field(description="tiers bottom-up with their counts, such as {client: 4, edge: 2, cloud: 1}")
    cuts: Cuts = ()
    client_cuts: ClientCuts = Field(default_factory=dict)
    labels: Literal["client", "cloud"] = Field(description="client (target token ids stay) or cloud (they leave)")


class ClientLoraRecipe(Section):
    """What of `lora` is another for one client; null: as for all."""

    rank: Count | None = None
    alpha: Count | None = None
    dropout: Probability | None = None


class LoraRecipe(Section):
    """What trains: LoRA, rsLoRA or DoRA on the modules `targets` (null: PEFT's table for the family).

    `adapters`: one for all (`shared`), each client its own (`per_client`), or its own below the deepest cut only
    (`common`). `clients` may differ in rank, alpha and dropout where each has its own.
    """

    rank: Count = 8
    alpha: Count = 16
    dropout: Probability = 0.0
    targets: Targets | None = None
    tiers: TierNames | None = None
    adapters: Literal["shared", "per_client", "common"] = "shared"
    clients: dict[str, ClientLoraRecipe] = Field(default_factory=dict)
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
    """The optimizer and its numbers; `sgd` is plain, and has no betas and eps."""

    name: Literal["adamw", "sgd"] = "adamw"
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


class QuotaRecipe(Section):
    """What a server takes from a client in a second, and sends it; null: as much as comes."""

    tokens_per_second: Positive | None = None
    bytes_per_second: Positive | None = None


class TenantRecipe(QuotaRecipe):
    """One client, as its servers see it: its own quota (null: that of `server.quota`), and its weight among others."""

    weight: Positive = 1.0


class ServerRecipe(Section):
    """How servers compute what their clients send. `tokens` are positions of a batch, padding included.

    With `continuous` what clients have in common steps after the steps of `step_tenants` clients (null: of as many as
    there are), or after `step_tokens` tokens.
    """

    batching: Literal["none", "synchronous", "continuous"] = "none"
    tokens: Count = 4096
    wait: NotNegative = 0.0
    starve: Positive = 10.0
    gradient_wait: NotNegative = 0.1
    step_tenants: Count | None = None
    step_tokens: Count | None = None
    park_after: Positive | None = None
    memory_mib: Count | None = None
    quota: QuotaRecipe = Field(default_factory=QuotaRecipe)
    tenants: dict[str, TenantRecipe] = Field(default_factory=dict)


class OuterRecipe(Section):
    """The optimizer that the top steps by the difference of averages (arXiv 2003.00295); `none` takes the average."""

    name: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    lr: Positive = 1.0
    betas: Betas = (0.9, 0.99)
    tau: Positive = 1.0e-3


class ParticipationRecipe(Section):
    """Which clients of a server train until its next round: all, or some that a policy draws, and how many."""

    policy: Literal["all", "random", "poisson", "oort"] = "all"
    share: Share = 1.0
    count: Count | None = None
    minimum: Count = 1


class SecureRecipe(Section):
    """Sums of which the server right above clients sees no summand (secure aggregation, doi 10.1145/3133956.3133982).

    `threshold` members have to be left (null: more than half); values beyond `range` are clipped; words have `bits`.
    """

    aggregate: Switch = False
    threshold: Count | None = None
    range: Positive = 8.0
    bits: Literal[32, 64] = 32


class PrivacyRecipe(Section):
    """Differential privacy of users in rounds (DP-FedAvg, arXiv 1710.06963): changes clipped to `clip`, noise on sums.

    `noise` is the deviation as a multiple of `clip`; `delta` is that of the epsilon which is told.
    """

    clip: Positive | None = None
    noise: NotNegative = 0.0
    delta: Fraction = 1.0e-5


class RoundsRecipe(Section):
    """Replicas that train adapters of their own, and when and how those are averaged. Intervals are in steps.

    `edge_every` is of the tiers between clients and top, one number for all or a list, bottom-up. With `exchange` the
    tree is one site of several: `cloud_every` is of all sites, and `edge_every` of the site's top, too.
    """

    replicas: Literal["together", "local"] = "together"
    edge_every: Intervals | None = None
    cloud_every: Count | None = None
    rule: Rule = "fedavg"
    weights: Literal["tokens", "examples", "equal"] = "tokens"
    moments: Literal["keep", "average", "reset"] = "keep"
    prox: NotNegative = 0.0
    outer: OuterRecipe = Field(default_factory=OuterRecipe)
    trim: Fraction = 0.1
    clip_update: Positive | None = None
    reject_beyond: Positive | None = None
    participation: ParticipationRecipe = Field(default_factory=ParticipationRecipe)
    secure: SecureRecipe = Field(default_factory=SecureRecipe)
    privacy: PrivacyRecipe = Field(default_factory=PrivacyRecipe)
    exchange: PlaceHere | None = None


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
    server: ServerRecipe = Field(default_factory=ServerRecipe)
    rounds: RoundsRecipe = Field(default_factory=RoundsRecipe)
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
    yield from _client_lora_misfits(recipe)
    yield from _data_misfits(recipe.data)
    if recipe.train.processes > 1 and recipe.lora.adapters != "shared":
        advice = "use processes: 1, or adapters: shared"
        yield (
            ("train.processes", "lora.adapters"),
            f"train.processes: {recipe.train.processes} with lora.adapters: {recipe.lora.adapters} is not possible, "
            f"as no process would have all adapters; {advice}",
        )
    yield from _pace_misfits(recipe)
    if recipe.wire.absent == "drop" and (recipe.split.client_cuts or recipe.lora.adapters != "shared"):
        keys3 = ("wire.absent", "split.client_cuts", "lora.adapters")
        why = "a client that was left out takes over the state of another, and here nobody holds the same"
        yield keys3, f"wire.absent: 'drop' needs lora.adapters: shared and no split.client_cuts: {why}; use wait"
    yield from rounds_misfits(recipe)
    yield from _server_misfits(recipe.server, recipe.split)
    yield from _wire_misfits(recipe.wire, recipe.split)
    steps, schedule = recipe.train.steps, recipe.train.schedule
    if schedule.warmup_steps > steps:
        keys = ("train.schedule.warmup_steps", "train.steps")
        yield keys, f"{keys[0]}: {schedule.warmup_steps} is more than train.steps ({steps}); use at most {steps}"
    if schedule.name == "constant" and schedule.warmup_steps > 0:
        keys = ("train.schedule.name", "train.schedule.warmup_steps")
        yield keys, f"{keys[0]}: 'constant' has no warm-up; use constant_with_warmup, or warmup_steps: 0"


def _pace_misfits(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What clients that go at their own pace can train, and what does nothing without them."""
    server, adapters = recipe.server, recipe.lora.adapters
    keys: tuple[str, ...]
    continuous = server.batching == "continuous"
    if continuous and adapters == "shared":
        why = "lets clients go at their own pace, so that they cannot step one adapter of their blocks together"
        advice = "use lora.adapters: common (the blocks above all clients are trained together) or per_client"
        yield ("server.batching", "lora.adapters"), f"server.batching: continuous {why}; {advice}"
    if continuous and adapters == "common" and recipe.train.clip_norm is None:
        why = "lets one client's gradients move what others train with them at their own pace by any amount"
        keys = ("train.clip_norm", "server.batching", "lora.adapters")
        yield keys, f"train.clip_norm: null {why}; set a norm, such as 1.0"
    for name, count in list(recipe.split.tiers.items())[1:-1]:
        if continuous and adapters == "common" and count > 1:
            why = (
                "servers of one tier, with server.batching: continuous, would each train a common adapter of their own"
            )
            keys = ("split.tiers", "server.batching", "lora.adapters")
            yield keys, f"split.tiers.{name}: {count} {why}; use 1, or lora.adapters: per_client"
    for key in ("step_tenants", "step_tokens"):
        value = getattr(server, key)
        if value is not None and not (continuous and adapters == "common"):
            why = "needs server.batching: continuous and lora.adapters: common; elsewhere all step together"
            keys = (f"server.{key}", "server.batching", "lora.adapters")
            yield keys, f"server.{key}: {value} {why}; leave it out"
    if server.step_tenants is not None and server.step_tokens is not None:
        yield (
            ("server.step_tokens", "server.step_tenants"),
            f"server.step_tokens: {server.step_tokens} beside server.step_tenants; leave one of the two out",
        )


def _split_misfits(split: SplitRecipe, lora: LoraRecipe) -> Iterator[tuple[tuple[str, ...], str]]:
    wanted = len(split.tiers) - 1
    names = ", ".join(split.tiers)
    if len(split.cuts) != wanted:
        advice = f"{len(split.tiers)} tiers ({names}) need {wanted} cut{'' if wanted == 1 else 's'}"
        yield ("split.cuts", "split.tiers"), f"split.cuts: {list(split.cuts)} has {len(split.cuts)}; {advice}"
    yield from _client_cut_misfits(split, lora)
    for name in lora.tiers or ():
        if name not in split.tiers:
            keys = ("lora.tiers", "split.tiers")
            yield keys, f"lora.tiers: {name!r} is not a tier of split.tiers; use some of {names}"


def _client_cut_misfits(split: SplitRecipe, lora: LoraRecipe) -> Iterator[tuple[tuple[str, ...], str]]:
    clients = dict(list(split.tiers.items())[:1])
    above = split.cuts[1] if len(split.cuts) > 1 else None
    for name, cut in split.client_cuts.items():
        keys: tuple[str, ...] = ("split.client_cuts", "split.tiers", "split.cuts")
        place = f"split.client_cuts.{name}"
        if len(split.tiers) == 1:
            yield keys, f"{place}: with one tier nothing is cut; leave it out"
        elif find_role(clients, name) is None:
            yield keys, f"{place}: {name!r} is not a client of split.tiers; use some of {known_roles(clients)}"
        elif above is not None and cut >= above:
            why = f"leaves nothing to the tier above, which ends before block {above}"
            yield keys, f"{place}: {cut} {why}; use 1 to {above - 1}"
    keys = ("split.client_cuts", "lora.tiers")
    if split.client_cuts and lora.tiers is not None:
        yield keys, "lora.tiers: with split.client_cuts a block may be on two tiers; leave one of the two out"
    if lora.adapters == "shared":
        return
    place = f"lora.adapters: {lora.adapters}"
    if lora.dora:
        why = "cannot be had with lora.dora, which scales the product of all tenants"
        yield ("lora.adapters", "lora.dora"), f"{place} {why}; use dora: false"
    if len(split.tiers) == 1:
        why = "needs a server that several clients share"
        yield ("lora.adapters", "split.tiers"), f"{place} {why}; use two tiers or more, or shared"


def _client_lora_misfits(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    lora, clients = recipe.lora, dict(list(recipe.split.tiers.items())[:1])
    for name, own in lora.clients.items():
        place = f"lora.clients.{name}"
        if find_role(clients, name) is None:
            keys: tuple[str, ...] = ("lora.clients", "split.tiers")
            yield keys, f"{place}: {name!r} is not a client of split.tiers; use some of {known_roles(clients)}"
        elif lora.adapters != "per_client" and recipe.rounds.replicas == "together":
            keys = ("lora.clients", "lora.adapters", "rounds.replicas")
            advice = "use that, rounds.replicas: local, or lora.clients: {}"
            yield keys, f"{place}: needs lora.adapters: per_client, not {lora.adapters}; {advice}"
        elif lora.start_from is not None and own.rank not in (None, lora.rank):
            keys = ("lora.clients", "lora.start_from", "lora.rank")
            yield keys, f"{place}.rank: {own.rank} is not that of lora.start_from ({lora.rank}); leave one of them out"


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


def _server_misfits(server: ServerRecipe, split: SplitRecipe) -> Iterator[tuple[tuple[str, ...], str]]:
    clients = dict(list(split.tiers.items())[:1])
    for name in server.tenants:
        if find_role(clients, name) is None:
            keys: tuple[str, ...] = ("server.tenants", "split.tiers")
            place = f"server.tenants.{name}"
            yield keys, f"{place}: {name!r} is not a client of split.tiers; use some of {known_roles(clients)}"
    if server.memory_mib is not None and len(split.tiers) == 1:
        keys = ("server.memory_mib", "split.tiers")
        yield keys, f"server.memory_mib: {server.memory_mib} is of a server, and with one tier there is none; use null"


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
