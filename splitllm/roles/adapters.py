"""What a role trains: adapters, put into its shard, or all weights of its blocks, each with its optimiser."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from splitllm.model.common import Buffer, Common
from splitllm.model.export import load_adapter
from splitllm.model.families import layout_of
from splitllm.model.full import train_in_full
from splitllm.model.lora import adapter_dtype, adapter_parameters, add_lora, block_of
from splitllm.model.naming import in_text_model
from splitllm.model.shard import Shard
from splitllm.model.tenants import Tenants
from splitllm.model.trainable import Build, Trainable
from splitllm.recipe import (
    LoraRecipe,
    Recipe,
    averaged_blocks,
    client_cuts,
    clients_below,
    full_blocks,
    lora_of,
    own_blocks,
)
from splitllm.recipe.rounds import hides

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
Parameters = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Trained:
    """What trains in one shard, as in `Worker`."""

    together: Trainable
    own: Mapping[int, Trainable] = field(default_factory=dict)
    lent: Mapping[int, Trainable] = field(default_factory=dict)
    common: Common | None = None


@dataclass
class Adapters:
    """Puts adapters into the shards of a run.

    Attributes:
        recipe: LoRA, optimiser and what servers do are read.
        config: of the whole text model.
        modules: what LoRA adapts.
        device: where they train.
        lanes: whether servers serve every client in a lane of its own, where nobody steps together with others.
    """

    recipe: Recipe
    config: PreTrainedConfig
    modules: Sequence[str]
    device: torch.device
    lanes: bool = False

    def of_client(self, shard: Shard, client: int) -> Trained:
        """A client's: its own, or its copy of the one that all share."""
        if not self._own:
            return Trained(self._trainable(self._together(shard, lora_of(self.recipe, client))))
        add_lora(shard, lora_of(self.recipe, client), self.modules, self.recipe.seed)
        return Trained(self._trainable({}), {client: self._trainable(self._started(shard))})

    def of_server(self, shard: Shard, name: str) -> Trained:
        """A server's: what is trained together, and the own ones of all clients below it."""
        if self.lanes:
            return self._in_lanes(shard, name)
        build = self._spread()
        together = self._trainable(self._together(shard, self.recipe.lora), build=build)
        own = self._of_clients(shard, name, self._own, alike=False) if self._own else {}
        return Trained(together, {client: self._trainable(each, build=build) for client, each in own.items()})

    def _in_lanes(self, shard: Shard, name: str) -> Trained:
        """Each client computes with parameters of its own, also where they are copies of what is common."""
        above = range(max(self._own.stop, shard.start), shard.stop)
        mine = self._of_clients(shard, name, self._own, alike=False)
        copies = self._of_clients(shard, name, above, alike=True)
        own = {client: self._trainable(parameters) for client, parameters in mine.items()}
        first = next(iter(copies.values()))
        if not first:
            return Trained(self._trainable({}), own)
        clients = len(clients_below(self.recipe, name))
        averaged = not averaged_blocks(self.recipe, self.config.num_hidden_layers).isdisjoint(above)
        clones = {n: nn.Parameter(p.detach().clone()) for n, p in first.items()}
        common = Common(self._trainable(clones, prox=averaged), buffer_of(self.recipe, clients))
        lent = {client: self._trainable(parameters) for client, parameters in copies.items()}
        for copy in lent.values():
            common.lend(copy)
        return Trained(self._trainable({}), own, lent, common)

    def _together(self, shard: Shard, lora: LoraRecipe) -> Parameters:
        """What a role trains for all of its clients, together with others or between rounds by itself."""
        modules = [name for name in self.modules if block_of(self.config, name) not in self._own]
        add_lora(shard, lora, modules, self.recipe.seed)
        return self._started(shard, full_blocks(self.recipe, self.config.num_hidden_layers))

    def _of_clients(self, shard: Shard, name: str, blocks: range, *, alike: bool) -> dict[int, Parameters]:
        """One adapter for each client below a server, in these blocks: its own, or one that is like all others."""
        recipe, cuts = self.recipe, client_cuts(self.recipe)
        tenants = Tenants(shard, self.modules, blocks, recipe.seed)
        dtype, found = adapter_dtype(DTYPES[recipe.model.dtype]), dict[int, Parameters]()
        for client in clients_below(recipe, name):
            lora = recipe.lora if alike else lora_of(recipe, client)
            found[client] = tenants.add(client, cuts[client], lora, dtype, self.device)
            self._start(found[client])
        return found

    def _spread(self) -> Build | None:
        """What makes a server's optimisers where their state is spread over its processes."""
        zero = self.recipe.server.zero
        if zero.stage not in (1, 2):
            return None
        from splitllm.engines.optimizer import SpreadAdamW

        return lambda parameters, optimizer: SpreadAdamW(parameters, optimizer, zero)

    def _trainable(
        self, parameters: Mapping[str, nn.Parameter], *, prox: bool = True, build: Build | None = None
    ) -> Trainable:
        pull = self.recipe.rounds.prox if prox else 0.0
        return Trainable(parameters, self.recipe.train.optimizer, pull, anchored=hides(self.recipe), build=build)

    def _started(self, shard: Shard, full: Collection[int] = ()) -> Parameters:
        """The adapter that was put into a shard, and its blocks that train in full, as the run starts them."""
        parameters = adapter_parameters(shard.to(self.device)) | train_in_full(shard, full)
        self._start(parameters)
        return parameters

    def _start(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Go on from the adapter that the recipe names; a new one is as it is."""
        for name, tensor in self._start_from.items():
            if name in parameters:
                parameters[name].data.copy_(tensor)

    @cached_property
    def _own(self) -> range:
        return own_blocks(self.recipe, self.config.num_hidden_layers)

    @cached_property
    def _start_from(self) -> dict[str, torch.Tensor]:
        """What all adapters start from, by the text model's names; nothing for new ones."""
        folder = self.recipe.lora.start_from
        return {} if folder is None else in_text_model(load_adapter(Path(folder))[1], layout_of(self.config))


def buffer_of(recipe: Recipe, clients: int) -> Buffer:
    """When what is common steps; by default when as many steps have closed as the server has clients."""
    server, by_labels = recipe.server, recipe.train.loss_weights == "token"
    if server.step_tenants is None and server.step_tokens is None:
        return Buffer(clients, None, by_labels)
    return Buffer(server.step_tenants, server.step_tokens, by_labels)
