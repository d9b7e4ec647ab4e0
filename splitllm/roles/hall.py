"""Where members of a round come when they are ready, and nobody waits for ever for the slow.

Of a server whose clients go at their own pace. `policy/rounds.py` decides who is waited for, and how long; `book.py`
makes the round. A member that comes after its round was held gets what was handed out last, and what it brings is not
counted: it would be of an older adapter.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

from splitllm.errors import PeerError
from splitllm.policy import rounds as policy
from splitllm.policy.history import Report, recorded, utility
from splitllm.policy.participation import Asked, Rules, select
from splitllm.policy.rounds import Closed, Round, Waiting
from splitllm.policy.sampling import Draw
from splitllm.roles.book import Arrival, Book, Verdict, still_there
from splitllm.roles.convening import Reports
from splitllm.roles.rounds import Rounds

logger = logging.getLogger(__name__)


class Hall:
    """The rounds of one server.

    Args:
        book: makes rounds, and remembers them.
        members: name -> the clients that it stands for: itself, or those below it.
        rules: who is asked, and how long it is waited for.
        every: steps between rounds.
        steps: of the run.
        seed: of draws.
        clock: seconds.
        observe: told of every round, at the top.
    """

    def __init__(
        self,
        book: Book,
        members: Mapping[str, Sequence[int]],
        rules: Rules,
        *,
        every: int,
        steps: int,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[int, Reports], None] | None = None,
    ) -> None:
        self.book, self._members, self._rules = book, dict(members), rules
        self._every, self._steps, self._seed, self._clock, self._observe = every, steps, seed, clock, observe
        self._over: set[int] = set()
        self._away, self._met = set[str](), set[str]()
        self._round: Round | None = None
        self._here: dict[str, Arrival] = {}
        self._outcome: asyncio.Future[Verdict] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def rounds(self) -> Rounds:
        """The server's part in rounds."""
        return self.book.rounds

    def asks(self, name: str, step: int) -> bool:
        """Whether a member is to train in a step: its round is under way, and wants it."""
        self._met.add(name)
        if step // self._every != self.book.number or self._closing is not None:
            return False
        return name in self._under_way().asked

    async def bring(self, arrival: Arrival) -> Verdict:
        """Take part in a round; the answer comes when it was held.

        Raises:
            DivergedError: nothing that anybody brought is finite.
            PeerError: its round is not due yet, or the server above gave no answer of use.
        """
        self._met.add(arrival.name)
        number = -(-arrival.steps // self._every)
        if number <= self.book.number:
            return await self._late(arrival, number)
        if number > self.book.number + 1:
            raise PeerError(f"{arrival.name} brought round {number}, where {self.book.number + 1} is due")
        if self._outcome is None:
            self._outcome = asyncio.get_running_loop().create_future()
        outcome = self._outcome
        if self._closing is None and arrival.name not in self._here:
            self._here[arrival.name] = arrival
            self._arrives(arrival, self._clock())
            self.look()
        return await asyncio.shield(outcome)

    def away(self, name: str) -> None:
        """The connection of a member is gone: until it is back it is not asked for a new round, if it is a client."""
        if self.rounds.level == 1:
            self._away.add(name)

    def back(self, name: str) -> None:
        """A member is connected."""
        self._met.add(name)
        self._away.discard(name)

    def over(self, client: int) -> None:
        """Nothing more will come of a client, nor of a member that has no other."""
        self._over.add(client)
        gone = list(self._members.keys() - self._there())
        if self._round is not None:
            self._round = policy.leave(self._round, gone)
            self.look()

    # Who is asked.

    def _there(self) -> list[str]:
        return still_there(self._members, self._over)

    def _under_way(self) -> Round:
        if self._round is None:
            draw = Draw(self._seed, self.book.number + 1, 0)
            there = self._there()
            self._round = self._begun(self._asked([n for n in there if n not in self._away], there, draw), draw)
        return self._round

    def _asked(self, present: Sequence[str], there: Sequence[str], draw: Draw) -> Asked:
        """Those whom the policy draws; where too few are present, all that there are: it is waited for them."""
        while True:
            found = select(self._rules, present, draw, self.book.history)
            if isinstance(found, Asked):
                return found
            if not found.redraw:
                logger.warning("%s", found.line)
                return Asked(tuple(there), min(self._rules.minimum, max(1, len(there))))
            draw = Draw(draw.seed, draw.number, draw.attempt + 1)

    def _begun(self, asked: Asked, draw: Draw) -> Round:
        return policy.begin(self._rules, asked, draw, self._clock())

    # Who has come, and what is done then.

    def _arrives(self, arrival: Arrival, at: float) -> None:
        this = self._under_way()
        if self._is_idle(arrival):
            self._round = policy.leave(this, [arrival.name])
            return
        self._round, told = policy.arrive(this, arrival.name, this.key, at)
        if told.line:
            logger.info("%s", told.line)

    def _is_idle(self, arrival: Arrival) -> bool:
        """Whether it has nothing to bring, and waits for the outcome."""
        return arrival.spoiled or (not arrival.weight and self.book.rounds.level == 1)

    def look(self) -> None:
        """Wait on, hold the round, try it again or give it up."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._closing is not None or not self._here:
            return
        if all(name in self._here and self._here[name].spoiled for name in self._there()):
            self._closing = asyncio.create_task(self._close(Closed((), ())))
            return
        found = policy.decide(self._under_way(), self._clock())
        if isinstance(found, Waiting):
            self._look_at(found.until)
        elif isinstance(found, Closed):
            self._closing = asyncio.create_task(self._close(found))
        elif not self._again(found.line):
            self._closing = asyncio.create_task(self._close(found.line))

    def _look_at(self, then: float) -> None:
        if math.isfinite(then):
            seconds = max(0.0, then - self._clock())
            self._timer = asyncio.get_running_loop().call_later(seconds, self.look)

    def _again(self, line: str) -> bool:
        """Try a round anew with all that can still bring something, until they are enough; False: they cannot be."""
        this = self._under_way()
        idle = {name for name, one in self._here.items() if self._is_idle(one)}
        able = [name for name in self._there() if name not in idle]
        if len(able) < self._rules.minimum:
            return False
        logger.warning("%s", line)
        draw = Draw(self._seed, this.key[0], this.key[1] + 1)
        self._round = self._begun(Asked(tuple(able), self._rules.minimum), draw)
        for arrival in list(self._here.values()):
            self._arrives(arrival, self._round.began)
        self._look_at(self._round.began)
        return True

    async def _close(self, found: Closed | str) -> None:
        """Hold the round of its members, or give it up for what is said; then tell all that are here."""
        outcome, this = self._outcome, self._under_way()
        assert outcome is not None
        steps = min(self._steps, this.key[0] * self._every)
        try:
            if isinstance(found, Closed):
                self._remember(this, found)
                spoiled = [one for one in self._here.values() if one.spoiled]
                verdict = await self.book.close([self._here[name] for name in found.members] + spoiled, steps)
            else:
                verdict = await self.book.give_up(steps, found)
            if self._observe is not None:
                self._observe(steps, verdict.reports)
        except BaseException as error:
            outcome.set_exception(error)
            outcome.exception()  # nobody may be waiting
            if not isinstance(error, Exception):
                raise
        else:
            outcome.set_result(verdict)
        finally:
            for name in self._members.keys() - self._met:  # they may come yet, and were waited for once
                self.away(name)
            self._here, self._outcome, self._round, self._closing = {}, None, None, None

    def _remember(self, this: Round, found: Closed) -> None:
        """What the members have shown, for who chooses by it."""
        if self._rules.policy != "oort":
            return
        reports = {
            name: Report(utility(one.rows, one.lesson.squares / one.lesson.steps), one.lesson.seconds)
            for name in found.members
            if (one := self._here[name]).lesson.steps
        }
        missing = [name for name in this.asked if name not in reports]
        self.book.history = recorded(self.book.history, this.key[0], reports, missing, self._clock() - this.began)

    async def _late(self, arrival: Arrival, number: int) -> Verdict:
        await self.book.kept()
        logger.info(
            "late for a round", extra={"fields": {"client": arrival.name, "step": arrival.steps, "counted": False}}
        )
        return self.book.of_late(arrival.steps, number)
