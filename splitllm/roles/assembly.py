"""Builds the roles of one process and ties them together: clients at the bottom, servers tier by tier above them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import get_scheduler

from splitllm.data.batching import BatchStream, eval_batches
from splitllm.data.corpus import Corpus
from splitllm.model.frozen import Frozen
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import block_of, in_model
from splitllm.model.trainable import Tensors
from splitllm.policy.batching import Budget
from splitllm.recipe import (
    Recipe,
    ScheduleRecipe,
    children_of,
    client_cuts,
    client_names,
    clients_below,
    goes_by_rounds,
    holders,
    parent_of,
    tier_of,
)
from splitllm.recipe.rounds import WITH_FROZEN
from splitllm.roles.adapters import Adapters
from splitllm.roles.admission import Admission, Room, admissions, batch_sizes
from splitllm.roles.bases import Bases
from splitllm.roles.batcher import Alone, Synchronous
from splitllm.roles.client import Client
from splitllm.roles.continuous import Continuous
from splitllm.roles.convening import Reports
from splitllm.roles.device import Device, Inline
from splitllm.roles.elsewhere import Elsewhere
from splitllm.roles.outcomes import largest
from splitllm.roles.rounding import Rounding
from splitllm.roles.rounds import Kept, Rounds
from splitllm.roles.runner import Batching, Runner
from splitllm.roles.server import Counts, LossWeights, Server, StepSums, Top, unobserved, unobserved_round
from splitllm.roles.together import ADAPTER_SLOT
from splitllm.roles.worker import TENANT, Autocast, Worker
from splitllm.wire.codecs import codec
from splitllm.wire.coding import Coding
from splitllm.wire.link import LocalLink, Traffic

MIB = 2**20
ROLE, COORDINATOR = "at/", "coordinator/"  # before the names of a role's state, where each has another
UNLIMITED = 1 << 62
BATCH_OVERHEAD = 16  # positions that take about as long as what a batch costs beside its positions


@dataclass
class Roles:
    """The roles of one process.

    Attributes:
        clients: those whose branch of the tree this process holds.
        workers: tier -> the workers of its replicas here, by role name.
        links: tier below -> its links up.
        local: whether every role trains an adapter of its own between rounds.
        rounds: what each role does in them.
        coordinator: what a coordinator keeps of them.
        reports: of the averages since they were last taken away.
        elsewhere: what averages this tree with others, if there are any.
    """

    clients: list[Client] = field(default_factory=list)
    workers: dict[str, dict[str, Worker]] = field(default_factory=dict)
    links: dict[str, list[LocalLink]] = field(default_factory=dict)
    local: bool = False
    rounds: list[Rounds] = field(default_factory=list)
    coordinator: Kept | None = None
    reports: Reports = field(default_factory=list)
    elsewhere: Elsewhere | None = None

    def traffic(self) -> Traffic:
        """Bytes that crossed all cuts so far."""
        flat = [link.traffic for links in self.links.values() for link in links]
        return Traffic(sum(t.up for t in flat), sum(t.down for t in flat))

    def state(self) -> Tensors:
        """Adapters and optimisers; of roles that step together one stands for all that hold the same tensor."""
        tensors: Tensors = {}
        for name, worker in self._by_name().items():
            place = f"{ROLE}{name}/" if self.local else ""
            tensors.update({place + key: tensor for key, tensor in worker.state().items()})
        if self.coordinator is not None:
            tensors.update({COORDINATOR + key: tensor for key, tensor in self.coordinator.state().items()})
        return tensors

    def adapter(self) -> Tensors:
        """What trains of the whole model, as `adapter_in` names it.

        Where roles train by themselves, as `Rounds.adapter` names it.
        """
        if not self.local:
            return adapter_in(self.state())
        decided = {name: tensor for rounds in self.rounds for name, tensor in rounds.decided().items()}
        return largest([rounds.adapter() for rounds in self.rounds]) | decided

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put a state on every role."""
        for name, worker in self._by_name().items():
            worker.load(_below(tensors, f"{ROLE}{name}/") if self.local else tensors)
        if self.coordinator is not None:
            self.coordinator.load(_below(tensors, COORDINATOR))

    def _by_name(self) -> dict[str, Worker]:
        return {name: worker for workers in self.workers.values() for name, worker in workers.items()}


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
        bounds: of every role, as in `recipe.role_bounds`.
        schedule: step -> multiplier of the learning rate.
        site: this process among its peers; by default the only one, on the CPU.
        lanes: whether servers serve every client in a lane of its own.
    """

    recipe: Recipe
    corpus: Corpus
    checkpoint: Checkpoint
    modules: Sequence[str]
    bounds: Mapping[str, tuple[int, int]]
    schedule: Callable[[int], float]
    site: Site = field(default_factory=Site)
    lanes: bool = False

    def __post_init__(self) -> None:
        """Nothing is loaded before `build`."""
        self.tiers, self.counts = list(self.recipe.split.tiers), list(self.recipe.split.tiers.values())
        layers = self.checkpoint.config.num_hidden_layers
        self._holders = holders(self.recipe, layers)
        self._adapters = Adapters(self.recipe, self.checkpoint.config, self.modules, self.site.device, self.lanes)
        self.roles = Roles(local=goes_by_rounds(self.recipe))
        self.rounding = Rounding(self.recipe, self.checkpoint.config, self.modules, self.lanes)
        self._bases = Bases(self.recipe, self.checkpoint, self.site.device)

    def build(self) -> Roles:
        """Load the shards and tie the roles together, from the top down."""
        tiers = len(self.tiers)
        if tiers == 1:
            here = _share(self.counts[0], self.site)
            top = self._server(
                "coordinator",
                [self._role(0, index) for index in here],
                None,
                self.top(observe_round=_kept_in(self.roles.reports)),
            )
            self._clients(here, dict.fromkeys(here, top))
            return self.roles
        below = _share(self.counts[-2], self.site)
        top = self._server(
            self._role(tiers - 1, 0),
            [self._role(tiers - 2, index) for index in below],
            self.worker(tiers - 1, 0),
            self.top(observe_round=_kept_in(self.roles.reports)),
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
            )
            below.update(dict.fromkeys(children, server))
        return below

    def _server(self, name: str, children: list[str], worker: Worker | None, above: LocalLink | Top) -> Server:
        entries = entries_of(self.recipe, name) if worker is not None else {}
        level = tier_of(self.recipe, name)[0] if worker is not None else 1
        rounds = self.rounds(name, level, worker, entries)
        if worker is None and rounds is not None:
            assert rounds.averager is not None
            self.roles.coordinator = Kept(rounds.averager, rounds.participation)
        return Server(
            name,
            children,
            worker,
            uplink=above if isinstance(above, LocalLink) else None,
            top=above if isinstance(above, Top) else None,
            summed=self.summed(worker),
            entries=entries,
            local=self.rounding.local(entries),
            rounds=rounds,
            schedule=self.schedule,
            batching=batching_of(self.recipe, worker, Inline(), self._room(name)) if worker is not None else None,
        )

    @cached_property
    def _admissions(self) -> dict[str, Admission]:
        return admissions(self.recipe, self.checkpoint.config, self.modules)

    def _room(self, name: str) -> Room | None:
        return self._admissions[name].room if name in self._admissions else None

    def _clients(self, indices: Sequence[int], parents: Mapping[int, Server]) -> None:
        train, rows = self.recipe.train, batch_sizes(self.recipe, self._admissions)
        for index in indices:
            stream = BatchStream(self.corpus.train[index], rows[index], self.recipe.seed, index)
            worker = self.worker(0, index)
            client = Client(
                self._role(0, index),
                index,
                worker,
                self._link(0, index, parents[index]),
                stream,
                eval_batches(self.corpus.eval[index], rows[index]),
                whole=len(self.tiers) == 1,
                summed=self.summed(worker),
                accumulate=train.accumulate,
                in_flight=train.in_flight,
                schedule=self.schedule,
                name_rows=names_rows(self.recipe),
                local=self.rounding.local({}),
                rounds=self.rounds(self._role(0, index), 0, worker, {}),
            )
            self.roles.clients.append(client)

    def worker(self, tier: int, index: int) -> Worker:
        """One role's shard with its adapters; roles that hold the same blocks share the frozen weights."""
        name, bounds = self._role(tier, index), self.bounds[self._role(tier, index)]
        shard = self._bases.shard(tier, bounds, alone=self._alone(tier, bounds))
        trains = self._adapters.of_client(shard, index) if tier == 0 else self._adapters.of_server(shard, name)
        if self.recipe.train.activation_checkpointing:
            shard.checkpoint_activations()
        site = self.site
        worker = Worker(shard, trains.together, site.device, site.autocast, trains.own, trains.lent, trains.common)
        if goes_by_rounds(self.recipe) and self.recipe.rounds.rule in WITH_FROZEN:
            worker.frozen = Frozen(shard, self.modules, site.device)
        self._bases.settle(tier, bounds, shard)
        self.roles.workers.setdefault(self.tiers[tier], {})[name] = worker
        return worker

    def _alone(self, tier: int, bounds: tuple[int, int]) -> bool:
        """Whether one role only of a tier holds these blocks."""
        return sum(self.bounds[self._role(tier, index)] == bounds for index in range(self.counts[tier])) == 1

    def rounds(
        self, name: str, level: int, worker: Worker | None, entries: Mapping[int, int], lane: int | None = None
    ) -> Rounds | None:
        """A role's part in rounds, if there are any; `lane` as in `Rounding.of`."""
        found = self.rounding.of(name, level, worker, entries, lane)
        self.roles.rounds += [] if found is None else [found]
        return found

    def summed(self, worker: Worker | None) -> frozenset[str]:
        """Names of a role's adapter tensors whose gradients are summed with those of other roles."""
        names = worker.trainable.parameters if worker is not None else {}
        config = self.checkpoint.config
        return frozenset(name for name in names if self._holders[block_of(config, in_model(name))] > 1)

    def top(
        self,
        observe: Callable[[int, StepSums], None] = unobserved,
        observe_round: Callable[[int, Reports], None] = unobserved_round,
    ) -> Top:
        """What only the highest role decides."""
        weigh = tenant_weights if self.recipe.train.loss_weights == "tenant" else token_weights
        site, clip = self.site, self.recipe.train.clip_norm
        self.roles.elsewhere = self.rounding.elsewhere()
        return Top(weigh, site.all_counts, site.all_sums, clip, observe, observe_round, self.roles.elsewhere)

    def _link(self, tier: int, index: int, parent: Server) -> LocalLink:
        coding = (coding_of(self.recipe, self._role(tier, index)), coding_of(self.recipe, parent.name))
        link = LocalLink(parent.handle, yields=self.recipe.train.in_flight > 1, coding=coding)
        self.roles.links.setdefault(self.tiers[tier], []).append(link)
        return link

    def _role(self, tier: int, index: int) -> str:
        return self.tiers[tier] if self.counts[tier] == 1 else f"{self.tiers[tier]}-{index}"

    def _parent(self, tier: int, index: int) -> int:
        return index * self.counts[tier + 1] // self.counts[tier]


