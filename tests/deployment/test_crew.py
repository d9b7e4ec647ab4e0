"""A crew of real processes: how they are watched, which failures end all, and in which order they are stopped."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from splitllm.deployment import child as child_module
from splitllm.deployment.child import Child
from splitllm.deployment.crew import Crew
from splitllm.deployment.table import Overview, Screen
from splitllm.errors import PeerError, RecipeError
from splitllm.running.interrupt import StopSignal

SLEEP = "time.sleep(60)"
POLITE = """
import signal, time, json
def stop(*_):
    time.sleep({seconds})
    print(json.dumps({{"event": "stopping", "at": time.monotonic()}}), flush=True)
    raise SystemExit(1)
signal.signal(signal.SIGTERM, stop)
print(json.dumps({{"event": "ready"}}), flush=True)
time.sleep(60)
"""


class Stage:
    """Three tiers of one role each; what they run is given, bottom-up."""

    def __init__(self, folder: Path, client: str, edge: str, cloud: str, *, alone: bool = False) -> None:
        self.overview = Overview(["cloud", "edge", "client"], steps=3, eval_every=None)
        self.file = io.StringIO()
        screen = Screen(self.overview, Console(file=self.file, width=200))
        names = {"client": client, "edge": edge, "cloud": cloud}
        self.children = {name: self._child(folder, name, code) for name, code in names.items()}
        self.summary = folder / "summary.json"
        tiers = [[child] for child in self.children.values()]
        self.crew = Crew(tiers, self.overview, screen, self.summary, alone=alone)

    @staticmethod
    def _child(folder: Path, name: str, code: str) -> Child:
        words = [sys.executable, "-c", f"import os, signal, sys, time, json\n{code}"]
        return Child(name, words, folder / f"{name}.log", dict(os.environ))

    def run(self) -> None:
        with StopSignal() as stop:
            try:
                self.crew.start(fresh=True)
                self.crew.attend(stop)
            finally:
                self.crew.stop()
        assert all(child.pid is None for child in self.children.values())

    def states(self) -> list[str]:
        return [row.state for row in self.overview.rows.values()]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitllm.deployment.crew.TELL_SECONDS", 1.0)


def later(seconds: float, action: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()


def test_all_come_to_their_end(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "", "", "print(json.dumps({'event': 'step', 'step': 3, 'loss': 1.5}))")
    stage.run()
    assert stage.states() == ["done"] * 3
    assert (stage.overview.rows["cloud"].step, stage.overview.rows["cloud"].loss) == (3, 1.5)


@pytest.mark.parametrize(("status", "kind"), [(2, RecipeError), (1, PeerError)])
def test_a_role_that_refuses_ends_all_with_its_words(tmp_path: Path, status: int, kind: type[Exception]) -> None:
    stage = Stage(tmp_path, SLEEP, f"print('seed: wrong', file=sys.stderr); sys.exit({status})", SLEEP)
    with pytest.raises(kind) as refusal:
        stage.run()
    assert str(refusal.value) == f"edge: seed: wrong\nits log: {tmp_path / 'edge.log'}"
    assert stage.states() == ["stopped", "failed", "stopped"]


def test_of_several_that_fail_the_topmost_tells(tmp_path: Path) -> None:
    fail = "print('consequence'); sys.exit(1)"
    stage = Stage(tmp_path, fail, fail, "time.sleep(0.5); print('cause'); sys.exit(1)")
    with pytest.raises(PeerError, match=r"^cloud: cause\n"):
        stage.run()


def test_a_role_that_is_killed_is_started_again(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    once = f"import pathlib; mark = pathlib.Path({str(mark)!r})\nif not mark.exists():\n    mark.touch()\n"
    stage = Stage(tmp_path, once + "    os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(1.5)", "")
    stage.run()
    assert stage.states() == ["done"] * 3
    assert len(stage.children["client"].restarts) == 1
    assert f"client ended with SIGKILL and is started again; see {tmp_path / 'client.log'}" in stage.file.getvalue()


def test_a_role_that_dies_again_and_again_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "BACKOFF", 0.0)
    stage = Stage(tmp_path, "sys.exit(9)", SLEEP, SLEEP)
    with pytest.raises(PeerError, match=r"client ended with status 9 and was started again 5 times within 60 seconds"):
        stage.run()


def test_a_run_that_is_complete_needs_nobody_back(tmp_path: Path) -> None:
    summary = str(tmp_path / "summary.json")
    kill = "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
    stage = Stage(tmp_path, "time.sleep(0.7)", kill, f"open({summary!r}, 'w').close()")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitllm.deployment.crew.SETTLE_SECONDS", 1.0)
        stage.run()
    assert stage.states() == ["done", "stopped", "done"]
    assert stage.crew.is_complete()


def test_ctrl_c_stops_clients_first_and_the_cloud_last(tmp_path: Path) -> None:
    polite = [POLITE.format(seconds=seconds) for seconds in (0.4, 0.2, 0.0)]
    stage = Stage(tmp_path, *polite)
    later(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    stage.run()
    times = [
        float(line.partition('"at": ')[2].rstrip("}"))
        for name in ("client", "edge", "cloud")
        for line in (tmp_path / f"{name}.log").read_text().splitlines()
        if '"at"' in line
    ]
    assert len(times) == 3 and times == sorted(times)
    assert stage.states() == ["stopped"] * 3


@pytest.mark.parametrize("completes", [True, False])
def test_where_they_can_the_others_go_on_without_a_client_that_fails(tmp_path: Path, completes: bool) -> None:
    failed, summary = tmp_path / "failed", tmp_path / "summary.json"
    client = f"open({str(failed)!r}, 'w').close(); print('it has diverged'); sys.exit(1)"
    until = f"while not os.path.exists({str(failed)!r}): time.sleep(0.1)\ntime.sleep(1.5)"
    stage = Stage(
        tmp_path, client, SLEEP, f"{until}\nopen({str(summary)!r}, 'w').close()" if completes else SLEEP, alone=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitllm.deployment.crew.SETTLE_SECONDS", 2.5)
        with nullcontext() if completes else pytest.raises(PeerError, match=r"^client: it has diverged\n"):
            stage.run()
    assert stage.states() == ["done" if completes else "stopped", "stopped", "failed"]
    assert "client failed, and the others go on: it has diverged; see " in stage.file.getvalue()


def test_who_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitllm.deployment.crew.GRACE_SECONDS", 0.5)
    deaf = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
    stage = Stage(tmp_path, deaf, SLEEP, f"os.kill(os.getpid(), signal.SIGSTOP); {SLEEP}")
    later(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    stage.run()
    assert time.monotonic() - began < 10
    assert [child.status for child in stage.children.values()] == [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGKILL]
