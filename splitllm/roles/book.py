"""What comes of the rounds of a server whose clients go at their own pace, and what it remembers of them.

A round is made in one go: what members brought is averaged, carried on to the server above if a round is due there, and
kept on disk before anybody hears of it. Whoever comes late, or again after its process was lost, gets what was kept,
and is not counted twice.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from splitllm.federated.rounds import ADAPTER, Tensors
from splitllm.model.common import Common
from splitllm.policy.history import History, from_json, to_json
from splitllm.roles.convening import Reports
from splitllm.roles.device import Device
from splitllm.roles.outcomes import Outcome
from splitllm.roles.participation import Lesson
from splitllm.roles.rounds import Rounds

SENT, BASE = "sent/", "base/"


@dataclass(frozen=True)
class Arrival:
    """What one member brings to a round.

    Attributes:
        name: of the member: a client, or a server.
        steps: that it has done.
        value: what it has.
        weights: client -> what it counts; of a client itself, or of those below a server.
        spoiled: whether what it has is not finite, so that it brings nothing.
        rows: of a client, that it has.
        lesson: of a client, what it has told since the last round.
        version: of the server's adapter from which it began, where differences are brought.
    """

    name: str
    steps: int
    value: Tensors
    weights: Mapping[int, float]
    spoiled: bool = False
    rows: int = 0
    lesson: Lesson = field(default_factory=Lesson)
    version: int = 0

    @property
    def weight(self) -> float:
        """What it counts altogether."""
        return math.fsum(self.weights.values())


@dataclass(frozen=True)
class Verdict:
    """What members hear of a round.

    Attributes:
        value: what all go on from; None where it is void, and everybody goes on with what it has.
        reports: for the user.
        version: of the server's adapter.
    """

    value: Tensors | None
    reports: Reports = field(default_factory=list)
    version: int = 0


@dataclass(frozen=True)
class Merged:
    """What the server above made of a value: the adapter to go on from, and its version."""

    value: Tensors
    version: int


def still_there(members: Mapping[str, Sequence[int]], over: set[int]) -> list[str]:
    """Members of which something may still come: not all clients that they stand for are over."""
    return [name for name, clients in members.items() if not over.issuperset(clients)]


class Above(Protocol):
    """The rounds of the server above."""

    async def merge(self, steps: int, weights: Mapping[int, float], version: int, value: Tensors) -> Merged | None:
        """Bring a value, and wait for what is made of it; None if nothing is. The same steps are counted once.

        Raises:
            PeerError: the answer is of no use.
        """
        ...


class Keep(Protocol):
    """Where a server keeps what it remembers of rounds."""

    def read(self) -> tuple[Tensors, dict[str, Any]] | None:
        """What was written last; None: nothing."""
        ...

    def write(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Keep these; when this returns they are on disk."""
        ...


class Shared(Protocol):
    """What the clients of a server train in common, with its own place on disk."""

    common: Common

    def keeping(self) -> Callable[[], None]:
        """Take its state now; what is returned writes it."""
        ...


