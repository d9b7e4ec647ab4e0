"""One role of a recipe on this machine: checked, with what it needs to talk to its neighbours and to compute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from splitllm.deployment.above import Told
from splitllm.deployment.bounds import limits
from splitllm.deployment.footprint import Footprint, settle_allocator
from splitllm.deployment.journal import Journal
from splitllm.deployment.reach import WayUp
from splitllm.deployment.secure import check_secure
from splitllm.errors import RankError, RecipeError
from splitllm.model.loading import Checkpoint
from splitllm.model.machine import give_back
from splitllm.model.shard import BUILDING
from splitllm.plan import Plan, refuse_without_room
from splitllm.preflight import prepare
from splitllm.ranks.leader import Leader, begin, end
from splitllm.ranks.peers import Peers
from splitllm.recipe import (
    Recipe,
    fingerprint,
    goes_by_lanes,
    parent_of,
    spreads_weights,
    tier_of,
)
from splitllm.roles.assembly import Assembly, Site, coding_of, schedule_of
from splitllm.roles.device import DeviceThread
from splitllm.roles.per_rank import drops
from splitllm.roles.worker import Worker
from splitllm.running.base import open_base
from splitllm.running.world import Processes, World, open_world, share_cores
from splitllm.wire.certificates import Credentials, load_credentials
from splitllm.wire.remote import Dialer, patience
from splitllm.wire.uplink import RemoteLink

LET_GO_SECONDS = 10.0


@dataclass(frozen=True)
class Options:
    """What is said of one process on its command line.

    Attributes:
        name: of the role.
        directory: receives its journal and, at the top, what a run leaves.
        listen: HOST:PORT of a server where it is not that of `wire.addresses`.
        metrics: HOST:PORT for Prometheus, or None.
        insecure: allow plain TCP beyond this machine.
    """

    name: str
    directory: Path
    listen: str | None = None
    metrics: str | None = None
    insecure: bool = False


@dataclass
class Station:
    """A role in a process of its own.

    Attributes:
        plan: the checked recipe.
        options: of the command line.
        world: device and precision.
        base: the model.
        credentials: for mutual TLS, or None.
        device: the thread that computes.
        peers: the ranks of a server that takes several processes; None: it is one.
    """

    plan: Plan
    options: Options
    world: World
    base: Checkpoint
    credentials: Credentials | None
    device: DeviceThread
    peers: Peers | None = None

    @property
    def recipe(self) -> Recipe:
        """What the user asks for."""
        return self.plan.recipe

    @property
    def name(self) -> str:
        """Of the role."""
        return self.options.name

    @property
    def tier(self) -> int:
        """Number of its tier, from the bottom."""
        return tier_of(self.recipe, self.name)[0]

    @property
    def tier_name(self) -> str:
        """Name of its tier."""
        return list(self.recipe.split.tiers)[self.tier]

    @cached_property
    def footprint(self) -> Footprint:
        """What it takes of memory."""
        processes, rank = self.plan.ledger.processes(self.name), self.world.rank
        return Footprint(processes[rank], rank if len(processes) > 1 else None)

    @cached_property
    def schedule(self) -> Callable[[int], float]:
        """Step -> multiplier of the learning rate."""
        return schedule_of(self.recipe.train.schedule, self.recipe.train.steps)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What must be the same wherever this role's run goes on."""
        return {"role": self.name, "recipe": fingerprint(self.recipe), "model": self.base.digest()}

    def journal(self, lane: str | None = None) -> Journal:
        """Of this role, or of one lane of it; no other process may have it open.

        Raises:
            CheckpointError: one has, or it is that of another run.
        """
        folder = self.options.directory / "journal"
        if lane is None:
            return Journal(folder, self.identity)
        return Journal(folder / lane, {**self.identity, "lane": lane})

    def assembly(self, bounds: tuple[int, int] | None = None) -> Assembly:
        """What builds shards; `bounds` are those of this role where a server above tells them."""
        all_bounds = self.plan.role_bounds | ({self.name: bounds} if bounds is not None else {})
        site = Site(device=self.world.device, autocast=self.world.autocast)
        lanes = goes_by_lanes(self.recipe)
        return Assembly(
            self.recipe, self.plan.corpus, self.base, self.plan.modules, all_bounds, self.schedule, site, lanes
        )

    async def welcomed(self, uplink: RemoteLink) -> Told:
        """Connect, and hear what the role above has to say.

        Raises:
            PeerError: it refuses this role, or says nothing of use.
        """
        welcome = await uplink.welcome()
        return Told.from_welcome(welcome, str(parent_of(self.recipe, self.name)), self.plan.config.num_hidden_layers)

    def worker(self, bounds: tuple[int, int] | None = None) -> Worker:
        """This role's shard with its adapter."""
        return self.assembly(bounds).worker(self.tier, tier_of(self.recipe, self.name)[1])

    def rank_worker(self, peers: Peers, bounds: tuple[int, int] | None) -> Worker:
        """The same on one of several ranks, which load in step where an engine spreads something over them.

        Raises:
            RankError: they could not.
        """
        try:
            return self.worker(bounds)
        except RuntimeError as error:
            raise peers.failed(error) from error

    async def load(self, told: Told | None) -> Worker:
        """The same where it computes, so that this process still hears the user and its peers; on all ranks."""

        def load() -> Worker:
            bounds = None if told is None else told.shard
            with BUILDING:
                if self.peers is None:
                    return self.worker(bounds)
                begin(self.peers, bounds)
                worker = self.rank_worker(self.peers, bounds)
                whole = drops(self.recipe, self.plan.config)
                worker.ranks = Leader(worker, self.peers, whole=whole, in_step=spreads_weights(self.recipe))
                return worker

        return await self.device.run(load)

    async def let_go(self) -> None:
        """Tell the other ranks, if there are any, that this server has ended; one that is gone is told nothing."""
        if self.peers is None:
            return
        with suppress(RankError, TimeoutError):
            async with asyncio.timeout(LET_GO_SECONDS):
                await self.device.run(partial(end, self.peers))

    def uplink(self) -> RemoteLink:
        """The way to the role above; connects at once.

        Raises:
            RecipeError: nobody says where that is.
        """
        parent = parent_of(self.recipe, self.name)
        assert parent is not None
        address = self.recipe.wire.addresses.get(parent)
        if address is None:
            raise RecipeError(
                [f"wire.addresses: {parent} is missing, to which {self.name} connects; add {parent}: HOST:PORT"]
            )
        check_secure(address, self.credentials, insecure=self.options.insecure)
        dialer = Dialer(address, parent, self.credentials, self.recipe.wire.keepalive)
        hello = {"name": self.name, "recipe": self.identity["recipe"], "model": self.identity["model"]}
        coding, waits = coding_of(self.recipe, self.name), patience(self.recipe.wire.keepalive)
        envelopes = limits(self.plan, self.plan.role_bounds[self.name][1])
        return RemoteLink(
            dialer.dial, parent, hello, coding, envelopes, patience=waits, on_change=WayUp(parent, address)
        )

    def address(self) -> str:
        """Where this server listens.

        Raises:
            RecipeError: nobody says.
        """
        address = self.options.listen or self.recipe.wire.addresses.get(self.name)
        if address is None:
            raise RecipeError([f"wire.addresses: {self.name} is missing; add {self.name}: HOST:PORT, or give --listen"])
        check_secure(address, self.credentials, insecure=self.options.insecure)
        return address


