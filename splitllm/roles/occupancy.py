"""How the time of a device is spent: busy or not, while work waits for it or not. Plain numbers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

State = tuple[bool, bool]
"""Whether it is busy, and whether work waits."""


class Occupancy:
    """Seconds in each state, since the first work came. May be told of changes by several threads.

    Work *waits* from the moment when it could run until the device begins with it, whoever holds it meanwhile: the
    batching that has not chosen it yet, or the queue of the device.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._waiting, self._busy = 0, False
        self._seconds: dict[State, float] = {}
        self._since: float | None = None

    def waits(self, count: int = 1) -> None:
        """Work has come; it waits until as much has been taken away (`waits(-1)`) or begun."""
        with self._lock:
            self._count()
            self._waiting += count

    def begins(self) -> None:
        """The device takes up a job that waited."""
        with self._lock:
            self._count()
            self._waiting, self._busy = self._waiting - 1, True

    def ends(self) -> None:
        """The device is done with it."""
        with self._lock:
            self._count()
            self._busy = False

    def seconds(self) -> dict[State, float]:
        """(busy, waiting) -> seconds until now."""
        with self._lock:
            if self._since is not None:
                self._count()
            return dict(self._seconds)

    def _count(self) -> None:
        now, state = self._clock(), (self._busy, self._waiting > 0)
        if self._since is not None:
            self._seconds[state] = self._seconds.get(state, 0.0) + now - self._since
        self._since = now
