"""The door of a server that runs as a process of its own: who takes part in the run, and from which step it goes on.

A *generation* is the stretch of a run between two recoveries. It begins when every child has joined: each tells which
steps it can go back to, the top decides (`recovery.py`), and all go back to that step. It ends when a role is lost for
good or joins anew; whatever was under way is then forgotten, everybody is told to join again (`RejoinError`), and the
step that was not committed everywhere is run again. All of it is a function of (seed, step, micro-batch), so it is the
same step.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from splitllm.errors import RejoinError
from splitllm.roles.meeting import Meeting
from splitllm.roles.recovery import Decision, Standing, decide, standings_from_json
from splitllm.roles.server import Server
from splitllm.roles.together import Tensors
from splitllm.wire.message import Message

logger = logging.getLogger(__name__)


class Past(Protocol):
    """What a role can go back to."""

    def standing(self) -> Standing:
        """The steps whose state is kept."""
        ...

    def restore(self, step: int) -> None:
        """Be as after `step` steps; what came later is forgotten."""
        ...

    def state(self) -> Tensors:
        """Adapter and optimiser as they are."""
        ...

    def adopt(self, step: int, tensors: Mapping[str, Any]) -> None:
        """Be as another role of the tier is after `step` steps."""
        ...

    def adapter(self) -> Tensors:
        """The role's part of the adapter, by the names that an adapter file has."""
        ...

    def closing_words(self) -> dict[str, Any]:
        """What is told of the role at the end of the run."""
        ...


