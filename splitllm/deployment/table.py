"""The roles of a deployment at a glance: what their logs say, as a live table or as a plain line now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from splitllm.metrics import human_bytes

STYLES = {"training": "green", "evaluating": "cyan", "done": "bold green", "failed": "bold red", "restarting": "red"}
STATES = {
    "leaves the device": "connecting",
    "listening": "waiting",
    "cut": "waiting",
    "rejoining": "waiting",
    "generation over": "waiting",
    "generation begins": "evaluating",
    "joined": "evaluating",
    "step": "training",
    "evaluation": "training",
    "complete": "done",
}
"""Event of a role's log -> the state that it begins."""
COLUMNS = ("role", "state", "step", "loss", "tokens/s", "up", "down")
REFRESH_SECONDS = 0.25


@dataclass
class Row:
    """One role.

    Attributes:
        state: starting, connecting, waiting, training, evaluating, done, stopping, stopped, restarting or failed.
        step: committed steps.
        loss: of the last step, nats a token; None where the role does not know it.
        speed: real tokens a second in the last step; None where the role does not know it.
        up, down: bytes to and from the role above; at the top from and to all below. None if unknown.
        clients: that took part in the last step; known at the top.
    """

    state: str = "starting"
    step: int | None = None
    loss: float | None = None
    speed: float | None = None
    up: int | None = None
    down: int | None = None
    clients: int | None = None


class Overview:
    """What the logs of all roles say.

    Args:
        names: of the roles, the top first.
        steps: of the run.
        eval_every: steps between evaluations, None for those at the start and the end only.

    Attributes:
        rows: by role.
    """

    def __init__(self, names: Sequence[str], steps: int, eval_every: int | None) -> None:
        self.rows = {name: Row() for name in names}
        self.top, self.steps, self._every = names[0], steps, eval_every
        self._lanes: dict[tuple[str, Any], int] = {}

    def note(self, name: str, event: Mapping[str, Any]) -> None:
        """Take in one event of a role's log."""
        row, kind = self.rows[name], event["event"]
        row.state = STATES.get(kind, row.state)
        if kind == "uplink":
            row.state = "waiting" if event.get("state") == "connected" else "connecting"
        if kind in ("joined", "generation begins"):
            row.step = event.get("step")
            row.state = "training" if row.step else "evaluating"
        if kind == "step":
            self._note_step(name, row, event)

    def _note_step(self, name: str, row: Row, event: Mapping[str, Any]) -> None:
        row.step, row.loss = self._furthest_behind(name, event), event.get("loss")
        row.clients = event.get("clients", row.clients)
        tokens, seconds = event.get("tokens"), event.get("seconds")
        row.speed = tokens / seconds if tokens is not None and seconds else None
        up, down = event.get("bytes_up"), event.get("bytes_down")
        if name == self.top:  # the top tells what has crossed since its last line, a client all that has
            up, down = ((before or 0) + (new or 0) for before, new in ((row.up, up), (row.down, down)))
        row.up, row.down = up, down
        if row.step is not None and (row.step == self.steps or (self._every and row.step % self._every == 0)):
            row.state = "evaluating"

    def _furthest_behind(self, name: str, event: Mapping[str, Any]) -> int | None:
        """The step of a role; of a server whose clients have lanes that of the one furthest behind."""
        step: int | None = event.get("step")
        if "client" not in event or step is None:
            return step
        self._lanes[name, event["client"]] = step
        return min(found for (role, _), found in self._lanes.items() if role == name)

    def line(self) -> str:
        """The run in one line, as the top sees it; what nobody knows yet is left out."""
        row = self.rows[self.top]
        parts = [f"step {row.step or 0}/{self.steps}"]
        if row.loss is not None:
            parts.append(f"loss {row.loss:.4f}")
        if row.speed is not None:
            parts.append(f"{row.speed:,.0f} tokens/s")
        if row.up or row.down:
            parts.append(f"up {human_bytes(row.up or 0)}, down {human_bytes(row.down or 0)}")
        if row.clients is not None:
            parts.append(f"{row.clients} client{'' if row.clients == 1 else 's'}")
        counts: dict[str, int] = {}
        for other in self.rows.values():
            counts[other.state] = counts.get(other.state, 0) + 1
        parts.append(", ".join(f"{count} {state}" for state, count in counts.items()))
        return "  ".join(parts)

    def table(self) -> Table:
        """One line a role."""
        table = Table(box=None, pad_edge=False)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in ("role", "state") else "right", no_wrap=True)
        for name, row in self.rows.items():
            step = f"{_number(row.step, 'd')}/{self.steps}"
            sizes = ("-" if size is None else human_bytes(size) for size in (row.up, row.down))
            state = Text(row.state, STYLES.get(row.state, ""))
            table.add_row(name, state, step, _number(row.loss, ".4f"), _number(row.speed, ",.0f"), *sizes)
        return table


class Screen:
    """Shows an overview: a live table on a terminal, elsewhere a plain line at most every `plain_seconds`."""

    def __init__(
        self,
        overview: Overview,
        console: Console,
        *,
        plain_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._overview, self._console = overview, console
        self._seconds, self._clock, self._shown = plain_seconds, clock, -math.inf
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live, self._seconds = Live(console=console, auto_refresh=False), REFRESH_SECONDS
            self._live.start()

    def update(self) -> None:
        """Show how things are, if that is due."""
        if self._clock() - self._shown < self._seconds:
            return
        self._shown = self._clock()
        self._show()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Show how things are at the end."""
        self._show()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._overview.table(), refresh=True)
        else:
            self.say(self._overview.line())


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
