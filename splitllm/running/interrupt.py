"""Ctrl-C, politely: the step under way is finished and saved before the run ends."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SAME_SECONDS = 3.0
"""Of two signals this close the second is an echo: `torchrun` repeats to its workers what the terminal sent them."""


class StopSignal:
    """Inside this context the first Ctrl-C (or SIGTERM) is noted, and a later one ends the run at once.

    Attributes:
        asked: whether the user wants the run to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        """Take the signals over, in the main thread only, where Python delivers them."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._first > SAME_SECONDS:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._first = True, time.monotonic()
