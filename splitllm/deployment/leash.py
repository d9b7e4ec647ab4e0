"""Processes that do not outlive the one that started them, however that ends.

The parent holds the write end of a pipe that nobody writes to; when its process is gone, whatever ended it, the
children read the pipe's end and end themselves at once. A journal survives that, as it survives a power cut.
"""

from __future__ import annotations

import os
import signal
import threading

VARIABLE = "SPLITLLM_LEASH"
"""Holds the number of the inherited read end."""


class Leash:
    """The parent's side; as long as it is open, the children may live.

    Attributes:
        child_end: descriptor to pass on to each child.
    """

    def __init__(self) -> None:
        self.child_end, self._own_end = os.pipe()

    def environment(self) -> dict[str, str]:
        """What a child needs to find its end."""
        return {VARIABLE: str(self.child_end)}

    def close(self) -> None:
        """Children that still live end now."""
        os.close(self._own_end)
        os.close(self.child_end)


def wear() -> None:
    """The child's side: if the environment names a leash, die with its holder. Returns at once."""
    number = os.environ.pop(VARIABLE, "")
    if number.isdecimal():
        threading.Thread(target=_wait, args=(int(number),), name="leash", daemon=True).start()


def _wait(descriptor: int) -> None:
    os.read(descriptor, 1)
    os.kill(os.getpid(), signal.SIGKILL)
