"""All roles as processes: watched, started again where that helps, and stopped from the bottom up."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from splitllm.deployment.child import REFUSALS, RESTART_WINDOW, RESTARTS, Child
from splitllm.deployment.table import Overview, Row, Screen
from splitllm.errors import PeerError, RecipeError, SplitLLMError
from splitllm.running.interrupt import StopSignal

LOOK_SECONDS = 0.1
GRACE_SECONDS = 20.0
SETTLE_SECONDS = 15.0
"""For roles to say goodbye once the top has written the summary."""
TELL_SECONDS = 3.0
"""For other roles to fail of the same cause."""


class Crew:
    """All roles as processes.

    Args:
        tiers: the children, bottom-up.
        overview: told what their logs say.
        screen: shows it.
        summary: the file that the top writes when the run is complete.
        alone: whether the others go on when a client fails for good.
    """

    def __init__(
        self, tiers: list[list[Child]], overview: Overview, screen: Screen, summary: Path, *, alone: bool = False
    ) -> None:
        self._tiers, self._overview, self._screen, self._summary = tiers, overview, screen, summary
        self._apart = set(tiers[0]) if alone else set()
        self._children = [child for tier in reversed(tiers) for child in tier]
        self._settled_by = self._told_by = math.inf

    def start(self, fresh: bool) -> None:
        """Start all of them, the top first; a fresh run begins new logs."""
        for child in self._children:
            child.start(fresh=fresh)
        self._screen.say(f"{len(self._children)} roles, each a process with a log: {self._children[0].log}, ...")

    def attend(self, stop: StopSignal) -> None:
        """Watch them until all have come to their end, or the user wants to stop.

        Raises:
            RecipeError, PeerError: one failed for good; of several the topmost tells, for it knows the cause. Where the
                others went on without it, they have come to their end by then.
        """
        while not stop.asked and not all(child.status == 0 for child in self._children):
            self._look()
            now = time.monotonic()
            if now > self._told_by:
                raise _failure(next(child for child in self._children if self._row(child).state == "failed"))
            if self._settled_by == math.inf and (self.is_complete() or self._only_servers_are_left()):
                self._settled_by = now + SETTLE_SECONDS
            if now > self._settled_by:
                break
            time.sleep(LOOK_SECONDS)
        failed = [child for child in self._children if self._row(child).state == "failed"]
        if failed and not stop.asked and not self.is_complete():
            raise _failure(failed[0], left=self._summary.parent if set(failed) <= self._apart else None)

    def stop(self) -> None:
        """End what still lives: clients first, then tier by tier up, each politely; after a while by force."""
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for tier in self._tiers:
                self._end(tier, signal.SIGTERM)
                self._wait(tier, deadline)
        finally:
            self._end(self._children, signal.SIGKILL)
            self._wait(self._children, time.monotonic() + GRACE_SECONDS)
            self._read()
            self._screen.close()

    def is_complete(self) -> bool:
        """Whether the top has written all that a run leaves."""
        return self._summary.exists()

    def _only_servers_are_left(self) -> bool:
        return bool(self._apart) and all(self._row(child).state in ("done", "failed") for child in self._apart)

    def _row(self, child: Child) -> Row:
        return self._overview.rows[child.name]

    def _look(self) -> None:
        ended = [child for child in self._children if child.look() is not None]
        self._read()
        for child in ended:
            self._ended(child)
        for child in self._children:
            if child.restart_if_due():
                self._row(child).state = "starting"
        self._screen.update()

    def _ended(self, child: Child) -> None:
        row = self._row(child)
        if child.status == 0:
            row.state = "done"
        elif self.is_complete():
            row.state = "stopped"
        elif child.may_restart():
            row.state = "restarting"
            self._screen.say(f"{child.name} ended with {_status(child.status)} and is started again; see {child.log}")
            child.plan_restart()
        else:
            row.state = "failed"
            if child in self._apart:
                self._screen.say(f"{child.name} failed, and the others go on: {child.last_words()}; see {child.log}")
                return
            self._told_by = min(self._told_by, time.monotonic() + TELL_SECONDS)

    def _end(self, children: Iterable[Child], number: signal.Signals) -> None:
        for child in children:
            self._note_end(child)
            if child.status is None:
                self._row(child).state = "stopping"
                child.signal(number)

    def _wait(self, children: list[Child], deadline: float) -> None:
        while any(child.status is None for child in children) and time.monotonic() < deadline:
            for child in children:
                self._note_end(child)
            self._read()
            self._screen.update()
            time.sleep(LOOK_SECONDS)

    def _note_end(self, child: Child) -> None:
        if child.look() is not None:
            self._row(child).state = "done" if child.status == 0 else "stopped"

    def _read(self) -> None:
        for child in self._children:
            for event in child.events():
                self._overview.note(child.name, event)


def _failure(child: Child, left: Path | None = None) -> SplitLLMError:
    """A wrong recipe or machine stays one, whatever process found it; `left` is where others have left theirs."""
    if child.status not in REFUSALS:
        often = f"{RESTARTS} times within {RESTART_WINDOW:.0f} seconds"
        return PeerError(
            f"{child.name} ended with {_status(child.status)} and was started again {often}; see {child.log}"
        )
    words = [f"{child.name}: {child.last_words()}", f"its log: {child.log}"]
    if left is not None:
        words.append(
            f"what the others have learned is in {left}; mend it, and go on with the same command and --resume"
        )
    return RecipeError(words) if child.status == 2 else PeerError("\n".join(words))


def _status(status: int | None) -> str:
    assert status is not None
    if status >= 0:
        return f"status {status}"
    return signal.Signals(-status).name if -status in signal.valid_signals() else f"signal {-status}"