@dataclass(frozen=True)
class Begun:
    """A generation as the top describes it.

    Attributes:
        number: of the generation.
        decision: from which step it goes on, and who needs another's state.
        evaluated: whether the evaluation due at that step is already recorded.
    """

    number: int
    decision: Decision
    evaluated: bool

    def header(self) -> dict[str, Any]:
        """As it travels."""
        decision = self.decision
        return {
            "generation": self.number,
            "step": decision.step,
            "donors": dict(decision.donors),
            "lacking": list(decision.lacking),
            "evaluated": self.evaluated,
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Begun:
        """As it travelled."""
        decision = Decision(int(header["step"]), dict(header["donors"]), tuple(header["lacking"]))
        return cls(int(header["generation"]), decision, bool(header["evaluated"]))


@dataclass(frozen=True)
class Summit:
    """What the top adds to its gate.

    Attributes:
        begin: told of the step from which a generation goes on; tells whether its evaluation is recorded.
        evaluated: told of the clients' losses of an evaluation.
        finish: told of every role's closing words and of the whole adapter.
        first: number of the first generation.
    """

    begin: Callable[[int], bool]
    evaluated: Callable[[int, Mapping[int, Any]], None]
    finish: Callable[[Mapping[str, Any], Tensors], None]
    first: int


class Gate:
    """Stands before a server's `handle`.

    Args:
        server: answers what is let through.
        past: what its own role can go back to.
        children: names of the roles below.
        summit: at the top only.
        patience: seconds after which a child that is away is left out; None to wait for ever.
    """

    def __init__(
        self,
        server: Server,
        past: Past,
        children: list[str],
        *,
        summit: Summit | None = None,
        patience: float | None = None,
    ) -> None:
        self.server, self.past, self.children, self.summit, self.patience = server, past, children, summit, patience
        self.members: list[str] = []
        self.finished = asyncio.Event()
        self.all_left = asyncio.Event()
        self._over: asyncio.Future[None] | None = None
        self._joined: dict[str, tuple[Message, asyncio.Future[Message]]] = {}
        self._settling: asyncio.Task[None] | None = None
        self._gathering_since = self._now()
        self._away = dict.fromkeys(children, self._now())
        self._left: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._next = summit.first if summit is not None else 0
        self._meetings: dict[str, Meeting] = {}
        self._look_later()

    async def handle(self, message: Message) -> Message:
        """Answer one request of a child.

        Raises:
            RejoinError: it belongs to a generation that is over, or that ended while it was under way.
            PeerError: it breaks the protocol.
        """
        if message.kind == "join":
            return await self._join(message)
        if self._over is None or message.generation != self.server.generation or message.sender not in self.members:
            raise RejoinError(f"{self.server.name}: generation {message.generation} is over; join again")
        meeting = self._meetings.get(message.kind)
        return await self._until_over(meeting.join(message) if meeting is not None else self.server.handle(message))

    def away(self, child: str) -> None:
        """The connection of a child is gone."""
        self._away.setdefault(child, self._now())
        self._look_later()

    def back(self, child: str) -> None:
        """A child is connected."""
        self._away.pop(child, None)

    def left(self, child: str) -> None:
        """A child has said goodbye: the run is complete for it."""
        self._left.add(child)
        if self._left.issuperset(self.children):
            self.all_left.set()

    # Whoever stays away for too long is left out.

    def _given_up(self, child: str) -> bool:
        """Whether the run goes on without a child that has not joined."""
        if child in self._left:
            return True
        since = min(self._away.get(child, math.inf), self._gathering_since)
        return self.patience is not None and self._now() - since >= self.patience

    def _look(self) -> None:
        self._timer = None
        lost = [child for child in self.members if self.patience is not None and self._long_away(child)]
        if self._over is not None and lost:
            self.end(f"{lost[0]} stayed away for {self.patience:g} seconds")
        elif self._over is None and self._settling is None:
            self._settle_anew()
        if self._over is None or self._away:
            self._look_later()

    def _long_away(self, child: str) -> bool:
        assert self.patience is not None
        return self._now() - self._away.get(child, math.inf) >= self.patience

    def _look_later(self) -> None:
        if self.patience is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(min(1.0, self.patience / 4), self._look)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    # A generation ends.

    def end(self, reason: str) -> None:
        """End the generation: everybody must join again."""
        if self._over is None:
            return
        logger.info("generation over", extra={"fields": {"reason": reason}})
        self._over.set_result(None)
        self._over, self._joined, self._gathering_since = None, {}, self._now()
        self._look_later()

    async def _until_over(self, answer: Awaitable[Message]) -> Message:
        """The answer, unless the generation ends first."""
        over = self._over
        assert over is not None
        task = asyncio.ensure_future(answer)
        try:
            either: list[asyncio.Future[Any]] = [task, over]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if over.done() or not task.done():
            raise RejoinError(f"{self.server.name}: the run goes back to its last common step; join again")
        error = task.exception()
        if isinstance(error, RejoinError):
            self.end("the role above began anew")
        return task.result()

    # A generation begins.

    async def _join(self, message: Message) -> Message:
        self.end(f"{message.sender} joined")
        earlier = self._joined.pop(message.sender, None)
        if earlier is not None:
            earlier[1].cancel()
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._joined[message.sender] = (message, reply)
        self._settle_anew()
        return await reply

    def _settle_anew(self) -> None:
        """Begin, if all are here; what was decided without the newest of them is dropped."""
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        if self._joined and all(child in self._joined or self._given_up(child) for child in self.children):
            self._settling = asyncio.create_task(self._settle())
            self._settling.add_done_callback(self._settled)

    async def _settle(self) -> None:
        joined = {child: self._joined[child] for child in self.children if child in self._joined}
        standings = {self.server.name: await self.server.device.run(self.past.standing, urgent=True)}
        for message, _ in joined.values():
            standings.update(standings_from_json(message.header["standings"]))
        begun = await self._begun(standings)
        await self.server.device.run(lambda: self._go_back(begun.decision), urgent=True)
        self.members = list(joined)
        self.server.begin(self.members, begun.number)
        self._meetings = {
            "share": Meeting(self.members, self._share),
            "evaluated": Meeting(self.members, self._evaluated),
            "finish": Meeting(self.members, self._finish),
        }
        self._over, self._joined = asyncio.get_running_loop().create_future(), {}
        self._begun_now, self._settling = begun, None
        logger.info("generation begins", extra={"fields": {"step": begun.decision.step, "members": self.members}})
        for message, reply in joined.values():
            if not reply.done():
                reply.set_result(self.server.message("join", message.micro_batch, begun.header()))

    def _settled(self, task: asyncio.Task[None]) -> None:
        """Tell those who wait why nothing begins."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        self._settling = None
        waiting, self._joined = self._joined, {}
        for _, reply in waiting.values():
            if not reply.done():
                reply.set_exception(error)

    async def _begun(self, standings: Mapping[str, Standing]) -> Begun:
        if self.summit is not None:
            decision = decide(standings)
            self._next += 1
            return Begun(self._next, decision, self.summit.begin(decision.step))
        assert self.server.uplink is not None
        header = {"standings": {name: standing.to_json() for name, standing in standings.items()}}
        while True:
            try:
                reply = await self.server.uplink.request(self.server.message("join", (0, 0, 0), header))
            except RejoinError:  # the role above was restarted while it gathered
                continue
            return Begun.from_header(reply.header)

    def _go_back(self, decision: Decision) -> None:
        if self.server.name not in decision.lacking:
            self.past.restore(decision.step)

    # What all children do together, beside the steps.

    async def _share(self, messages: list[Message]) -> Callable[[Message], Message]:
        """The donors' states go up, and down to those who lack them."""
        states: Tensors = {}
        for message in messages:
            states.update(message.tensors)
        decision, name = self._begun_now.decision, self.server.name
        if name in decision.donors.values():
            states.update(self.past.state())
        if self.server.uplink is not None:
            reply = await self.server.uplink.request(self.server.message("share", (0, 0, 0), {}, states))
            states = dict(reply.tensors)
        if name in decision.lacking:
            await self.server.device.run(lambda: self.past.adopt(decision.step, states))
        return lambda message: self.server.message("share", message.micro_batch, {}, states)

    async def _evaluated(self, messages: list[Message]) -> Callable[[Message], Message]:
        losses = {int(k): v for message in messages for k, v in message.header["losses"].items()}
        step = messages[0].step
        self.server.crossed.since_asked()  # what an evaluation sends is not training traffic
        if self.summit is not None:
            self.summit.evaluated(step, losses)
        else:
            assert self.server.uplink is not None
            await self.server.uplink.request(self.server.message("evaluated", (step, 0, 0), {"losses": losses}))
        return lambda message: self.server.message("evaluated", message.micro_batch)

    async def _finish(self, messages: list[Message]) -> Callable[[Message], Message]:
        """Of every tier one role's adapter goes up, and of every role its closing words."""
        adapter, words = dict(messages[0].tensors), dict[str, Any]()
        for message in messages:
            words.update(message.header["roles"])
        adapter.update(self.past.adapter())
        words[self.server.name] = self.past.closing_words()
        if self.summit is not None:
            summit = self.summit
            await self.server.device.run(lambda: summit.finish(words, adapter))
        else:
            assert self.server.uplink is not None
            step = messages[0].micro_batch
            await self.server.uplink.request(self.server.message("finish", step, {"roles": words}, adapter))
        self.finished.set()
        return lambda message: self.server.message("finish", message.micro_batch)
