"""What a connection looks like to those who talk over it: frames in order, and the two ways in which it can end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol

from splitllm.errors import PeerError

LONGEST = 600  # characters, so that a reason fits into the trailers of a call
Reason = Literal["invalid", "identity", "mismatch", "taken", "admission", "internal"]


class Refused(PeerError):
    """The other side ended the connection and said why; trying again is of no use, but for `taken`.

    Args:
        reason: invalid (what was sent breaks the protocol), identity (the certificate), mismatch (another recipe, model
            or version), taken (another process has the name), admission (no memory for it), internal (an error there).
        text: one line for the user, cut to `LONGEST` characters, with ? for what cannot be printed: peers' words may be
            in it.

    Attributes:
        child: whose connection it was, once that is known.
    """

    def __init__(self, reason: Reason, text: str) -> None:
        line = "".join(character if character.isprintable() else "?" for character in text[: LONGEST + 1])
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}...")
        self.reason, self.child = reason, ""


class Disconnected(PeerError):
    """The connection is gone; a new one may work."""


class Stream(Protocol):
    """Frames both ways, in order."""

    async def read(self) -> bytes | None:
        """The next frame; None when the other side has said all it had to say.

        Raises:
            Disconnected, Refused: the connection ended.
        """
        ...

    async def write(self, frame: bytes) -> None:
        """Send a frame; waits while the other side does not read (backpressure).

        Raises:
            Disconnected, Refused: the connection ended.
        """
        ...


def backoff(first: float = 0.1, longest: float = 5.0) -> Iterator[float]:
    """Seconds to wait before each new attempt: doubling, with jitter, so that many peers do not come all at once."""
    wait = first
    while True:
        yield wait * random.uniform(0.5, 1.0)
        wait = min(longest, 2 * wait)


def first_error(jobs: Iterable[asyncio.Task[Any]]) -> BaseException | None:
    """What ended the jobs of one stream: if they differ, the reason rather than that the connection is gone."""
    errors = [error for job in jobs if not job.cancelled() and (error := job.exception()) is not None]
    return min(errors, key=lambda error: isinstance(error, Disconnected), default=None)
