"""The ledger of a recipe: what every role will hold in memory, part by part, before anything is loaded.

Of a server in several processes it is what rank 0 holds, which has the clients, and what each other rank does.
Exact are weights, adapters and optimisers, which follow from shapes, and what graphs keep (`model/graphs.py`).
Messages, rounds and what is being written are what they are at most, each micro-batch as long as the recipe allows.
What the allocator leaves unused was measured (docs/benchmarks/memory.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property

from transformers import PreTrainedConfig

from splitllm.model.graphs import Work
from splitllm.model.heads import logits_bytes
from splitllm.model.machine import gives_back
from splitllm.model.memory import (
    activation_bytes,
    dtype_of,
    has_head,
    hidden_bytes,
    recomputed_bytes,
    role_holding,
    tenant_holding,
    work_of,
)
from splitllm.model.passing import passing_bytes
from splitllm.model.quantized_bytes import decoded_bytes
from splitllm.model.spread_bytes import Spread, spread_bytes
from splitllm.policy.admission import MIB
from splitllm.recipe import (
    Recipe,
    client_cuts,
    clients_below,
    lora_of,
    role_bounds,
    role_names,
    spreads_weights,
    tenant_blocks,
    tier_of,
)
from splitllm.roles.admission import Admission, admissions
from splitllm.roles.message_ledger import Messages
from splitllm.roles.per_rank import Share, largest_share
from splitllm.roles.round_ledger import RoundsHeld, rounds_held
from splitllm.roles.under_way import at_once
from splitllm.wire.codecs import codec

HOLES, OF_GRAPHS, MOST_HOLES = 2.0, 0.6, 512 * MIB
"""What glibc leaves unused between tensors: as a multiple of what one block has alive 1.0 to 2.2 were measured, of many
blocks' graphs 0.6, and at most 421 MiB, as blocks beyond 32 MiB lie apart."""
DEEPSPEED = 20 * MIB
"""Of an import of it, 18 MiB were measured."""
WRITTEN = 1
"""Copies of its state that a role has while it writes its journal."""
STEPPING = 3
"""Of what DeepSpeed steps: its gradients, and two buffers of them."""
MOMENTS = 2  # of AdamW, whose state alone is spread


@dataclass(frozen=True)
class Parts:
    """Bytes that one process holds, by what they are for.

    Attributes:
        process: the interpreter with all its imports, and what the checks have left.
        weights: frozen.
        offloaded: weights and optimisers in host memory, of a server that computes elsewhere or puts them together.
        adapters: what trains, also of a server's clients.
        gradients: of the step.
        optimizer: its state.
        activations: what graphs keep between forward and backward.
        scratch: what one block needs for a moment.
        allocator: what it leaves unused, on a CPU.
        logits: one chunk of them, of a role with the head.
        embeddings: rows of the table, of a client.
        messages: what arrives, waits to be sent or is kept until it has arrived; and what codecs carry on.
        rounds: anchors, what is frozen beside weights, what was handed out, and values of a round.
        journal: what is being written of the last step.
    """

    process: int = 0
    weights: int = 0
    offloaded: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    scratch: int = 0
    allocator: int = 0
    logits: int = 0
    embeddings: int = 0
    messages: int = 0
    rounds: int = 0
    journal: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def on_device(self) -> int:
        """Of a role that computes on a device with memory of its own, what lies there."""
        return self.total - self.process - self.offloaded - self.messages - self.journal - self.allocator


PARTS = tuple(part.name for part in fields(Parts))


class Ledger:
    """What the roles of a recipe will hold; worked out when it is asked for.

    Args:
        recipe: as it was resolved.
        config: of the whole text model.
        modules: global names of the modules that LoRA adapts.
        process: bytes of an interpreter with the imports of a role.

    Attributes:
        process: the same.
    """

    def __init__(self, recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str], process: int) -> None:
        self.process = process
        self._book = _Book(recipe, config, tuple(modules), admissions(recipe, config, modules))
        alone = recipe.model_copy(update={"server": recipe.server.model_copy(update={"processes": 1})})
        self._alone = self._book if alone == recipe else replace(self._book, recipe=alone)
        self._names = {name: tier for tier, names in role_names(recipe).items() for name in names}
        self._found: dict[str, Parts] = {}

    def of(self, name: str) -> Parts:
        """One role as a process of its own; of a server in several processes rank 0."""
        if name not in self._found:
            self._found[name] = replace(self._book.role(name), process=self.process + self._book.engine(name))
        return self._found[name]

    def processes(self, name: str) -> list[Parts]:
        """Every process of a role, by rank."""
        rank_0, others = self.of(name), self._book.processes(name) - 1
        return [rank_0, *[replace(self._book.follower(name), process=rank_0.process)] * others]

    def files(self) -> dict[str, int]:
        """Bytes of frozen weights that one process has in files, of the roles that have some there."""
        found = {name: self._book.spread(name).files for name in self._names}
        return {name: size for name, size in found.items() if size}

    def roles(self) -> dict[str, Parts]:
        """Every role as a process of its own, bottom up."""
        return {name: self.of(name) for name in self._names}

    def alike(self) -> list[tuple[str, list[str], Parts]]:
        """Tier, roles and what each of them holds, of roles that hold as much."""
        found: dict[tuple[str, Parts], list[str]] = {}
        for name, tier in self._names.items():
            found.setdefault((tier, self.of(name)), []).append(name)
        return [(tier, names, parts) for (tier, parts), names in found.items()]

    @cached_property
    def together(self) -> Parts:
        """All roles in one process, as in `splitllm train`; of several such processes all together."""
        processes = self._book.recipe.train.processes
        engine = max(self._book.engine(name) for name in self._names)
        return replace(self._alone.together(), process=processes * self.process + engine)

    @property
    def apart(self) -> int:
        """Bytes of all roles as processes on one machine, as in `splitllm up`."""
        return sum(parts.total for name in self._names for parts in self.processes(name))


