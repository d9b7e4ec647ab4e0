"""Builds the roles of one process and ties them together: clients at the bottom, servers tier by tier above them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import get_scheduler

from splitllm.data.batching import BatchStream, eval_batches
from splitllm.data.corpus import Corpus
from splitllm.model.export import load_adapter
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import adapter_parameters, add_lora
from splitllm.model.naming import in_text_model
from splitllm.model.shard import Shard
from splitllm.model.trainable import Trainable
from splitllm.recipe import Recipe, ScheduleRecipe, children_of, parent_of
from splitllm.roles.client import Client
from splitllm.roles.server import Counts, LossWeights, Server, StepSums, Top, unobserved
from splitllm.roles.worker import Autocast, Worker
from splitllm.wire.codecs import codec
from splitllm.wire.coding import Coding
from splitllm.wire.link import LocalLink, Traffic

MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Roles:
    """The roles of one process.

    Attributes:
        clients: those whose branch of the tree this process holds.
        workers: tier -> the workers of its replicas here, by role name.
        links: tier below -> its links up.
    """

    clients: list[Client] = field(default_factory=list)
    workers: dict[str, dict[str, Worker]] = field(default_factory=dict)
    links: dict[str, list[LocalLink]] = field(default_factory=dict)

    def traffic(self) -> Traffic:
        """Bytes that crossed all cuts so far."""
        flat = [link.traffic for links in self.links.values() for link in links]
        return Traffic(sum(t.up for t in flat), sum(t.down for t in flat))

    def state(self) -> dict[str, torch.Tensor]:
        """Adapter and optimiser of every tier; replicas hold the same, so one of each stands for all."""
        tensors: dict[str, torch.Tensor] = {}
        for replicas in self.workers.values():
            tensors.update(next(iter(replicas.values())).trainable.state())
        return tensors

    def adapter(self) -> dict[str, torch.Tensor]:
        """The adapter of the whole model, by the names that an adapter file has."""
        prefix = "adapter/"
        return {name.removeprefix(prefix): t for name, t in self.state().items() if name.startswith(prefix)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put a state on every role."""
        for replicas in self.workers.values():
            for worker in replicas.values():
                worker.trainable.load(tensors)