class Book:
    """Of one server.

    Args:
        rounds: its part in rounds, which averages.
        keep: where it is kept; what is there is taken over.
        device: where averages are computed.
        stop: the block after the last that this server holds.
        above: the rounds of the server above; None at the top.
        shared: what the clients of this server train in common, of which other servers have adapters of their own.
        differences: whether the server above wants differences from what it gave last instead of adapters.

    Attributes:
        rounds: as given.
        number: of the last round that was held, or given up.
        history: what is known of the members, for those who choose among them.
        reports: of the last round, for the user.
    """

    def __init__(
        self,
        rounds: Rounds,
        keep: Keep,
        device: Device,
        stop: int,
        above: Above | None = None,
        shared: Shared | None = None,
        *,
        differences: bool = False,
    ) -> None:
        self.rounds, self._keep, self._device, self._stop = rounds, keep, device, stop
        self._above, self._shared, self._differences = above, shared, differences
        self.number, self.history, self._handed, self._kept_own = 0, History(), False, 0
        self.reports: Reports = []
        self._since: dict[int, float] = {}
        self._sent: tuple[int, Tensors] | None = None
        self._base, self._version, self._writing = self._own(1), 0, asyncio.Lock()
        if (found := keep.read()) is not None:
            self._load(*found)

    def given(self, steps: int) -> Tensors | None:
        """What was handed out last of that which members bring after so many steps; None: nothing yet."""
        return self.rounds.handed(steps, max(self.rounds.stops.values())) if self._handed else None

    def of_late(self, steps: int, number: int) -> Verdict:
        """What a member hears that comes after its round: what was handed out then or since, if that was not void.

        Reports are of the last round alone, where whoever was to tell of it may have been lost.
        """
        value = self.given(steps) if number <= self.number - self._kept_own else None
        return Verdict(value, self.reports if number == self.number else [], self._version)

    async def kept(self) -> None:
        """Wait until what was made last is on disk."""
        async with self._writing:
            pass

    async def close(self, arrivals: Sequence[Arrival], steps: int) -> Verdict:
        """Hold a round of these.

        Raises:
            DivergedError: nothing that they brought is finite.
            PeerError: the answer of the server above is of no use.
        """
        rounds = self.rounds
        due = rounds.due(steps)
        made = await self._device.run(lambda: self._averaged(arrivals, due))
        value = None if made.void or made.combined is None else dict(made.combined.value)
        sent_before = self._sent is not None and self._sent[0] == steps  # by a process that was lost
        if value is not None and self._above is not None and not sent_before:
            self._count([arrival for arrival in arrivals if arrival.name not in made.rejected])
        if due > rounds.level:
            value = await self._from_above(steps, value)
        elif value is not None:
            value = rounds.settled(value)
        return await self._end(value, steps, rounds.report(made))

    async def give_up(self, steps: int, why: str) -> Verdict:
        """A round that cannot be held: everybody goes on with what it has, and hears from above if that is due."""
        value = await self._from_above(steps, None) if self.rounds.due(steps) > self.rounds.level else None
        return await self._end(value, steps, self.rounds.report(Outcome(None, {}, 0, why)))

    async def _end(self, value: Tensors | None, steps: int, report: dict[str, Any]) -> Verdict:
        if value is None and steps == self.rounds.recipe.train.steps:
            value = self.given(steps)  # a run ends with one adapter
        async with self._writing:
            if value is not None:
                assert self.rounds.averager is not None
                self.rounds.averager.handed_out(value)
                self._handed = True
            self.number, self.reports = self.number + 1, [report]
            self._kept_own = self._kept_own + 1 if value is None else 0  # rounds in a row
            await self._write()
        return Verdict(value, self.reports, self._version)

    def _averaged(self, arrivals: Sequence[Arrival], due: int) -> Outcome:
        children = [(one.name, list(one.weights), one.value) for one in arrivals if not one.spoiled]
        weights = {client: [count] * self.rounds.level for one in arrivals for client, count in one.weights.items()}
        return self.rounds.average(children, weights, due, [one.name for one in arrivals if one.spoiled])

    def _count(self, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            for client, count in arrival.weights.items():
                self._since[client] = self._since.get(client, 0.0) + count

    # A round of the server above belongs to this one.

    async def _from_above(self, steps: int, value: Tensors | None) -> Tensors | None:
        """What the server above makes of what this one has; brought once, also if this process is lost in between."""
        assert self._above is not None, "no level is above the top"
        if self._sent is None or self._sent[0] != steps:
            self._sent = steps, await self._device.run(lambda: self._to_send(value or {}, steps))
            await self._write()
        sent = self._sent[1]
        brought = {n: t - self._base[n].to(t) for n, t in sent.items()} if self._differences else sent
        merged = await self._above.merge(steps, self._since, self._version, brought)
        if merged is None:
            self._sent = None
            return value
        if self._shared is not None:
            shared = self._shared
            await asyncio.to_thread(await self._device.run(lambda: self._go_on(shared, sent, merged.value, steps)))
        self._sent, self._since, self._version = None, {}, merged.version
        self._base = {name: tensor.detach().clone() for name, tensor in merged.value.items()}
        return merged.value

    def _to_send(self, value: Tensors, steps: int) -> Tensors:
        if self._shared is not None and steps == self.rounds.recipe.train.steps:
            self._shared.common.step()
        common = {} if self._shared is None else self._shared.common.adapter()
        have = value | self.rounds.arithmetic.sent(common, self.rounds.scale(None))
        return {name: have.get(name, t).detach().to("cpu", copy=True) for name, t in self._own(steps).items()}

    def _go_on(self, shared: Shared, sent: Tensors, value: Tensors, steps: int) -> Callable[[], None]:
        rounds, like = self.rounds, shared.common.adapter()
        before, now = (_bare(rounds.arithmetic.received(part, like, rounds.scale(None))) for part in (sent, value))
        reset, last = rounds.recipe.rounds.moments == "reset", steps == rounds.recipe.train.steps
        shared.common.go_on(before, now, steps, reset=reset, last=last)
        return shared.keeping()

    def _own(self, steps: int) -> Tensors:
        """What was handed out last of all blocks that this server and those below it hold."""
        return self.rounds.handed(steps, max(self._stop, *self.rounds.stops.values()))

    # What is kept.

    async def _write(self) -> None:
        assert self.rounds.averager is not None
        tensors = dict(self.rounds.averager.state())
        tensors |= {BASE + name: tensor for name, tensor in self._base.items()} if self._differences else {}
        tensors |= {SENT + name: tensor for name, tensor in self._sent[1].items()} if self._sent is not None else {}
        values = {
            "number": self.number,
            "handed": self._handed,
            "kept_own": self._kept_own,
            "version": self._version,
            "since": {str(client): count for client, count in self._since.items()},
            "sent": None if self._sent is None else self._sent[0],
            "history": to_json(self.history),
            "reports": self.reports,
        }
        held = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        await asyncio.to_thread(self._keep.write, held, values)

    def _load(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        assert self.rounds.averager is not None
        apart = (SENT, BASE)
        self.rounds.averager.load({name: tensor for name, tensor in tensors.items() if not name.startswith(apart)})
        sent, base = ({n.removeprefix(p): t for n, t in tensors.items() if n.startswith(p)} for p in apart)
        self._sent = None if values["sent"] is None else (int(values["sent"]), sent)
        self._base = base or self._base
        self.number, self._version, self._handed = values["number"], values["version"], values["handed"]
        self._kept_own = values["kept_own"]
        self._since = {int(client): float(count) for client, count in values["since"].items()}
        self.history, self.reports = from_json(values["history"]), list(values["reports"])


def _bare(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name.removeprefix(ADAPTER): tensor for name, tensor in tensors.items()}
