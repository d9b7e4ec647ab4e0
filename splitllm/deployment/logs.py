"""Structured logs: one JSON object a line where they are collected, plain text on a terminal."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any


class JsonLines(logging.Formatter):
    """`{"time", "level", "role", "event", ...}`; never tensors, text of rows or secrets."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


class PlainLines(logging.Formatter):
    """The same for people."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields = getattr(record, "fields", {})
        details = "  ".join(f"{key} {_short(value)}" for key, value in fields.items())
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = f"{time} {self._role}: {record.getMessage()}" + (f"  {details}" if details else "")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def log_to_stdout(role: str, *, as_json: bool | None = None) -> None:
    """Send this package's log to standard output.

    Args:
        role: named in every line.
        as_json: by default where standard output is no terminal.
    """
    wanted = not sys.stdout.isatty() if as_json is None else as_json
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines(role) if wanted else PlainLines(role))
    package = logging.getLogger("splitllm")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
