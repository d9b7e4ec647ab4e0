"""A whole tree of roles in one event loop, each with its own gate, whose processes can be killed at any moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import torch

from splitllm.data.batching import BatchStream, eval_batches
from splitllm.data.corpus import Corpus
from splitllm.deployment.bounds import allowed
from splitllm.deployment.client import Member
from splitllm.errors import RejoinError
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import matched_modules
from splitllm.plan import Plan
from splitllm.recipe import Recipe, children_of, parent_of, role_bounds, role_names, sharing, tier_of
from splitllm.roles.assembly import Assembly, adapter_in, batching_of, entries_of, schedule_of
from splitllm.roles.checks import Allowed
from splitllm.roles.client import Client
from splitllm.roles.device import Inline
from splitllm.roles.gate import Gate
from splitllm.roles.generation import Summit
from splitllm.roles.recovery import Standing
from splitllm.roles.rounds import Rounds
from splitllm.roles.server import Server, StepSums
from splitllm.roles.together import Tensors
from splitllm.roles.worker import Worker
from splitllm.wire.link import Traffic
from splitllm.wire.message import Message

KEPT = 2
SECONDS = 0.01
"""Of a tick."""
Look = Callable[[Message], None]


class TickLoop(asyncio.SelectorEventLoop):
    """Its clock goes on by ticks, so that patience does not depend on how fast the machine is."""

    now = 0.0

    def time(self) -> float:
        return self.now


class Past:
    """What a role keeps when its process is killed: its last two commits."""

    def __init__(self, tier: str, worker: Worker, rounds: Rounds | None = None) -> None:
        self.tier, self.worker, self.rounds, self.finished = tier, worker, rounds, False
        self.kept: dict[int, Tensors] = {}
        self.origins: dict[int, str] = {}
        self._keep(0, "new")

    def standing(self) -> Standing:
        return Standing(self.tier, tuple((step, self.origins[step]) for step in sorted(self.kept, reverse=True)))

    def commit(self, step: int, generation: int) -> None:
        self._keep(step, str(generation))

    def _keep(self, step: int, origin: str) -> None:
        assert step in self.kept or step > max(self.kept, default=-1), (step, set(self.kept))
        self.kept[step] = {name: tensor.clone() for name, tensor in self.state().items()}
        self.kept = {kept: self.kept[kept] for kept in sorted(self.kept)[-KEPT:]}
        self.origins[step] = origin

    def restore(self, step: int) -> None:
        self.worker.load(self.kept[step])
        self.kept = {kept: tensors for kept, tensors in self.kept.items() if kept <= step}

    def adopt(self, step: int, origin: str, tensors: Mapping[str, Any]) -> None:
        self.worker.load(tensors)
        self.kept = {kept: tensors for kept, tensors in self.kept.items() if kept <= step}
        self._keep(step, origin)

    def state(self) -> Tensors:
        return self.worker.state()

    def adapter(self) -> Tensors:
        return adapter_in(self.state()) if self.rounds is None else self.rounds.adapter()

    def final_adapter(self) -> Tensors:
        return self.adapter()

    def closing_words(self) -> dict[str, Any]:
        return {"rss_mib": 1.0}

    def mark_finished(self) -> None:
        assert self.kept
        self.finished = True

    def scramble(self) -> None:
        """A new process knows nothing."""
        for trainable in (self.worker.trainable, *self.worker.own.values()):
            for parameter in trainable.parameters.values():
                parameter.data.fill_(float("nan"))
                parameter.grad = None


class Process:
    """One life of a role: what it has under way dies with it."""

    def __init__(self, name: str) -> None:
        self.name, self.dead = name, asyncio.get_running_loop().create_future()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.gate: Gate | None = None

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        return task

    def kill(self) -> None:
        if self.gate is not None:
            self.gate._absence.patience = None  # its timer goes on, but does nothing
            self.gate.end("killed")
            if self.gate._settling is not None:
                self.gate._settling.cancel()
        for task in self.tasks:
            task.cancel()
        self.dead.set_result(None)


class Wire:
    """The way up from one process, as `RemoteLink` is: everything as JSON, and RejoinError after a restart above."""

    def __init__(self, tree: Tree, process: Process, parent: str) -> None:
        self.traffic = Traffic()
        self._tree, self._process, self._parent = tree, process, parent
        self._peer: Process | None = None

    async def request(self, message: Message) -> Message:
        await self._tree.delay()
        above = await self._connected()
        assert above.gate is not None
        asked = _as_sent(message)
        self._tree.look(asked)
        self._tree.seen.append((message, asked))
        answer = above.spawn(above.gate.handle(asked))
        self._tree.asked.setdefault(self._process, []).append(answer)
        await asyncio.wait({answer, above.dead}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done() or above.dead.done():
            raise RejoinError("the role above was restarted")
        await self._tree.delay()
        if answer.cancelled():
            await asyncio.Future()  # it will never be answered
        return _as_sent(answer.result())

    async def _connected(self) -> Process:
        while self._tree.running.get(self._parent) is None:
            await asyncio.sleep(0)
        above = self._tree.running[self._parent]
        if self._peer is above:
            return above
        self._tree.connect(self._process, above)
        first, self._peer = self._peer is None, above
        if not first:
            raise RejoinError("the role above was restarted")
        return above


class Tree:
    """All roles of a recipe."""

    def __init__(self, recipe: Recipe, corpus: Corpus, *, seed: int = 0, patience: float | None = None) -> None:
        self.recipe, self.corpus, self.patience = recipe, corpus, patience
        base = Checkpoint(recipe.model.base)
        modules = matched_modules(base.config, recipe.lora.targets)
        self.plan = Plan(recipe, base.config, corpus, tuple(modules), True)
        self.allowed: dict[str, Allowed] = {}
        self.schedule = schedule_of(recipe.train.schedule, recipe.train.steps)
        self.assembly = Assembly(
            recipe, corpus, base, modules, role_bounds(recipe, base.config.num_hidden_layers), self.schedule
        )
        self.names = [name for names in reversed(role_names(recipe).values()) for name in names]
        self.pasts = {name: self._past(name) for name in self.names}
        self.running: dict[str, Process] = {}
        self.asked: dict[Process, list[asyncio.Task[Any]]] = {}
        self.sessions: dict[tuple[str, str], Process] = {}
        self.random = Random(seed)
        self.look: Look = lambda message: None
        self.seen: list[tuple[Message, Message]] = []
        self.observed: list[tuple[int, float, int]] = []
        self.evaluations: list[int] = []
        self.adapter: Tensors = {}
        self.ticks = 0
        self.generations = 0
        self.done: set[str] = set()

    def _past(self, name: str) -> Past:
        tier, index = tier_of(self.recipe, name)
        worker = self.assembly.worker(tier, index)
        rounds = self.assembly.rounds(name, tier, worker, entries_of(self.recipe, name) if tier else {})
        return Past(sharing(self.recipe, name), worker, rounds)

    async def delay(self) -> None:
        """As a network is: others go first."""
        for _ in range(self.random.randrange(3)):
            await asyncio.sleep(0)

    def connect(self, process: Process, above: Process) -> None:
        """A hello: what an earlier life of the same child had asked is forgotten."""
        earlier = self.sessions.get((process.name, above.name))
        if earlier is not None and earlier is not process:
            for answer in self.asked.pop(earlier, []):
                answer.cancel()
        self.sessions[process.name, above.name] = process
        assert above.gate is not None
        above.gate.back(process.name)

    def start(self, name: str) -> None:
        """A new process of a role."""
        self.pasts[name].scramble()
        self.done.discard(name)
        process = Process(name)
        if tier_of(self.recipe, name)[0] == 0:
            process.spawn(self._attend(process, self._member(process)))
        else:
            self._serve(process)
        self.running[name] = process

    def kill(self, name: str) -> None:
        """It may be no moment at all that suits."""
        process = self.running.pop(name, None)
        if process is None:
            return
        process.kill()
        self._gone(process)

    def _gone(self, process: Process) -> None:
        above = self.running.get(parent_of(self.recipe, process.name) or "")
        if above is not None and above.gate is not None and self.sessions.get((process.name, above.name)) is process:
            above.gate.away(process.name)

    def _serve(self, process: Process) -> None:
        name, past = process.name, self.pasts[process.name]
        tier, children = tier_of(self.recipe, name)[0], children_of(self.recipe, name)
        parent = parent_of(self.recipe, name)
        server = Server(
            name,
            children,
            past.worker,
            uplink=Wire(self, process, parent) if parent is not None else None,
            top=self.assembly.top(self._observe) if parent is None else None,
            summed=self.assembly.summed(past.worker),
            entries=entries_of(self.recipe, name),
            local=self.assembly.rounding.local(entries_of(self.recipe, name)),
            rounds=past.rounds,
            batching=batching_of(self.recipe, past.worker, Inline()),
            schedule=self.schedule,
            commit=past.commit,
        )
        self.generations += 1000
        summit = Summit(self._begin, self._evaluated, self._finish, self.generations) if parent is None else None
        patience = None if self.patience is None else self.patience * tier
        if name not in self.allowed:
            self.allowed[name] = allowed(self.plan, name)
        ended = self.recipe.train.steps if past.finished and parent is not None else None
        process.gate = Gate(server, past, self.allowed[name], summit=summit, patience=patience, finished_at=ended)
        if parent is not None:
            process.spawn(self._leave(process, lingers=ended is None))

    async def _leave(self, process: Process, *, lingers: bool) -> None:
        """An edge says goodbye when all its children have; one that comes back after the end, when it has waited."""
        assert process.gate is not None
        await process.gate.finished.wait()
        if lingers:
            await process.gate.all_left.wait()
        else:
            await self._waited(process)
        self._goodbye(process)

    async def _waited(self, process: Process) -> None:
        """Until it connects, and a while longer."""
        parent = parent_of(self.recipe, process.name)
        while self.running.get(str(parent)) is None:
            await asyncio.sleep(0)
        self.connect(process, self.running[str(parent)])
        for _ in range(500):
            await asyncio.sleep(0)

    def _goodbye(self, process: Process) -> None:
        above = self.running.get(parent_of(self.recipe, process.name) or "")
        if above is not None and above.gate is not None:
            above.gate.left(process.name)
            above.gate.away(process.name)

    def _member(self, process: Process) -> Member:
        train, index = self.recipe.train, tier_of(self.recipe, process.name)[1]
        past, parent = self.pasts[process.name], parent_of(self.recipe, process.name)
        assert parent is not None
        client = Client(
            process.name,
            index,
            past.worker,
            Wire(self, process, parent),
            BatchStream(self.corpus.train[index], train.batch_size, self.recipe.seed, index),
            eval_batches(self.corpus.eval[index], train.batch_size),
            whole=False,
            summed=self.assembly.summed(past.worker),
            accumulate=train.accumulate,
            in_flight=train.in_flight,
            schedule=self.schedule,
            local=self.assembly.rounding.local({}),
            rounds=past.rounds,
            commit=past.commit,
        )
        station = SimpleNamespace(recipe=self.recipe, device=Inline())
        stop = SimpleNamespace(asked=asyncio.Event())
        return Member(cast(Any, station), client, cast(Any, past), cast(Any, stop))

    async def _attend(self, process: Process, member: Member) -> None:
        while True:
            try:
                await member.take_part()
                break
            except RejoinError:
                await asyncio.sleep(0)
        self.done.add(process.name)
        self._goodbye(process)

    def _begin(self, step: int) -> bool:
        self.observed = [entry for entry in self.observed if entry[0] < step]
        self.evaluations = [at for at in self.evaluations if at <= step]
        return step in self.evaluations

    def _observe(self, step: int, sums: StepSums) -> None:
        self.observed.append((step, sums.norm, len(sums.losses)))

    def _evaluated(self, step: int, losses: Mapping[int, Any]) -> None:
        self.evaluations.append(step)

    def _finish(self, words: Mapping[str, Any], adapter: Tensors) -> None:
        self.adapter = {name: tensor.clone() for name, tensor in adapter.items()}

    async def run(
        self, faults: Mapping[int, list[tuple[str, int]]] | None = None, absent: Sequence[str] = (), most: int = 60_000
    ) -> None:
        """Run to the end.

        Args:
            faults: at which tick which roles are killed, and how many ticks they stay away; 0 for ever.
            absent: never start.
            most: ticks, after which it hangs.
        """
        returns: dict[int, list[str]] = {}
        for name in self.names:
            if name not in absent:
                self.start(name)
        while returns or not self.complete():
            self.tick()
            assert self.ticks < most, f"it hangs: {self.stuck()}"
            for name, ticks in (faults or {}).get(self.ticks, []):
                if name in self.running and not (self.adapter and name == self.names[0]):  # it has nothing left to do
                    self.kill(name)
                    if ticks:
                        returns.setdefault(self.ticks + ticks, []).append(name)
            for name in returns.pop(self.ticks, []):
                self.start(name)
            self._raise_failures()
            await asyncio.sleep(0)
        for process in self.running.values():
            process.kill()

    def tick(self) -> None:
        """Time goes on, for a loop whose clock this is."""
        self.ticks += 1
        loop = asyncio.get_running_loop()
        if isinstance(loop, TickLoop):
            loop.now += SECONDS

    def complete(self) -> bool:
        """Whether every client that runs has its last answer; where all are waited for, also every edge."""
        top = self.running.get(self.names[0])
        clients = {name for name in self.running if tier_of(self.recipe, name)[0] == 0}
        left = self.patience is not None or (top is not None and top.gate is not None and top.gate.all_left.is_set())
        return clients == self.done & clients and bool(clients) and left

    def _raise_failures(self) -> None:
        for process in self.running.values():
            for task in list(process.tasks):
                if task.done():
                    process.tasks.discard(task)
                    if not task.cancelled() and not isinstance(task.exception(), RejoinError | None):
                        task.result()

    def stuck(self) -> str:
        """Who waits, for a message."""
        gates = {
            name: (process.gate._begun is not None, process.gate.members, sorted(process.gate._joined))
            for name, process in self.running.items()
            if process.gate is not None
        }
        return f"{gates} {self.observed} {[(m.sender, m.kind) for m, _ in self.seen[-12:]]}"


def _as_sent(message: Message) -> Message:
    """What arrives: a header of JSON, and copies of the tensors."""
    header = json.loads(json.dumps(message.header, allow_nan=False))
    tensors = {name: tensor.detach().clone() for name, tensor in message.tensors.items()}
    return replace(message, header=header, tensors=tensors)


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two adapters are equal bit for bit."""
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