@dataclass(eq=False)
class _Book:
    """Works out the parts."""

    recipe: Recipe
    config: PreTrainedConfig
    modules: tuple[str, ...]
    admissions: dict[str, Admission]

    @cached_property
    def _messages(self) -> Messages:
        """What crosses the links."""
        return Messages(
            self.recipe, self.config, self.modules, self._rows, trained=lambda name: self._held(name).adapters
        )

    # One role as a process.

    def role(self, name: str) -> Parts:
        """All but the process."""
        parts, works = self._held(name), self._works(name)
        return replace(
            parts,
            activations=self._graphs(name),
            scratch=max(self._passing(work) for work in works)
            + self._unpacked(name)
            + self.spread(name).whole
            + self._stepping(name),
            allocator=0 if self._returns(name) else self._holes(works, self._graphs(name)),
            logits=self._logits(name),
            embeddings=self._embeddings(name),
            messages=self._messages.of(name) + self._shared_out(name),
            journal=WRITTEN * (parts.adapters + self._state(name) + self._rounds(name).anchors),
            rounds=self._rounds(name).total,
        )

    def follower(self, name: str) -> Parts:
        """Of any rank but 0: it computes its share, and has neither clients nor a journal."""
        parts = self.role(name)
        return replace(
            parts,
            optimizer=parts.optimizer if self._spreads_state(name) else 0,
            logits=0,
            messages=2 * (parts.adapters + self._largest(name)),
            rounds=self._rounds(name).anchors,
            journal=0,
        )

    def processes(self, name: str) -> int:
        """How many a role has."""
        return self.recipe.server.processes if tier_of(self.recipe, name)[0] > 0 else 1

    @cached_property
    def _held(self) -> Callable[[str], Parts]:
        """Of a role by its name: all ask for it."""
        return cache(self._holding)

    def _holding(self, name: str) -> Parts:
        """Weights, adapters, their gradients and optimisers."""
        several = self.processes(name)
        price = role_holding(self.recipe, self.config, self.modules, name, processes=several)
        adapters, gradients, optimizer = price.adapter, price.gradients, price.optimizer
        for client in self._tenants(name):
            own = tenant_holding(self.recipe, self.config, self.modules, name, client, processes=several)
            adapters, gradients = adapters + own.adapter, gradients + own.gradients
            optimizer += own.optimizer
        spread, on_host = self.spread(name), 0
        if self.recipe.server.zero.offload_optimizer == "cpu" and tier_of(self.recipe, name)[0] > 0:
            on_host = optimizer
        return Parts(
            weights=spread.device,
            offloaded=spread.host + on_host,
            adapters=adapters,
            gradients=gradients,
            optimizer=optimizer - on_host,
        )

    def _state(self, name: str) -> int:
        """Of all its optimisers, whole, as a journal has it."""
        held = self._held(name)
        return MOMENTS * held.adapters if self._spreads_state(name) else held.optimizer

    def _spreads_state(self, name: str) -> bool:
        return self.recipe.server.zero.stage in (1, 2) and tier_of(self.recipe, name)[0] > 0

    def _stepping(self, name: str) -> int:
        """What a step takes beyond the graphs, which it comes after."""
        buffers = STEPPING * self._held(name).adapters * self._spreads_state(name)
        return max(0, buffers - self._graphs(name))

    def spread(self, name: str) -> Spread:
        """Where its frozen weights lie."""
        return spread_bytes(self.recipe, self.config, name)

    def engine(self, name: str) -> int:
        """What DeepSpeed takes by being imported."""
        return DEEPSPEED if self.recipe.server.zero.stage is not None and tier_of(self.recipe, name)[0] > 0 else 0

    def _returns(self, name: str) -> bool:
        """Whether its allocator gives back at once what is freed."""
        spread = spreads_weights(self.recipe) and tier_of(self.recipe, name)[0] > 0
        return self.recipe.memory_of(name) is not None or spread

    def _tenants(self, name: str) -> list[int]:
        """The clients of a server."""
        return [] if tier_of(self.recipe, name)[0] == 0 else clients_below(self.recipe, name)

    # Activations.

    @cached_property
    def _work(self) -> Callable[[str, int], Work]:
        """Of a role and a client: all ask for it."""
        return cache(self._work_of)

    def _work_of(self, name: str, client: int) -> Work:
        """A client's micro-batch on a role."""
        recipe, layers = self.recipe, self.config.num_hidden_layers
        start, stop = role_bounds(recipe, layers)[name]
        tenants = tier_of(recipe, name)[0] > 0
        entry = max(start, client_cuts(recipe)[client]) if tenants else start
        own = tenant_blocks(recipe, layers) if tenants else range(0)
        work = work_of(recipe, self.config, self.modules, entry, stop, rows=self._rows(client), own=own)
        return replace(work, lora=lora_of(recipe, client))

    def _works(self, name: str) -> set[Work]:
        """What one process of a role computes of each micro-batch."""
        rows = self._share(name).rows
        works = {self._work(name, client) for client in self._clients(name)}
        return works if rows is None else {replace(work, rows=min(rows, work.rows)) for work in works}

    def _share(self, name: str) -> Share:
        """What one process of a role computes of what it does."""
        if self.processes(name) == 1:
            return Share()
        return largest_share(self.recipe, self.config, [self._rows(client) for client in self._clients(name)])

    def _rows(self, client: int) -> int:
        """Of a micro-batch, as its server takes them."""
        sizes = [found.batch_sizes[client] for found in self.admissions.values() if client in found.batch_sizes]
        return min(sizes, default=self.recipe.train.batch_size)

    def _clients(self, name: str) -> list[int]:
        """Those whose micro-batches a role computes."""
        return clients_below(self.recipe, name)

    def _graphs(self, name: str) -> int:
        """Of all micro-batches between forward and backward, and of one block that a backward builds again."""
        works = [self._work(name, client) for client in self._clients(name)]
        each = [activation_bytes(self.config, work) for work in works]
        again = max((recomputed_bytes(self.config, work) for work in self._works(name)), default=0)
        room, share = self.admissions[name].room if name in self.admissions else None, self._share(name)
        if room is not None:
            return int(share.part * room.bytes)
        if self._goes_back_at_once(name):
            return int(share.part * self._batch(works, each)) + again
        return share.of(each) * at_once(self.recipe, self.config, self.modules, name) + again

    def _goes_back_at_once(self, name: str) -> bool:
        """Whether a role with the loss has one graph at a time: of a server that gets the labels."""
        tiers = len(self.recipe.split.tiers)
        return tiers > 1 and tier_of(self.recipe, name)[0] == tiers - 1 and self.recipe.split.labels == "cloud"

    def _batch(self, works: Sequence[Work], each: Sequence[int]) -> int:
        """The graph of the largest batch that a server makes."""
        if self.recipe.server.batching == "none":
            return max(each, default=0)
        positions = sum(work.rows * work.length for work in works)
        share = min(1.0, self.recipe.server.tokens / positions)
        return max(*each, int(sum(each) * share))

    def _passing(self, work: Work) -> int:
        """What a block needs for a moment."""
        return passing_bytes(self.config, replace(work, lora=self.recipe.lora))

    def _unpacked(self, name: str) -> int:
        """The largest weight of a quantised shard, as a product takes it."""
        tier = list(self.recipe.split.tiers)[tier_of(self.recipe, name)[0]]
        return decoded_bytes(self.recipe, self.config, tier)

    def _holes(self, works: Iterable[Work], graphs: int) -> int:
        """What the allocator leaves unused."""
        if gives_back():
            return 0
        alive = 0
        for work in works:
            kept = activation_bytes(self.config, replace(work, checkpointing=False)) // max(1, work.stop - work.start)
            alive = max(alive, self._passing(work) + kept)
        return min(MOST_HOLES, int(max(HOLES * alive, OF_GRAPHS * graphs)))

    def _logits(self, name: str) -> int:
        if not has_head(self.recipe, tier_of(self.recipe, name)[0]):
            return 0
        rows = max((self._rows(client) for client in self._clients(name)), default=0)
        return logits_bytes(self.config, rows * self.recipe.data.max_length, dtype_of(self.recipe))

    def _embeddings(self, name: str) -> int:
        """The rows that were read, and those of all tokens."""
        tier, index = tier_of(self.recipe, name)
        return 2 * hidden_bytes(self.recipe, self.config, self._rows(index)) if tier == 0 else 0

    def _shared_out(self, name: str) -> int:
        """Of rank 0: adapters as it sent them last and the gradients of other ranks, and what comes from those."""
        others = self.processes(name) - 1
        if not others:
            return 0
        return (1 + others) * self._held(name).adapters + 2 * self._largest(name)

    def _largest(self, name: str) -> int:
        """The hidden states of the largest batch that a server makes."""
        each = [hidden_bytes(self.recipe, self.config, self._rows(client)) for client in self._clients(name)]
        return self._batch([self._work(name, client) for client in self._clients(name)], each)

    def _rounds(self, name: str) -> RoundsHeld:
        held = self._held(name)
        return rounds_held(self.recipe, self.config, self.modules, name, held.adapters)

    # All roles in one process.

    def together(self) -> Parts:
        """All but the processes: frozen weights are shared by replicas, and one role computes at a time."""
        names = [name for tier in role_names(self.recipe).values() for name in tier]
        held, rounds = [self._held(name) for name in names], [self._rounds(name) for name in names]
        bases = {self._kind(name): one for name, one in zip(names, held, strict=True)}
        adapters, optimizer = sum(one.adapters for one in held), sum(one.optimizer for one in held)
        copies, top = self.recipe.train.processes - 1, held[-1]
        works = {self._work(name, client) for name in names for client in self._clients(name)}
        lossy = any(codec(name).lossy for name in (self.recipe.wire.up, self.recipe.wire.down))
        feedback, whole = (
            sum(self._messages.feedback(name) for name in names),
            max(self.spread(name).whole for name in names),
        )
        return Parts(
            weights=sum(one.weights for one in bases.values()) + copies * top.weights,
            offloaded=self._on_host(names),
            adapters=adapters + copies * top.adapters,
            gradients=sum(one.gradients for one in held) + copies * top.gradients,
            optimizer=optimizer + copies * top.optimizer,
            activations=self._graphs_together(names),
            scratch=(max(map(self._passing, works)) + max(map(self._unpacked, names))) * (1 + copies) + whole,
            allocator=0
            if any(map(self._returns, names))
            else self._holes(works, self._graphs_together(names)) * (1 + copies),
            logits=max(self._logits(name) for name in names) * (1 + copies),
            embeddings=max(self._embeddings(name) for name in names),
            messages=self._crossing() * (2 if lossy else 1) + feedback,
            rounds=sum(one.total for one in rounds) + self._coordinator(),
            journal=adapters + sum(map(self._state, names)),
        )

    def _kind(self, name: str) -> tuple[int, ...]:
        """Equal of those that share their weights."""
        tier, index = tier_of(self.recipe, name)
        bounds = role_bounds(self.recipe, self.config.num_hidden_layers)[name]
        return tier, *bounds, *([index] if tier > 0 and self.recipe.server.fsdp else [])

    def _on_host(self, names: Sequence[str]) -> int:
        """What offloading puts there: weights once for all that share them, optimisers of each role."""
        weights = {self._kind(name): self.spread(name).host for name in names}
        return sum(weights.values()) + sum(self._held(name).offloaded - self.spread(name).host for name in names)

    def _coordinator(self) -> int:
        """What a tree of whole models holds above them."""
        if len(self.recipe.split.tiers) > 1:
            return 0
        return rounds_held(self.recipe, self.config, self.modules, "coordinator", 0).total

    def _graphs_together(self, names: Iterable[str]) -> int:
        """One client after another, or all at once where they wait for one another or have several under way."""
        branches = dict.fromkeys(self._clients_of_all(), 0)
        for name in names:
            for client in self._clients(name):
                branches[client] += activation_bytes(self.config, self._work(name, client))
        works = [self._work(name, client) for name in names for client in self._clients(name)]
        again = max((recomputed_bytes(self.config, work) for work in works), default=0)
        under_way = min(self.recipe.train.in_flight, self.recipe.train.accumulate)
        if under_way == 1 and self.recipe.server.batching == "none":
            return max(branches.values()) + again
        return under_way * sum(branches.values()) + again

    def _crossing(self) -> int:
        """Hidden states and gradients between roles."""
        alive = min(self.recipe.train.in_flight, self.recipe.train.accumulate)
        clients = self._clients_of_all()
        each = [2 * hidden_bytes(self.recipe, self.config, self._rows(client)) for client in clients]
        several = alive > 1 or self.recipe.server.batching != "none"
        return len(self.recipe.split.cuts) * (alive * sum(each) if several else max(each))

    def _clients_of_all(self) -> range:
        return range(next(iter(self.recipe.split.tiers.values())))
