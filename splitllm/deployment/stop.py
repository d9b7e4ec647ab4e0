"""SIGTERM and Ctrl-C in a role that waits for others: heard at any time, obeyed between two steps."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable
from typing import TypeVar

from splitllm.errors import RunInterrupted

T = TypeVar("T")


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
            if not waiting.done():
                raise RunInterrupted("stopped before it took part; start it again with the same command")
            return waiting.result()
        finally:
            asked.cancel()
            waiting.cancel()
