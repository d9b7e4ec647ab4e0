"""One log call: a JSON line on disk, a live line on the console, and whatever tracker the run was given."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from splitllm.errors import CheckpointError

Record = dict[str, Any]
Tracker = Callable[[dict[str, float], int], None]
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
TRACKED_EVENTS = ("train", "eval")


def human_bytes(count: float) -> str:
    """`count` bytes for people: 0 -> "0 B", 1536 -> "1.5 KiB"."""
    unit = 0
    while unit < len(UNITS) - 1 and round(count, 1 if unit else 0) >= 1024:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.1f} {UNITS[unit]}"


class Metrics:
    """Writes `DIR/metrics.jsonl` and `DIR/summary.json`, and tells the user how the run goes.

    Training events are expected to carry what happened since the one before: `step`, `loss`, `tokens` (real ones),
    `seconds`, `bytes_up`, `bytes_down`, and for the console also `lr` and `clients` where they are known.

    Args:
        directory: the run's output folder; made when the first line is written.
        steps: how many steps the run has, for the console line.
        enabled: False on every rank but 0: nothing is written, printed or tracked.
        console: where the live line goes; default: standard output.
        tracker: called as `tracker({"train/loss": ...}, step)` with the numbers of each training and evaluation event.
        plain_seconds: where the console is no terminal, a plain line at most this often, and one at the last step.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        steps: int,
        enabled: bool = True,
        console: Console | None = None,
        tracker: Tracker | None = None,
        plain_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(directory) / "metrics.jsonl"
        self.enabled = enabled
        self._steps = steps
        self._tracker = tracker
        self._file: TextIO | None = None
        self._bytes = {"bytes_up": 0, "bytes_down": 0}
        self._line = _ProgressLine(console or Console(), plain_seconds, clock)

    def __enter__(self) -> Metrics:
        """Nothing is opened before the first event."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file and leave the last progress line on the screen."""
        self.close()

    def log(self, event: str, **fields: Any) -> None:
        """Append `{"event": event, **fields}` as one line and show it.

        Args:
            event: "train", "eval", "round", ...
            **fields: plain JSON values; a number that is not finite is written as null.

        Raises:
            TypeError: a value is no plain JSON value (a tensor, say).
        """
        if not self.enabled:
            return
        record = {"event": event, **fields}
        line = json.dumps(_finite(record), allow_nan=False) + "\n"
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(line)
        self._file.flush()
        self._add_bytes(record)
        self._show(record)
        self._track(record)

    def say(self, text: str) -> None:
        """Print lines that stay, above the live one."""
        if self.enabled:
            self._line.say(text)

    def truncate_to(self, step: int, client: str | None = None) -> list[Record]:
        """On resume: drop every event after `step`, and a last line that a crash left half-written.

        The rewrite is atomic. Events without a step are kept.

        Args:
            step: the step of the checkpoint that the run resumes from.
            client: drop events of this client only; None: of all.

        Returns:
            The events that are kept, in order; none where this writer is disabled or there is no file.

        Raises:
            CheckpointError: a line other than the last is no JSON object.
        """
        if not self.enabled or not self.path.exists():
            return []
        self._close_file()
        records = read_records(self.path)
        kept = [r for r in records if r.get("step", step) <= step or (client is not None and r.get("client") != client)]
        replace_text(self.path, "".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in kept))
        self._bytes = dict.fromkeys(self._bytes, 0)
        for record in kept:
            self._add_bytes(record)
        return kept

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `DIR/summary.json`, whole or not at all; a number that is not finite is written as null."""
        if self.enabled:
            text = json.dumps(_finite(dict(summary)), indent=2, allow_nan=False) + "\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path.with_name("summary.json"), text)

    def close(self) -> None:
        """Close the file and end the live line; logging afterwards opens both again."""
        self._line.stop()
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add_bytes(self, record: Record) -> None:
        if record["event"] == "train":
            for name in self._bytes:
                self._bytes[name] += record.get(name) or 0

    def _show(self, record: Record) -> None:
        if record["event"] == "train":
            text = _describe_step({**record, **self._bytes}, self._steps)
            self._line.update(text, last=record["step"] == self._steps)
        elif record["event"] == "eval":
            self._line.say(f"evaluation at step {record['step']}: loss {_number(record['loss'], '.4f')}")

    def _track(self, record: Record) -> None:
        event = record["event"]
        if self._tracker is None or event not in TRACKED_EVENTS:
            return
        numbers = {name: value for name, value in record.items() if name != "step" and _is_finite_number(value)}
        self._tracker({f"{event}/{name}": float(value) for name, value in numbers.items()}, record["step"])


def read_records(path: Path) -> list[Record]:
    """Every event of a metrics file, without a last line that a crash left half-written.

    Raises:
        CheckpointError: a line other than the last is no JSON object.
    """
    records: list[Record] = []
    *whole, _half = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            record = None
        if not isinstance(record, dict) or "event" not in record:
            raise CheckpointError(f"{path}:{number}: not an event: {line[:60]!r}; remove this line to resume")
        records.append(record)
    return records


class _ProgressLine:
    """One line that is rewritten on a terminal, or now and then a plain one elsewhere."""

    def __init__(self, console: Console, plain_seconds: float, clock: Callable[[], float]) -> None:
        self._console = console
        self._plain_seconds = plain_seconds
        self._clock = clock
        self._printed = -math.inf
        self._live: Live | None = None

    def update(self, text: str, *, last: bool) -> None:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False)
                self._live.start()
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif last or self._clock() - self._printed >= self._plain_seconds:
            self._printed = self._clock()
            self.say(text)

    def say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _describe_step(record: Record, steps: int) -> str:
    parts = [f"step {record['step']}/{steps}", f"loss {_number(record['loss'], '.4f')}"]
    if record.get("lr") is not None:
        parts.append(f"lr {record['lr']:.2e}")
    if record.get("tokens") is not None and record.get("seconds"):
        parts.append(f"{record['tokens'] / record['seconds']:,.0f} tokens/s")
    parts.append(f"up {human_bytes(record['bytes_up'])}, down {human_bytes(record['bytes_down'])}")
    if record.get("clients") is not None:
        parts.append(f"{record['clients']} client{'' if record['clients'] == 1 else 's'}")
    return "  ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(value: Any) -> Any:
    """The same value with every float that is not finite replaced by None."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