@dataclass(frozen=True)
class Site:
    """Where and with whom the roles of this process run.

    Attributes:
        rank, size: of this process.
        device: on which it computes.
        autocast: the run's mixed precision.
        all_counts, all_sums: join label counts and add tensors over all processes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: Autocast = nullcontext
    all_counts: Callable[[Counts], Counts] = lambda counts: counts
    all_sums: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda sums: sums


@dataclass
class Assembly:
    """Builds this process's part of the tree.

    The replicas of the tier below the top are spread over the processes, each with all that hangs on it; every process
    holds a copy of the top.

    Attributes:
        recipe: counts, LoRA and optimiser are read.
        corpus: every client's examples.
        checkpoint: of the base model.
        modules: what LoRA adapts.
        bounds: of every tier.
        schedule: step -> multiplier of the learning rate.
        site: this process among its peers; by default the only one, on the CPU.
    """

    recipe: Recipe
    corpus: Corpus
    checkpoint: Checkpoint
    modules: Sequence[str]
    bounds: Sequence[tuple[int, int]]
    schedule: Callable[[int], float]
    site: Site = field(default_factory=Site)

    def __post_init__(self) -> None:
        """Nothing is loaded before `build`."""
        self.tiers, self.counts = list(self.recipe.split.tiers), list(self.recipe.split.tiers.values())
        self.roles = Roles()
        self.first: dict[str, Shard] = {}

    def build(self) -> Roles:
        """Load the shards and tie the roles together, from the top down."""
        tiers = len(self.tiers)
        if tiers == 1:
            here = _share(self.counts[0], self.site)
            top = self._server("coordinator", [self._role(0, index) for index in here], None, self.top())
            self._clients(here, dict.fromkeys(here, top))
            return self.roles
        below = _share(self.counts[-2], self.site)
        top = self._server(
            self._role(tiers - 1, 0),
            [self._role(tiers - 2, index) for index in below],
            self.worker(tiers - 1, 0),
            self.top(),
            replicas=self.site.size,
        )
        parents = dict.fromkeys(below, top)
        for tier in range(tiers - 2, 0, -1):
            parents = self._tier(tier, parents)
        self._clients(sorted(parents), parents)
        return self.roles

    def _tier(self, tier: int, parents: Mapping[int, Server]) -> dict[int, Server]:
        """The servers of one tier; returns the parent of every role of the tier below."""
        below: dict[int, Server] = {}
        for index, parent in parents.items():
            children = [child for child in range(self.counts[tier - 1]) if self._parent(tier - 1, child) == index]
            server = self._server(
                self._role(tier, index),
                [self._role(tier - 1, child) for child in children],
                self.worker(tier, index),
                self._link(tier, index, parent),
                replicas=self.counts[tier],
            )
            below.update(dict.fromkeys(children, server))
        return below

    def _server(
        self, name: str, children: list[str], worker: Worker | None, above: LocalLink | Top, replicas: int = 1
    ) -> Server:
        return Server(
            name,
            children,
            worker,
            uplink=above if isinstance(above, LocalLink) else None,
            top=above if isinstance(above, Top) else None,
            replicas=replicas,
            schedule=self.schedule,
        )

    def _clients(self, indices: Sequence[int], parents: Mapping[int, Server]) -> None:
        train = self.recipe.train
        for index in indices:
            stream = BatchStream(self.corpus.train[index], train.batch_size, self.recipe.seed, index)
            client = Client(
                self._role(0, index),
                index,
                self.worker(0, index),
                self._link(0, index, parents[index]),
                stream,
                eval_batches(self.corpus.eval[index], train.batch_size),
                whole=len(self.tiers) == 1,
                replicas=self.counts[0],
                accumulate=train.accumulate,
                in_flight=train.in_flight,
                schedule=self.schedule,
                name_rows=names_rows(self.recipe),
            )
            self.roles.clients.append(client)

    def worker(self, tier: int, index: int) -> Worker:
        """One role's shard with its adapter; replicas of a tier share the frozen weights."""
        name = self.tiers[tier]
        shard = self.first[name].replica() if name in self.first else self._shard(tier)
        self.first.setdefault(name, shard)
        trainable = Trainable(adapter_parameters(shard), self.recipe.train.optimizer)
        worker = Worker(shard, trainable, self.site.device, self.site.autocast)
        self.roles.workers.setdefault(name, {})[self._role(tier, index)] = worker
        return worker

    def _shard(self, tier: int) -> Shard:
        """One tier's shard with its adapter; the head sits where the loss is computed."""
        recipe, (start, stop) = self.recipe, self.bounds[tier]
        labels_tier = 0 if recipe.split.labels == "client" else len(self.tiers) - 1
        shard = Shard.cut(
            self.checkpoint,
            start,
            stop,
            head=tier == labels_tier,
            dtype=DTYPES[recipe.model.dtype],
            attention=recipe.model.attention,
            seed=recipe.seed,
        )
        add_lora(shard, recipe.lora, self.modules, recipe.seed)
        self._start_from(shard)
        if recipe.train.activation_checkpointing:
            shard.checkpoint_activations()
        return shard.to(self.site.device)

    def _start_from(self, shard: Shard) -> None:
        """Start from an existing adapter instead of a new one."""
        if self.recipe.lora.start_from is None:
            return
        _, stored = load_adapter(Path(self.recipe.lora.start_from))
        tensors = in_text_model(stored, shard.layout)
        for name, parameter in adapter_parameters(shard).items():
            parameter.data.copy_(tensors[name])

    def top(self, observe: Callable[[int, StepSums], None] = unobserved) -> Top:
        """What only the highest role decides."""
        weigh = tenant_weights if self.recipe.train.loss_weights == "tenant" else token_weights
        site = self.site
        return Top(weigh, site.all_counts, site.all_sums, self.recipe.train.clip_norm, observe)

    def _link(self, tier: int, index: int, parent: Server) -> LocalLink:
        coding = (coding_of(self.recipe, self._role(tier, index)), coding_of(self.recipe, parent.name))
        link = LocalLink(parent.handle, yields=self.recipe.train.in_flight > 1, coding=coding)
        self.roles.links.setdefault(self.tiers[tier], []).append(link)
        return link

    def _role(self, tier: int, index: int) -> str:
        return self.tiers[tier] if self.counts[tier] == 1 else f"{self.tiers[tier]}-{index}"

    def _parent(self, tier: int, index: int) -> int:
        return index * self.counts[tier + 1] // self.counts[tier]


def _share(count: int, site: Site) -> list[int]:
    """Which of `count` replicas this process holds."""
    return [index for index in range(count) if index * site.size // count == site.rank]


def coding_of(recipe: Recipe, name: str) -> Coding:
    """The codecs of one end of a link of role `name`, with its share of what that role may remember."""
    wire, ends = recipe.wire, 0
    if len(recipe.split.tiers) > 1:
        ends += len(children_of(recipe, name)) * codec(wire.down).feedback
        ends += (parent_of(recipe, name) is not None) * codec(wire.up).feedback
    return Coding(wire.up, wire.down, wire.feedback_mib * MIB // max(1, ends))


def names_rows(recipe: Recipe) -> bool:
    """Whether micro-batches say which rows they hold, for a codec that carries its error on."""
    return any(codec(name).feedback for name in (recipe.wire.up, recipe.wire.down))


def schedule_of(schedule: ScheduleRecipe, steps: int) -> Callable[[int], float]:
    """The learning rate's multiplier as a pure function of the step (0 for the first)."""
    nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    found = get_scheduler(schedule.name, nothing, num_warmup_steps=schedule.warmup_steps, num_training_steps=steps)
    multiplier: Callable[[int], float] = found.lr_lambdas[0]
    return multiplier


def token_weights(counts: Counts) -> LossWeights:
    """Every label weighs the same, as in one big batch."""
    total = sum(sum(labels) for labels in counts.values())
    return dict.fromkeys(counts, 1.0 / total if total else 0.0)


def tenant_weights(counts: Counts) -> LossWeights:
    """Every client with a label weighs the same: the mean over its own labels, then the mean over clients."""
    sums = {client: sum(labels) for client, labels in counts.items()}
    present = sum(1 for total in sums.values() if total)
    return {client: 1.0 / (total * present) if total else 0.0 for client, total in sums.items()}
