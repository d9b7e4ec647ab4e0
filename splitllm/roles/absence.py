"""Which children of a server are there, and which of them it no longer waits for."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence


class Absence:
    """Who is away, and since when, by the clock of the event loop.

    Args:
        children: all of them; none is there yet.
        patience: seconds after which a child that is away is left out; None to wait for ever.
    """

    def __init__(self, children: Sequence[str], patience: float | None) -> None:
        self.children, self.patience = list(children), patience
        self.all_left = asyncio.Event()
        self._away = dict.fromkeys(children, _now())
        self._missed: dict[str, float] = {}
        self._left: set[str] = set()
        self._aside: set[str] = set()

    def away(self, child: str) -> None:
        """The connection of a child is gone."""
        self._missed.setdefault(child, self._away.setdefault(child, _now()))

    def back(self, child: str) -> None:
        """A child is connected."""
        self._away.pop(child, None)

    def left(self, child: str) -> None:
        """A child has said goodbye: the run is complete for it."""
        self._left.add(child)
        if self._left.issuperset(self.children):
            self.all_left.set()

    def aside(self, child: str, *, stands: bool) -> None:
        """Whether a child has nobody below it any more, and asks not to be waited for."""
        (self._aside.add if stands else self._aside.discard)(child)

    def gather(self) -> None:
        """From now on children are expected to join."""
        self._missed = dict(self._away)

    def given_up(self, child: str) -> bool:
        """Whether the run goes on without a child that has not joined.

        One that is connected all the time may compute for as long as it needs. One whose connection breaks in the
        meantime has the same patience as one that stays away, so that coming and going holds nobody up.
        """
        return child in self._aside or self.lost(child) or self._too_long(self._missed.get(child, math.inf))

    def lost(self, child: str) -> bool:
        """Whether a child has been away for too long."""
        return self._too_long(self._away.get(child, math.inf))

    def missing(self, seconds: float) -> list[str]:
        """Who has been away for so many seconds, and is waited for without end."""
        if self.patience is not None:
            return []
        gone = self._left | self._aside
        return [child for child, since in self._away.items() if child not in gone and _now() - since >= seconds]

    def _too_long(self, since: float) -> bool:
        return self.patience is not None and _now() - since >= self.patience


def _now() -> float:
    return asyncio.get_running_loop().time()
