"""The recipe as pydantic models: one class a section. What must hold between keys is in `misfits.py`."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from splitllm.recipe.kinds import (
    Addresses,
    AtLeastOne,
    Betas,
    ClientCuts,
    Codec,
    ComputeDtype,
    Count,
    Cuts,
    Fields,
    Fraction,
    Intervals,
    Length,
    Limits,
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
    ZeroStage,
    mapping_of,
)
from splitllm.recipe.misfits import covered, misfits
from splitllm.recipe.quantization import METHODS, SHORT_FORM, SHORT_FORM_OF_TIER, for_all_tiers
from splitllm.recipe.roles import find_role

Rule = Literal[
    "fedavg", "fedex", "flora", "ffa", "rolora", "flexlora", "hetlora", "trimmed_mean", "median"
]  # as in `federated.aggregate.RULES`

MIB = 2**20


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

    `client_cuts` are the first blocks above single clients, where they are not the first of `cuts`. `memory_mib` is
    what a process of a tier may take, imports and all, in MiB.
    """

    tiers: Tiers = Field(description="tiers bottom-up with their counts, such as {client: 4, edge: 2, cloud: 1}")
    cuts: Cuts = ()
    client_cuts: ClientCuts = Field(default_factory=dict)
    memory_mib: Limits = Field(default_factory=dict)
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
    """The loop. `batch_size` is rows of a micro-batch; `accumulate` is micro-batches a client a step.

    `full_tiers`, of servers, train all weights of their blocks instead of an adapter; null: none does.
    """

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
    full_tiers: TierNames | None = None
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


class ZeroRecipe(Section):
    """What servers spread over their processes (by DeepSpeed; arXiv 1910.02054, 2104.07857); null: nothing.

    Stages 1 and 2 spread AdamW's state of what they train, and 2 its gradients. Stage 3 spreads the frozen matrices of
    their blocks, each of which is whole only while it computes; parts lie on the device, in host memory (`cpu`), or in
    files below `nvme_path`.
    """

    stage: ZeroStage | None = None
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: Text | None = None


class ServerRecipe(Section):
    """How servers compute what their clients send. `tokens` are positions of a batch, padding included.

    With `continuous` what clients have in common steps after the steps of `step_tenants` clients (null: of as many as
    the server has), or after `step_tokens` tokens. So many `processes` of `accelerate launch` are one server.
    """

    batching: Literal["none", "synchronous", "continuous"] = "none"
    tokens: Count = 4096
    wait: NotNegative = 0.0
    starve: Positive = 10.0
    gradient_wait: NotNegative = 0.1
    step_tenants: Count | None = None
    step_tokens: Count | None = None
    park_after: Positive | None = None
    processes: Count = 1
    memory_mib: Count | None = None
    quota: QuotaRecipe = Field(default_factory=QuotaRecipe)
    tenants: dict[str, TenantRecipe] = Field(default_factory=dict)
    zero: ZeroRecipe = Field(default_factory=ZeroRecipe)
    fsdp: Switch = False


class OuterRecipe(Section):
    """The optimizer that the top steps by the difference of averages (arXiv 2003.00295); `none` takes the average."""

    name: Literal["none", "fedavgm", "fedadam", "fedyogi"] = "none"
    lr: Positive = 1.0
    betas: Betas = (0.9, 0.99)
    tau: Positive = 1.0e-3


class ParticipationRecipe(Section):
    """Which clients of a server train until its next round: all, or some that a policy draws, and how many.

    With `server.batching: continuous` `over` times as many are asked as a round wants, and those that come first count;
    `deadline` is in seconds from a round's beginning.
    """

    policy: Literal["all", "random", "poisson", "oort"] = "all"
    share: Share = 1.0
    count: Count | None = None
    minimum: Count = 1
    over: AtLeastOne = 1.0
    deadline: Positive | None = None


class BufferRecipe(Section):
    """Servers that bring to the top what they changed, and wait for nobody (FedBuff, arXiv 2106.06639).

    The top steps when `size` of them have (null: all are waited for). `discount` is by how many versions of it have
    passed meanwhile; more than `oldest` (null: any number), and an update is dropped.
    """

    size: Count | None = None
    discount: Literal["constant", "polynomial", "hinge"] = "polynomial"
    oldest: NonNegative | None = None


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


class QuantizationRecipe(Section):
    """How a tier holds the frozen linear layers of its blocks (by bitsandbytes); a method alone is short for itself.

    `nf4` is 4 bits and a scale for 64 numbers (arXiv 2305.14314), `int8` is 8 bits and a scale for each output. With
    `double` the scales of nf4 are quantised as well. Products are in `compute_dtype`; null: in that of what comes in.
    """

    method: Literal["nf4", "int8"] = "nf4"
    double: Switch = False
    compute_dtype: ComputeDtype | None = None

    @model_validator(mode="before")
    @classmethod
    def _method_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict | NoneType | QuantizationRecipe) and value not in METHODS:
            raise PydanticCustomError("allowed", "{allowed}", {"allowed": SHORT_FORM_OF_TIER})
        return {"method": value} if isinstance(value, str) else value


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
    buffer: BufferRecipe = Field(default_factory=BufferRecipe)
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


Quantization = Annotated[dict[str, QuantizationRecipe], mapping_of(SHORT_FORM)]


class Recipe(Section):
    """One run, completely. `load_recipe` reads it from a file; it can also be built in Python."""

    seed: Seed = 0
    model: ModelRecipe
    split: SplitRecipe
    lora: LoraRecipe = Field(default_factory=LoraRecipe)
    quantization: Quantization = Field(default_factory=dict)
    data: DataRecipe
    train: TrainRecipe = Field(default_factory=TrainRecipe)
    server: ServerRecipe = Field(default_factory=ServerRecipe)
    rounds: RoundsRecipe = Field(default_factory=RoundsRecipe)
    wire: WireRecipe = Field(default_factory=WireRecipe)

    def memory_of(self, name: str) -> int | None:
        """Bytes that the process of a role may take; None: as many as there are."""
        found = find_role(self.split.tiers, name)
        limit = None if found is None else self.split.memory_mib.get(list(self.split.tiers)[found[0]])
        return None if limit is None else limit * MIB

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        return for_all_tiers(value)

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Recipe:
        broken: frozenset[str] = (info.context or {}).get("broken", frozenset())
        problems = [text for keys, text in misfits(self) if not any(covered(key, broken) for key in keys)]
        if problems:
            raise PydanticCustomError("together", "{problems}", {"problems": "\n".join(problems), "lines": problems})
        return self