def open_station(recipe: Recipe, options: Options, *, client: int | None) -> Station:
    """Check everything that can be checked at home.

    Args:
        recipe: what the user asks for.
        options: of the command line.
        client: number of the client, None for a server.

    Raises:
        RecipeError: the recipe cannot run.
        CertificateError, CheckpointError: something on this machine is not as it must be.
    """
    if len(recipe.split.tiers) < 2:
        raise RecipeError(["split.tiers: a deployment needs at least two tiers; use splitllm train"])
    if recipe.train.processes != 1:
        advice = "of a server in several processes tell server.processes"
        raise RecipeError([f"train.processes: {recipe.train.processes} is for splitllm train; {advice}"])
    processes = Processes(1, None) if client is not None else Processes(recipe.server.processes, "server.processes")
    wire = recipe.wire
    credentials = load_credentials(Path(wire.certificates), options.name) if wire.certificates is not None else None
    settle_allocator(recipe, options.name)
    share_cores(recipe.train, processes)
    threads = torch.get_num_threads()
    tier = list(recipe.split.tiers)[tier_of(recipe, options.name)[0]]
    plan = prepare(recipe, data=client is not None, client=client, tier=tier)
    refuse_without_room(plan, options.name)
    options.directory.mkdir(parents=True, exist_ok=True)
    world = open_world(recipe.train, options.directory, processes)
    base = open_base(recipe, options.directory, world)
    peers = Peers(options.name) if world.size > 1 else None
    station = Station(plan, options, world, base, credentials, DeviceThread(threads), peers)
    station.footprint.announce()
    give_back()  # what working that out has left
    return station
