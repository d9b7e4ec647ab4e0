"""One role of a recipe on this machine: checked, with what it needs to talk to its neighbours and to compute."""

from __future__ import annotations

import asyncio
import ipaddress
import reprlib
import resource
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from splitllm.deployment.bounds import limits
from splitllm.deployment.journal import Journal
from splitllm.deployment.reach import WayUp
from splitllm.errors import DivergedError, PeerError, RecipeError, RunInterrupted, SplitLLMError
from splitllm.model.loading import Checkpoint
from splitllm.preflight import Plan, prepare
from splitllm.recipe import Recipe, fingerprint, host_and_port, parent_of, start_digest, tier_of
from splitllm.roles.assembly import Assembly, Site, coding_of, schedule_of
from splitllm.roles.checks import LONGEST_WORDS
from splitllm.roles.device import DeviceThread
from splitllm.roles.recovery import Standing
from splitllm.roles.together import Tensors, is_count
from splitllm.roles.worker import Worker
from splitllm.running.base import open_base
from splitllm.running.world import World, open_world, share_cores
from splitllm.wire.certificates import Credentials, load_credentials
from splitllm.wire.message import Message
from splitllm.wire.remote import Dialer, patience
from splitllm.wire.uplink import RemoteLink

T = TypeVar("T")
MIB = 2**20
_LOADING = threading.Lock()  # transformers patches torch while it builds a model
TELL_SECONDS = 5.0


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
    """

    plan: Plan
    options: Options
    world: World
    base: Checkpoint
    credentials: Credentials | None
    device: DeviceThread

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

    @property
    def replicas(self) -> int:
        """Roles of its tier, which hold the same adapter."""
        return list(self.recipe.split.tiers.values())[self.tier]

    @cached_property
    def schedule(self) -> Callable[[int], float]:
        """Step -> multiplier of the learning rate."""
        return schedule_of(self.recipe.train.schedule, self.recipe.train.steps)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What must be the same wherever this role's run goes on."""
        return {"role": self.name, "recipe": fingerprint(self.recipe), "model": self.base.digest()}

    def journal(self) -> Journal:
        """Of this role; no other process may have it open.

        Raises:
            CheckpointError: one has, or it is that of another run.
        """
        return Journal(self.options.directory / "journal", self.identity)

    def assembly(self, bounds: tuple[int, int] | None = None) -> Assembly:
        """What builds shards; `bounds` are those of this role's tier where a server above tells them."""
        all_bounds = list(self.plan.bounds)
        if bounds is not None:
            all_bounds[self.tier] = bounds
        site = Site(device=self.world.device, autocast=self.world.autocast)
        return Assembly(self.recipe, self.plan.corpus, self.base, self.plan.modules, all_bounds, self.schedule, site)

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

    async def load(self, told: Told | None) -> Worker:
        """The same where it computes, so that this process still hears the user and its peers."""

        def load() -> Worker:
            with _LOADING:
                return self.worker(None if told is None else told.shard)

        return await self.device.run(load)

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
        check_secure(address, self.credentials, self.options)
        dialer = Dialer(address, parent, self.credentials, self.recipe.wire.keepalive)
        hello = {"name": self.name, "recipe": self.identity["recipe"], "model": self.identity["model"]}
        coding, waits = coding_of(self.recipe, self.name), patience(self.recipe.wire.keepalive)
        return RemoteLink(
            dialer.dial, parent, hello, coding, limits(self.plan), patience=waits, on_change=WayUp(parent)
        )

    def address(self) -> str:
        """Where this server listens.

        Raises:
            RecipeError: nobody says.
        """
        address = self.options.listen or self.recipe.wire.addresses.get(self.name)
        if address is None:
            raise RecipeError([f"wire.addresses: {self.name} is missing; add {self.name}: HOST:PORT, or give --listen"])
        check_secure(address, self.credentials, self.options)
        return address


