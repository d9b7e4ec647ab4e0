"""From a recipe to each role's part in its rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from splitllm.federated.averager import Averager, Limits, starting
from splitllm.federated.exchange import Exchange
from splitllm.federated.handed import Handed
from splitllm.federated.outer import Outer
from splitllm.federated.pooling import Rules
from splitllm.federated.rounds import Arithmetic, Tensors
from splitllm.model.export import load_adapter
from splitllm.model.families import layout_of
from splitllm.model.lora import adapter_dtype, adapter_shapes, block_of, in_model, initial_a, scaling_of
from splitllm.model.naming import in_text_model
from splitllm.privacy.fixedpoint import FixedPoint
from splitllm.recipe import (
    LoraRecipe,
    Recipe,
    averaged_blocks,
    children_of,
    client_names,
    clients_below,
    fingerprint,
    goes_by_rounds,
    intervals,
    lora_of,
    own_blocks,
    parent_of,
    role_bounds,
    role_names,
    tier_of,
)
from splitllm.recipe.rounds import asked_at_once, hides
from splitllm.roles.adapters import DTYPES
from splitllm.roles.elsewhere import Elsewhere
from splitllm.roles.hidden import Hiding
from splitllm.roles.local import Local
from splitllm.roles.participation import Participation
from splitllm.roles.rounds import Kept, Rounds
from splitllm.roles.worker import Worker


@dataclass(frozen=True)
class Rounding:
    """Builds what roles need for rounds.

    Attributes:
        recipe: the run's.
        config: of the whole text model.
        modules: what LoRA adapts.
        lanes: whether clients have lanes, and are averaged in halls.
    """

    recipe: Recipe
    config: PreTrainedConfig
    modules: Sequence[str]
    lanes: bool = False

    def local(self, entries: Mapping[int, int]) -> Local | None:
        """How a role steps by itself; None where roles step together, or those of one lane do."""
        if not goes_by_rounds(self.recipe) or self.lanes:
            return None
        return Local(self._block, entries, self.recipe.train.clip_norm)

    def of(
        self, name: str, level: int, worker: Worker | None, entries: Mapping[int, int], lane: int | None = None
    ) -> Rounds | None:
        """A role's part.

        Args:
            name: of the role, which may be a coordinator that the recipe does not name.
            level: 0 for clients, 1 for those right above them.
            worker: its shard.
            entries: client -> its cut layer, where that is above the first block here.
            lane: the client whose part it is alone; None: that of all.
        """
        if not goes_by_rounds(self.recipe):
            return None
        averager = self._averager(name, level) if level and lane is None else None
        below = self._below(name, worker)
        mine = below if lane is None else {lane: below[lane]}
        participation = Participation(self.recipe, mine) if level == 1 else None
        if worker is not None and level:
            worker.kept = Kept(averager, participation)
        client = tier_of(self.recipe, name)[1] if level == 0 else None
        return Rounds(
            self.recipe,
            name,
            level,
            worker,
            self._arithmetic,
            averager,
            scale=lambda other: scaling_of(self._lora(client if other is None else other)),
            block=self._block,
            blocks=averaged_blocks(self.recipe, self.config.num_hidden_layers),
            entries=entries,
            groups=self._groups(name, level) if worker is not None and lane is None else {},
            names=client_names(self.recipe),
            stops=self._stops(name, level, worker),
            participation=participation,
            hiding=self._hiding(name, level, worker),
        )

    def in_hall(self, name: str, level: int) -> Rounds:
        """What averages for all lanes of a server, which bring what is trained there as well."""
        start = self._arithmetic.sent(self._start(), scaling_of(self.recipe.lora))
        return Rounds(
            self.recipe,
            name,
            level,
            None,
            self._arithmetic,
            self._averager(name, level, start),
            scale=lambda other: scaling_of(self._lora(other)),
            block=self._block,
            blocks=averaged_blocks(self.recipe, self.config.num_hidden_layers),
            names=client_names(self.recipe),
            stops={child: stop for child, stop in self._all_stops().items() if child in children_of(self.recipe, name)},
        )

    def _hiding(self, name: str, level: int, worker: Worker | None) -> Hiding | None:
        """What a client, or the server right above clients, has agreed on."""
        if level > 1 or not hides(self.recipe):
            return None
        recipe, rounds = self.recipe, self.recipe.rounds
        tiers = len(recipe.split.tiers)
        server = str(parent_of(recipe, name)) if level == 0 and tiers > 1 else name if tiers > 1 else "coordinator"
        clients = len(clients_below(recipe, server)) if tiers > 1 else len(client_names(recipe))
        secure, private, some = rounds.secure, rounds.privacy, rounds.participation
        asked = asked_at_once(recipe, clients)
        fixed = FixedPoint.finest(private.clip or secure.range, asked, secure.bits)
        threshold = secure.threshold or max(2, asked // 2 + 1)
        return Hiding(
            fingerprint(recipe),
            server,
            fixed,
            threshold if secure.aggregate else None,
            private.clip,
            private.noise,
            private.delta,
            some.share * clients if some.policy == "poisson" else asked,
        )

    def elsewhere(self) -> Elsewhere | None:
        """What stands above the top; None where nothing does."""
        recipe, rules = self.recipe, self._rules
        if recipe.rounds.exchange is None:
            return None
        first = min(intervals(recipe)[-1], recipe.train.steps)
        start = starting(self._start()) if rules.look_at_changes else None
        exchange = Exchange(recipe.rounds.exchange, rules)
        return Elsewhere(exchange, rules.arithmetic, recipe.train.steps, first, start)

    def _below(self, name: str, worker: Worker | None) -> dict[int, str]:
        """The clients below a role; below a coordinator all."""
        names = dict(enumerate(client_names(self.recipe)))
        return names if worker is None else {client: names[client] for client in clients_below(self.recipe, name)}

    def _stops(self, name: str, level: int, worker: Worker | None) -> dict[str, int]:
        if not level:
            return {}
        children = client_names(self.recipe) if worker is None else children_of(self.recipe, name)
        return {child: self._all_stops()[child] for child in children}

    def _all_stops(self) -> dict[str, int]:
        return {name: stop for name, (_, stop) in role_bounds(self.recipe, self.config.num_hidden_layers).items()}

    def _lora(self, client: int | None) -> LoraRecipe:
        return self.recipe.lora if client is None else lora_of(self.recipe, client)

    @property
    def _arithmetic(self) -> Arithmetic:
        rounds = self.recipe.rounds
        return Arithmetic(rounds.rule, scaling_of(self.recipe.lora), rounds.trim)

    def _averager(self, name: str, level: int, start: Tensors | None = None) -> Averager:
        """Of a server; `start` where it has to know what all started from."""
        top = level == len(intervals(self.recipe))
        rules = replace(self._rules, outer=self._rules.outer if top else None)
        if start is None:
            start = starting(self._start()) if rules.look_at_changes or hides(self.recipe) else {}
        return Averager(rules.arithmetic, rules.limits, rules.outer, start, self._handed(name))

    def _handed(self, name: str) -> Handed | None:
        """What comes out of the run, of the top."""
        top = len(self.recipe.split.tiers) == 1 or parent_of(self.recipe, name) is None
        return Handed(self._arithmetic, self._largest_start()) if top else None

    @property
    def _rules(self) -> Rules:
        """By which the highest level averages."""
        rounds, outer = self.recipe.rounds, None
        if rounds.outer.name != "none":
            outer = Outer(rounds.outer.name, rounds.outer.lr, rounds.outer.betas, rounds.outer.tau)
        return Rules(self._arithmetic, Limits(rounds.clip_update, rounds.reject_beyond), outer)

    def _groups(self, name: str, level: int) -> dict[int, list[list[int]]]:
        """Lower level -> the clients of each of its roles below this one."""
        below = set(clients_below(self.recipe, name)) if level else set()
        found = {}
        for lower, roles in list(enumerate(role_names(self.recipe).values()))[1:level]:
            groups = [clients_below(self.recipe, role) for role in roles]
            found[lower] = [group for group in groups if below.issuperset(group)]
        return found

    @cached_property
    def _block(self) -> Callable[[str], int]:
        """Adapter tensor -> global index of its block; roles ask for every tensor in every step."""
        config = self.config
        return cache(lambda tensor: block_of(config, in_model(tensor)))

    def _largest_start(self) -> Tensors:
        """What rounds average as the run starts it, as a value, of the largest rank that somebody has of it."""
        recipe, layers, found = self.recipe, self.config.num_hidden_layers, Tensors()
        rank_of = {block: self._largest_rank(block) for block in averaged_blocks(recipe, layers)}
        for rank in sorted(set(rank_of.values())):
            whole = self._start(rank)
            found |= {name: tensor for name, tensor in whole.items() if rank_of.get(self._block(name)) == rank}
        return self._arithmetic.sent(found, scaling_of(recipe.lora))

    def _largest_rank(self, block: int) -> int:
        """Of those who train an adapter of a block."""
        recipe, bounds = self.recipe, role_bounds(self.recipe, self.config.num_hidden_layers)
        own, clients = block in own_blocks(recipe, self.config.num_hidden_layers), client_names(recipe)
        holders = [name for name, (start, stop) in bounds.items() if start <= block < stop]
        ranks = [lora_of(recipe, c).rank for c, name in enumerate(clients) if own or name in holders]
        return max([*ranks, *(recipe.lora.rank for name in holders if not own and name not in clients)])

    def _start(self, rank: int | None = None) -> Tensors:
        """The whole adapter as the run starts it, of the recipe's rank or another."""
        recipe, dtype = self.recipe, adapter_dtype(DTYPES[self.recipe.model.dtype])
        given: Tensors = {}
        if recipe.lora.start_from is not None:
            given = in_text_model(load_adapter(Path(recipe.lora.start_from))[1], layout_of(self.config))
        start: Tensors = {}
        lora = recipe.lora if rank is None else recipe.lora.model_copy(update={"rank": rank})
        for name, shape in adapter_shapes(self.config, lora, self.modules).items():
            new = initial_a(name, shape, recipe.seed) if ".lora_A." in name else torch.zeros(shape)
            if "magnitude" not in name:
                start[name] = given.get(name, new).to(dtype)
        return start
