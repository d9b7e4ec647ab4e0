"""What the logs of all roles say at a glance: states, numbers, a live table or plain lines."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from splitllm.deployment.table import Overview, Screen

NAMES = ["cloud", "edge-0", "client-0"]


@pytest.fixture
def overview() -> Overview:
    return Overview(NAMES, steps=20, eval_every=5)


def text_of(overview: Overview) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(overview.table())
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "starting"),
        ([{"event": "leaves the device"}], "connecting"),
        ([{"event": "uplink", "state": "edge-0 cannot be reached"}], "connecting"),
        ([{"event": "uplink", "state": "connected"}], "waiting"),
        ([{"event": "listening", "port": 1}], "waiting"),
        ([{"event": "joined", "step": 0}], "evaluating"),
        ([{"event": "joined", "step": 4}], "training"),
        ([{"event": "joined", "step": 0}, {"event": "step", "step": 1}], "training"),
        ([{"event": "step", "step": 5}], "evaluating"),
        ([{"event": "step", "step": 20}], "evaluating"),
        ([{"event": "step", "step": 5}, {"event": "evaluation", "step": 5, "loss": 1.0}], "training"),
        ([{"event": "step", "step": 3}, {"event": "rejoining", "reason": "lost"}], "waiting"),
        ([{"event": "step", "step": 20}, {"event": "complete"}], "done"),
        ([{"event": "step", "step": 2}, {"event": "something new"}], "training"),
    ],
)
def test_events_move_a_role_from_state_to_state(overview: Overview, events: list[dict[str, Any]], state: str) -> None:
    for event in events:
        overview.note("client-0", event)
    assert overview.rows["client-0"].state == state
    assert overview.rows["cloud"].state == "starting"


def test_a_client_tells_all_its_bytes_and_the_top_those_since_its_last_line(overview: Overview) -> None:
    for number in (1, 2):
        step = {"event": "step", "step": number, "loss": 2.5, "tokens": 100, "seconds": 0.5, "clients": 2}
        overview.note("client-0", {**step, "bytes_up": 1000 * number, "bytes_down": 500 * number})
        overview.note("cloud", {**step, "bytes_up": 1000, "bytes_down": 500})
    for name in ("client-0", "cloud"):
        row = overview.rows[name]
        assert (row.step, row.loss, row.speed, row.up, row.down) == (2, 2.5, 200.0, 2000, 1000)


def test_the_line_tells_the_run_as_the_top_sees_it(overview: Overview) -> None:
    assert overview.line() == "step 0/20  3 starting"
    step = {"event": "step", "step": 2, "loss": 2.5, "tokens": 900, "seconds": 0.5}
    overview.note("cloud", {**step, "bytes_up": 2048, "bytes_down": 1, "clients": 1})
    assert (
        overview.line()
        == "step 2/20  loss 2.5000  1,800 tokens/s  up 2.0 KiB, down 1 B  1 client  1 training, 2 starting"
    )


def test_the_table_has_a_line_for_every_role(overview: Overview) -> None:
    overview.note("edge-0", {"event": "step", "step": 7})
    head, *rows = text_of(overview).splitlines()
    assert head.split() == ["role", "state", "step", "loss", "tokens/s", "up", "down"]
    assert [row.split()[0] for row in rows] == NAMES
    assert rows[1].split() == ["edge-0", "training", "7/20", "-", "-", "-", "-"]


def test_away_from_a_terminal_a_plain_line_comes_now_and_then_and_at_the_end(overview: Overview) -> None:
    now = 0.0
    console = Console(file=io.StringIO(), width=200)
    screen = Screen(overview, console, plain_seconds=10.0, clock=lambda: now)
    for _ in range(25):
        screen.update()
        now += 1.0
    screen.say("a line that stays")
    screen.close()
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[0] for line in said] == ["step", "step", "step", "a", "step"]


def test_on_a_terminal_the_table_is_live(overview: Overview) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    screen = Screen(overview, console, clock=lambda: 100.0)
    screen.update()
    overview.rows["edge-0"].state = "failed"
    screen.close()
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "starting" in said and said.rindex("failed") > said.index("starting")
