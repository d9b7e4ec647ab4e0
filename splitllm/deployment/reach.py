"""What is said when a neighbour cannot be reached: that it is waited for, and what can be done about it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)
AWAY_SECONDS = 60.0
LOST = (
    "{parent} has been away for {seconds:g} seconds and is waited for: start it, unless its run is complete "
    "(it has written summary.json): then nothing is left to do here, and this role can be stopped"
)
NEVER_REACHED = (
    "{parent} has not been reached at {address} for {seconds:g} seconds and is waited for: start it, "
    "or correct wire.addresses.{parent} if it is elsewhere; if its run is complete (it has written summary.json), "
    "nothing is left to do here, and this role can be stopped"
)


class WayUp:
    """Logs every change of the link to the role above, and once an absence that it is away for long.

    Args:
        parent: name of the role above.
        address: HOST:PORT at which it is looked for.
        seconds: that are long.
    """

    def __init__(self, parent: str, address: str, seconds: float = AWAY_SECONDS) -> None:
        self._parent, self._address, self._seconds = parent, address, seconds
        self._due: asyncio.TimerHandle | None = None
        self._reached = False

    def __call__(self, state: str) -> None:
        """Note a change: "connected", or what keeps the link from being so."""
        logger.info("uplink", extra={"fields": {"state": state}})
        if state != "connected":
            self._due = self._due or asyncio.get_running_loop().call_later(self._seconds, self._warn)
            return
        self._reached = True
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _warn(self) -> None:
        away = LOST if self._reached else NEVER_REACHED
        logger.warning("%s", away.format(parent=self._parent, address=self._address, seconds=self._seconds))


async def say_who_is_missing(missing: Callable[[float], Sequence[str]], seconds: float = AWAY_SECONDS) -> None:
    """Log, once an absence, which roles below are waited for; never returns.

    Args:
        missing: seconds -> who has been away for at least as long, and is waited for.
        seconds: that are long.
    """
    said: set[str] = set()
    while True:
        await asyncio.sleep(seconds / 4)
        away = set(missing(seconds))
        for name in sorted(away - said):
            logger.warning("%s has been away for %g seconds and is waited for: start it", name, seconds)
        said = away
