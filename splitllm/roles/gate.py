"""The door of a server that runs as a process of its own: who takes part in the run, and from which step it goes on.

A *generation* is the stretch of a run between two recoveries. It begins when every child has joined: each tells which
states it can go back to, the top decides (`recovery.py`), and all go back to that one. It ends when a role is lost for
good or joins anew; whatever was under way is then forgotten, everybody is told to join again (`RejoinError`), and the
step that was not committed everywhere is run again. All of it is a function of (seed, step, micro-batch), so it is the
same step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from splitllm.errors import CheckpointError, DivergedError, PeerError, RejoinError
from splitllm.roles.absence import Absence
from splitllm.roles.checks import Allowed
from splitllm.roles.generation import Begun, Past, Summit
from splitllm.roles.meeting import Meeting
from splitllm.roles.order import Order
from splitllm.roles.outcomes import largest
from splitllm.roles.parts import Part, part_of
from splitllm.roles.recovery import Decision, Standing, decide, standings_from_json
from splitllm.roles.runner import Batching
from splitllm.roles.server import Server
from splitllm.roles.together import Tensors, state_in
from splitllm.wire.message import Message

logger = logging.getLogger(__name__)


class Gate:
    """Stands before a server's `handle`.

    Args:
        server: answers what is let through.
        past: what its own role can go back to.
        allowed: what the roles below may send.
        summit: at the top only.
        patience: seconds after which a child that is away is left out; None to wait for ever.
        finished_at: the last step, where the run was complete before this process started.
        lane: the client that this is the gate of, where each has one of its own (`lanes.py`).

    Attributes:
        children: names of the roles below.
        members: the children that take part in the generation.
        finished: set when the run is complete.
        all_left: set when every child has said goodbye.
    """

    def __init__(
        self,
        server: Server,
        past: Past,
        allowed: Allowed,
        *,
        summit: Summit | None = None,
        patience: float | None = None,
        finished_at: int | None = None,
        lane: int = 0,
    ) -> None:
        self.server, self.past, self.allowed, self.summit, self.lane = server, past, allowed, summit, lane
        self.children = list(allowed.children)
        self.members: list[str] = []
        self.finished = asyncio.Event()
        self._finished_at = finished_at
        if finished_at is not None:
            self.finished.set()
        self._absence = Absence(self.children, patience)
        self.all_left = self._absence.all_left
        self._begun: Begun | None = None
        self._under_way: set[asyncio.Task[Message]] = set()
        self._joined: dict[str, tuple[Message, asyncio.Future[Message]]] = {}
        self._settling: asyncio.Task[None] | None = None
        self._stands_aside = False
        self._needs_more = False
        self._next = summit.first if summit is not None else 0
        self._meetings: dict[str, Meeting] = {}
        self._parts: dict[str, Part] = {}
        self._order = Order(0)
        self._look_later()

    @property
    def batching(self) -> Batching | None:
        """What runs the server's micro-batches."""
        return self.server.batching

    def check(self, message: Message) -> None:
        """Look at a request, by what the recipe allows.

        Raises:
            PeerError: it is not allowed.
        """
        self.allowed.check(message)

    async def handle(self, message: Message) -> Message:
        """Answer one request of a child.

        Raises:
            RejoinError: it belongs to a generation that is over, or that ended while it was under way.
            PeerError: it breaks the protocol.
            DivergedError: a role below found values that are not finite: the run is over.
        """
        if self._finished_at is not None:
            return await self._late(message, self._finished_at)
        if message.kind == "diverged":
            raise DivergedError(message.header["what"])
        if message.kind == "join":
            return await self._join(message)
        if self._begun is None or message.generation != self._begun.number or message.sender not in self.members:
            raise RejoinError(f"{self.server.name}: generation {message.generation} is over; join again")
        self._parts[message.sender].check(message)
        meeting = self._meetings.get(message.kind)
        with self._order.turn(message):
            return await self._until_over(meeting.join(message) if meeting is not None else self.server.handle(message))

    def away(self, child: str) -> None:
        """The connection of a child is gone."""
        self._absence.away(child)

    def back(self, child: str) -> None:
        """A child is connected."""
        self._absence.back(child)

    def left(self, child: str) -> None:
        """A child has said goodbye; before the run is complete it cannot mean it, and is waited for as before."""
        if self.finished.is_set():
            self._absence.left(child)

    def missing(self, seconds: float) -> list[str]:
        """Children that have been away for so many seconds, and are waited for without end."""
        return self._absence.missing(seconds)

    # Whoever stays away for too long is left out.

    def _look(self) -> None:
        lost = [child for child in self.members if self._absence.lost(child)]
        if self._begun is not None and lost:
            self.end(f"{lost[0]} stayed away for {self._absence.patience:g} seconds")
        if self._begun is None and self._settling is None and not self._needs_more:
            self._settle_anew()
        self._look_later()

    def _look_later(self) -> None:
        if self._absence.patience is not None:
            asyncio.get_running_loop().call_later(min(1.0, self._absence.patience / 4), self._look)

    # A generation ends.

    def end(self, reason: str) -> None:
        """End the generation: everybody must join again."""
        if self._begun is None:
            return
        logger.info("generation over", extra={"fields": {"reason": reason}})
        self._begun, self._joined = None, {}
        self._absence.gather()
        for task in self._under_way:  # none of it may reach the device after the new generation
            task.cancel()

    async def _until_over(self, answer: Coroutine[Any, Any, Message]) -> Message:
        """The answer, unless the generation ends first. It is worked out for the others even if its asker is gone."""
        begun, task = self._begun, asyncio.create_task(answer)
        self._under_way.add(task)
        task.add_done_callback(lambda task: self._done(task, begun))
        await asyncio.wait({task})
        if task.cancelled() or self._begun is not begun:
            raise RejoinError(f"{self.server.name}: the run goes back to its last common step; join again")
        return task.result()

    def _done(self, task: asyncio.Task[Message], begun: Begun | None) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and isinstance(task.exception(), RejoinError) and self._begun is begun:
            self.end("the role above began anew")

    # A generation begins.

    async def _join(self, message: Message) -> Message:
        child, aside = message.sender, not message.header["standings"]
        self.end(f"{child} joined")
        self._needs_more = False
        self._absence.aside(child, stands=aside)
        earlier = self._joined.pop(child, None)
        if earlier is not None:
            earlier[1].cancel()
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        if aside:
            reply.set_result(self.server.message("join", message.micro_batch))
        else:
            self._joined[child], self._stands_aside = (message, reply), False
        self._settle_anew()
        try:
            return await reply
        finally:
            if reply.cancelled() and child in self._joined and self._joined[child][1] is reply:
                del self._joined[child]  # its process is gone

    def _settle_anew(self) -> None:
        """Begin, if all are here; what was decided without the newest of them is dropped."""
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        if not all(child in self._joined or self._absence.given_up(child) for child in self.children):
            return
        if self._joined:
            self._settling = asyncio.create_task(self._settle())
        elif self.server.uplink is not None and self._absence.patience is not None and not self._stands_aside:
            self._settling = asyncio.create_task(self._stand_aside())
        if self._settling is not None:
            self._settling.add_done_callback(self._settled)

    async def _settle(self) -> None:
        joined = {child: self._joined[child] for child in self.children if child in self._joined}
        standings = {self.server.name: await self.server.device.run(self.past.standing, urgent=True)}
        for message, _ in joined.values():
            standings.update(standings_from_json(message.header["standings"]))
        begun = await self._decided(standings)
        await self.server.device.run(lambda: self._go_back(begun.decision), urgent=True)
        self._begin(begun, {child: message for child, (message, _) in joined.items()})
        for message, reply in joined.values():
            if not reply.done():
                reply.set_result(self.server.message("join", message.micro_batch, begun.header()))

    def _begin(self, begun: Begun, joined: Mapping[str, Message]) -> None:
        self.members = members = list(joined)
        self._begun, self._joined = begun, {}
        self._parts = {
            child: part_of(self.allowed, child, message.header["standings"], begun.decision)
            for child, message in joined.items()
        }
        self.server.begin(members, begun.number)
        rounds = self.allowed.rounds
        self._order = Order(begun.decision.step, lambda steps: rounds is not None and rounds.due(steps) > 0)
        self._meetings = {
            "share": Meeting(members, self._share),
            "evaluated": Meeting(members, self._evaluated),
            "finish": Meeting(members, self._finish),
        }
        logger.info("generation begins", extra={"fields": {"step": begun.decision.step, "members": members}})

    async def _stand_aside(self) -> None:
        """Nobody is left below: the roles above go on without this branch."""
        assert self.server.uplink is not None
        with contextlib.suppress(RejoinError):  # restarted, it waits for this branch as long as for any
            await self.server.uplink.request(self.server.message("join", (0, self.lane, 0), {"standings": {}}))
        self._stands_aside = True

    def _settled(self, task: asyncio.Task[None]) -> None:
        """Tell those who wait why nothing begins."""
        if self._settling is not task or task.cancelled():  # a newer one has taken its place
            return
        self._settling = None
        error = task.exception()
        if isinstance(error, CheckpointError) and (missing := self._left_out()):
            logger.warning("%s are waited for after all: %s", ", ".join(missing), error)
            self._needs_more = True
        elif error is not None:
            waiting, self._joined = self._joined, {}
            for _, reply in waiting.values():
                if not reply.done():
                    reply.set_exception(error)

    def _left_out(self) -> list[str]:
        """Roles below that none of those who have joined speaks for."""
        below = {role for child in self.allowed.children.values() for role in child.roles}
        return sorted(below.difference(*(message.header["standings"] for message, _ in self._joined.values())))

    async def _decided(self, standings: Mapping[str, Standing]) -> Begun:
        if self.summit is not None:
            decision = decide(standings)
            self._next += 1
            return Begun(self._next, decision, self.summit.begin(decision.step))
        assert self.server.uplink is not None
        header = {"standings": {name: standing.to_json() for name, standing in standings.items()}}
        while True:
            try:
                reply = await self.server.uplink.request(self.server.message("join", (0, self.lane, 0), header))
            except RejoinError:  # the role above was restarted while it gathered
                continue
            return Begun.from_reply(reply)

    def _go_back(self, decision: Decision) -> None:
        if self.server.name not in decision.lacking:
            self.past.restore(decision.step)

    # What all children do together, beside the steps.

    async def _share(self, messages: list[Message]) -> Callable[[Message], Message]:
        """The donors' states go up, and down to those who lack them."""
        states: Tensors = {}
        for message in messages:
            states.update(message.tensors)
        assert self._begun is not None
        decision, name = self._begun.decision, self.server.name
        if name in decision.donors.values():
            states.update(self.past.state())
        if self.server.uplink is not None:
            reply = await self.server.uplink.request(self.server.message("share", (0, self.lane, 0), {}, states))
            states = dict(reply.tensors)
            if name in decision.lacking:
                own = state_in(reply, self.past.adapter())
                await self.server.device.run(lambda: self.past.adopt(decision.step, decision.origin, own))
        return lambda message: self.server.message("share", message.micro_batch, {}, states)

    async def _evaluated(self, messages: list[Message]) -> Callable[[Message], Message]:
        losses = {int(k): v for message in messages for k, v in message.header["losses"].items()}
        step = messages[0].step
        self.server.crossed.since_asked()  # what an evaluation sends is not training traffic
        if self.summit is not None:
            self.summit.evaluated(step, losses)
        else:
            assert self.server.uplink is not None
            await self.server.uplink.request(self.server.message("evaluated", (step, self.lane, 0), {"losses": losses}))
        return lambda message: self.server.message("evaluated", message.micro_batch)

    async def _finish(self, messages: list[Message]) -> Callable[[Message], Message]:
        """The adapters of all below go up, of replicas one, and of every role its closing words.

        What the top has of it counts, whatever those below say: with rounds that is all that they have averaged.
        """
        words = dict[str, Any]()
        for message in messages:
            words.update(message.header["roles"])
        mine = await self.server.device.run(self.past.final_adapter)
        below = [message.tensors for message in messages]
        adapter = largest([*below, mine]) if self.summit is None else {**largest(below), **mine}
        words[self.server.name] = self.past.closing_words()
        if self.summit is not None:
            summit = self.summit
            await self.server.device.run(lambda: summit.finish(words, adapter))
        else:
            assert self.server.uplink is not None
            step = messages[0].micro_batch
            await self.server.uplink.request(self.server.message("finish", step, {"roles": words}, adapter))
        await self.server.device.run(self.past.mark_finished)  # before anybody leaves, and cannot be asked to come back
        self._finished_at = messages[0].step
        self.finished.set()
        return lambda message: self.server.message("finish", message.micro_batch)

    async def _late(self, message: Message, last: int) -> Message:
        """The run is complete: whoever was lost at its very end has only to hear that, and no one above is needed."""
        if message.kind == "finish":
            return self.server.message("finish", message.micro_batch)
        if message.kind != "join":
            raise RejoinError(f"{self.server.name}: the run is complete; join again to hear so")
        standings = standings_from_json(message.header["standings"])
        standings[self.server.name] = await self.server.device.run(self.past.standing, urgent=True)
        end = max(standings[self.server.name].states, default=(0, ""))
        if end[0] != last or any(end not in standing.states for standing in standings.values()):
            raise PeerError(f"the run is complete without {', '.join(sorted(standings))}: nothing is left to do")
        begun = Begun(self.server.generation, Decision(*end, {}, ()), evaluated=True)
        return self.server.message("join", message.micro_batch, begun.header())
