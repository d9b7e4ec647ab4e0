"""One role as a child process: started, its log read as it grows, started again after a signal, and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESTARTS, RESTART_WINDOW = 5, 60.0  # so many within so many seconds, then no more
BACKOFF, LONGEST_BACKOFF = 0.5, 8.0
REFUSALS = (1, 2)
"""Exit statuses after which starting again would change nothing."""
TAIL_LINES = 20


class Child:
    """A role in a process, and in its own session: the terminal's Ctrl-C does not reach it.

    Args:
        name: of the role.
        command: the words to run.
        log: standard output and error are appended here.
        environment: the whole of it.
        pass_on: descriptors that it inherits.

    Attributes:
        restarts: when it was started again, monotonic seconds.
        status: of the last process that ended; None while one lives or is about to.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str], pass_on: Sequence[int] = ()
    ) -> None:
        self.name, self.log = name, log
        self._command, self._environment, self._pass_on = list(command), dict(environment), tuple(pass_on)
        self._process: subprocess.Popen[bytes] | None = None
        self._due, self._half, self._read = 0.0, b"", log.stat().st_size if log.exists() else 0
        self.restarts: list[float] = []
        self.status: int | None = None
        self._said: list[str] = []

    @property
    def pid(self) -> int | None:
        """Of the process, if one lives."""
        return self._process.pid if self._process is not None else None

    def start(self, *, fresh: bool = False) -> None:
        """Start the process, with a fresh log or at the end of that which is there."""
        if fresh:
            self.log.unlink(missing_ok=True)
            self._read, self._half = 0, b""
        with self.log.open("ab") as log:
            if self._half:  # of a line that its end cut short
                log.write(b"\n")
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=self._pass_on,
            )
        self.status = None

    def look(self) -> int | None:
        """Whether the process has ended just now: its status, negative for a signal."""
        if self._process is None or self._process.poll() is None:
            return None
        self.status, self._process = self._process.returncode, None
        return self.status

    def may_restart(self) -> bool:
        """Whether an end like this may pass when it is started again."""
        now = time.monotonic()
        recent = [moment for moment in self.restarts if now - moment < RESTART_WINDOW]
        return self.status not in (0, *REFUSALS) and len(recent) < RESTARTS

    def plan_restart(self) -> None:
        """Start it again after a while, longer each time."""
        now = time.monotonic()
        recent = sum(now - moment < RESTART_WINDOW for moment in self.restarts)
        self.restarts.append(now)
        self._due, self.status = now + min(BACKOFF * 2**recent, LONGEST_BACKOFF), None

    def restart_if_due(self) -> bool:
        """Start it again if that is planned and the while is over; whether it was."""
        if self._process is not None or self.status is not None or time.monotonic() < self._due:
            return False
        self.start()
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and all that it started; none is started again after that."""
        if self._process is not None:
            os.killpg(self._process.pid, number)  # not reaped yet, so the number is still its own
        elif self.status is None:
            self.status = -number

    def events(self) -> list[dict[str, Any]]:
        """What the log has gained: its JSON lines."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as log:
            log.seek(self._read)
            fresh = log.read()
        self._read += len(fresh)
        *lines, self._half = (self._half + fresh).split(b"\n")
        return [event for event in map(self._event, lines) if event is not None]

    def last_words(self) -> str:
        """The error lines at the end of the log, or its last line."""
        return "\n".join(self._said) or f"no word in {self.log}"

    def _event(self, line: bytes) -> dict[str, Any] | None:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            self._said = []
            return event
        text = line.decode("utf-8", "replace").strip()
        if text:
            self._said = [*self._said, text][-TAIL_LINES:]
        return None
