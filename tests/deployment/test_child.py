"""A role as a child process: its log, its end, its restarts."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from splitllm.deployment import child as module
from splitllm.deployment.child import RESTARTS, Child

Make = Callable[[str], Child]
SAY = "import json, sys, time\nsay = lambda **fields: print(json.dumps(fields), flush=True)\n"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Child] = []

    def one(code: str) -> Child:
        made.append(Child("edge-0", [sys.executable, "-c", SAY + code], tmp_path / "edge-0.log", dict(os.environ)))
        return made[-1]

    yield one
    for child in made:
        child.signal(signal.SIGKILL)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end_of(child: Child) -> int:
    wait_until(lambda: child.look() is not None)
    assert child.status is not None
    return child.status


def test_events_are_the_json_lines_each_once(make: Make) -> None:
    child = make("say(event='a', step=1); print('no json'); say(event='b'); print('[1]', flush=True); sys.exit(0)")
    child.start()
    assert end_of(child) == 0
    assert child.events() == [{"event": "a", "step": 1}, {"event": "b"}]
    assert child.events() == []


def test_a_line_that_is_not_complete_waits_for_its_rest(make: Make, tmp_path: Path) -> None:
    child = make("")
    (tmp_path / "edge-0.log").write_text('{"event": ')
    child._read = 0
    assert child.events() == []
    with (tmp_path / "edge-0.log").open("a") as log:
        log.write('"a"}\n')
    assert child.events() == [{"event": "a"}]


def test_last_words_are_the_lines_after_the_last_event(make: Make) -> None:
    child = make("print('early'); say(event='a'); print('seed: wrong\\nmodel: missing', file=sys.stderr); sys.exit(2)")
    child.start()
    assert end_of(child) == 2
    child.events()
    assert child.last_words() == "seed: wrong\nmodel: missing"


def test_the_log_goes_on_after_a_restart_and_a_fresh_start_empties_it(make: Make, tmp_path: Path) -> None:
    child = make("print('half', end='', flush=True); say(event='a'); print('{\"event\"', end='', flush=True)")
    for fresh, runs in ((True, 1), (False, 2), (True, 1)):
        child.start(fresh=fresh)
        end_of(child)
        child.events()
        assert (tmp_path / "edge-0.log").read_text() == "\n".join(['half{"event": "a"}\n{"event"'] * runs)


@pytest.mark.parametrize(("code", "again"), [("0", False), ("1", False), ("2", False), ("3", True)])
def test_what_starting_again_can_mend(make: Make, code: str, again: bool) -> None:
    child = make(f"sys.exit({code})")
    child.start()
    end_of(child)
    assert child.may_restart() is again


def test_a_killed_child_is_started_again_until_that_is_too_often(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF", 0.0)
    child = make("time.sleep(60)")
    child.start()
    for _ in range(RESTARTS):
        child.signal(signal.SIGKILL)
        assert end_of(child) == -signal.SIGKILL
        assert child.may_restart()
        child.plan_restart()
        wait_until(child.restart_if_due)
    child.signal(signal.SIGKILL)
    end_of(child)
    assert not child.may_restart()
    monkeypatch.setattr(module, "RESTART_WINDOW", 0.0)
    assert child.may_restart()


def test_a_child_that_waits_to_be_started_again_can_be_stopped(make: Make) -> None:
    child = make("sys.exit(3)")
    child.start()
    end_of(child)
    child.plan_restart()
    assert child.restart_if_due() is False
    child.signal(signal.SIGTERM)
    time.sleep(0.6)
    assert child.restart_if_due() is False and child.pid is None


def test_a_child_has_a_session_of_its_own(make: Make) -> None:
    child = make("time.sleep(60)")
    child.start()
    assert child.pid is not None and os.getsid(child.pid) == child.pid != os.getsid(0)