class Past:
    """What a role can go back to: its journal, and the worker that it is about.

    Args:
        station: whose it is.
        journal: of that role.
        worker: its shard.
        values: plain values to keep beside the tensors.
        put_back: takes those values when the role goes back.
    """

    def __init__(
        self,
        station: Station,
        journal: Journal,
        worker: Worker,
        values: Callable[[], Mapping[str, Any]] = dict,
        put_back: Callable[[Mapping[str, Any]], None] = lambda values: None,
    ) -> None:
        self.journal, self.worker, self._tier = journal, worker, station.tier_name
        self._values, self._put_back = values, put_back
        if not self.journal.steps():
            self._keep(0, start_digest(station.recipe))

    def standing(self) -> Standing:
        """The states that are kept."""
        states = ((step, str(self.journal.read(step)[1]["origin"])) for step in self.journal.steps())
        return Standing(self._tier, tuple(states))

    def commit(self, step: int, generation: int) -> None:
        """Keep the state as it is after `step` steps, of which the last was this generation's."""
        self._keep(step, str(generation))

    def restore(self, step: int) -> None:
        """Be as after `step` steps; what came later is forgotten."""
        tensors, values = self.journal.read(step)
        self.worker.trainable.load(tensors)
        self._put_back(values["beside"])
        self.journal.forget_after(step)

    def adopt(self, step: int, origin: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as another role of the tier is in that state."""
        self.worker.trainable.load(tensors)
        self.journal.forget_after(step)
        self._keep(step, origin)

    def _keep(self, step: int, origin: str) -> None:
        self.journal.write(step, self.state(), {"origin": origin, "beside": self._values()})

    def state(self) -> Tensors:
        """Adapter and optimiser as they are."""
        return self.worker.trainable.state()

    def adapter(self) -> Tensors:
        """The role's part of the adapter."""
        prefix = "adapter/"
        return {name.removeprefix(prefix): t for name, t in self.state().items() if name.startswith(prefix)}

    def mark_finished(self) -> None:
        """The run is complete, and stays so when this process ends."""
        self.journal.mark_finished()

    def closing_words(self) -> dict[str, float]:
        """Memory of this process, and what its tensors took at most, in MiB."""
        words = {"rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}
        if self.worker.device.type == "cuda":
            words["gpu_mib"] = round(torch.cuda.max_memory_allocated(self.worker.device) / MIB, 1)
        return words | {f"held: {name}": round(size / MIB, 2) for name, size in self.worker.peak().items()}


async def tell_above(uplink: RemoteLink, name: str, error: DivergedError) -> None:
    """Tell the role above, unless that is where it comes from, that this run cannot go on.

    Args:
        uplink: to the role above.
        name: of this role.
        error: what is not finite here.
    """
    what = " ".join(str(error).split())[:LONGEST_WORDS]
    with suppress(SplitLLMError, TimeoutError):  # the answer is an error
        async with asyncio.timeout(TELL_SECONDS):
            await uplink.request(Message("diverged", name, (0, 0, 0), {"what": what}))


class Stop:
    """Set by SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.asked.set)

    async def unless_asked(self, beginning: Awaitable[T]) -> T:
        """The result of something that comes before the role takes part.

        Raises:
            RunInterrupted: the user stops the process first.
        """
        waiting, asked = asyncio.ensure_future(beginning), asyncio.create_task(self.asked.wait())
        try:
            await asyncio.wait({waiting, asked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            if not waiting.done():
                waiting.cancel()
        if not waiting.done():
            raise RunInterrupted("stopped before it took part; start it again with the same command")
        return waiting.result()


@dataclass(frozen=True)
class Told:
    """What the role above says in its welcome.

    Attributes:
        shard: first block that this role holds, and one past the last.
        batch_size, accumulate, in_flight: of this role's clients.
    """

    shard: tuple[int, int]
    batch_size: int
    accumulate: int
    in_flight: int

    @classmethod
    def from_welcome(cls, welcome: Mapping[str, Any], parent: str, blocks: int) -> Told:
        """As it travelled.

        Args:
            welcome: its values.
            parent: who sent it.
            blocks: of the model.

        Raises:
            PeerError: it does not say what it should.
        """
        shard: Any = welcome.get("shard")
        counts: list[Any] = [welcome.get(key) for key in ("batch_size", "accumulate", "in_flight")]
        whole = isinstance(shard, list) and len(shard) == 2 and all(map(is_count, [*shard, *counts]))
        if not whole or not shard[0] <= shard[1] <= blocks or min(counts) < 1:
            said = reprlib.repr([shard, *counts])
            raise PeerError(f"{parent}: its welcome names no blocks of the {blocks}, or no sizes of batches: {said}")
        return cls((shard[0], shard[1]), *counts)


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
        raise RecipeError([f"train.processes: {recipe.train.processes} is for splitllm train; a role is one process"])
    wire = recipe.wire
    credentials = load_credentials(Path(wire.certificates), options.name) if wire.certificates is not None else None
    share_cores(recipe.train)
    threads = torch.get_num_threads()
    plan = prepare(recipe, data=client is not None, client=client)
    options.directory.mkdir(parents=True, exist_ok=True)
    world = open_world(recipe.train, options.directory)
    base = open_base(recipe, options.directory, world)
    return Station(plan, options, world, base, credentials, DeviceThread(threads))


def check_secure(address: str, credentials: Credentials | None, options: Options) -> None:
    """Plain TCP stays on this machine unless the user says otherwise.

    Raises:
        RecipeError: it would not, or the address is none.
    """
    try:
        host, _ = host_and_port(
            f"{address.removesuffix(':0')}:1" if address.endswith(":0") else address
        )  # port 0 is any free one
    except ValueError as error:
        raise RecipeError([f"--listen: {error}; give --listen 0.0.0.0:7100, say"]) from error
    if credentials is None and not options.insecure and not _is_here(host):
        remedy = "make some with splitllm certs, or give --insecure"
        raise RecipeError([f"wire.certificates: missing, but {address} is beyond this machine; {remedy}"])


def _is_here(host: str) -> bool:
    """Whether a host is this machine, whatever a name service says."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