def _kept_in(heard: Reports) -> Callable[[int, Reports], None]:
    """What the top does with reports; it knows the list alone, and not the roles, which know the top."""

    def hear(_steps: int, reports: Reports) -> None:
        heard.extend(reports)

    return hear


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


def batching_of(recipe: Recipe, worker: Worker, device: Device, room: Room | None = None) -> Batching:
    """What runs the micro-batches of a server, continuous ones within the room that there is for their graphs."""
    server, runner = recipe.server, Runner(worker, device)
    memory = UNLIMITED if room is None else room.bytes
    budget = Budget(server.tokens, memory, server.wait, server.starve, overhead=BATCH_OVERHEAD)
    if server.batching == "continuous":
        price = (lambda rows: 0) if room is None else room.price
        return Continuous(runner, budget, server.gradient_wait, weights_of(recipe), price)
    return Synchronous(runner, budget) if server.batching == "synchronous" else Alone(runner)


def weights_of(recipe: Recipe) -> dict[str, float]:
    """Of the tenants that have one, by client number as text."""
    numbers = {name: number for number, name in enumerate(client_names(recipe))}
    return {str(numbers[name]): tenant.weight for name, tenant in recipe.server.tenants.items()}


def entries_of(recipe: Recipe, name: str) -> dict[int, int]:
    """The cut layer of every client of a server right above the clients; elsewhere all enter at the bottom."""
    if tier_of(recipe, name)[0] != 1:
        return {}
    cuts = client_cuts(recipe)
    return {client: cuts[client] for client in clients_below(recipe, name)}


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def adapter_in(state: Mapping[str, torch.Tensor]) -> Tensors:
    """What trains, out of a state: by the names of an adapter file, a client's own behind `tenant/CLIENT/`."""
    found = {}
    for key, tensor in state.items():
        tenant, slot, name = _key_parts(key)
        if slot == ADAPTER_SLOT:
            found[tenant + name] = tensor
    return found


def _key_parts(key: str) -> tuple[str, str, str]:
    """Tenant with its slash or nothing, slot, and name."""
    tenant = "/".join(key.split("/", 2)[:2]) + "/" if key.startswith(TENANT) else ""
    slot, _, name = key.removeprefix(tenant).partition("/")
    return tenant, slot, name


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
