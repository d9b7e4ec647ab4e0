"""A lock that a killed compiler left is opened; one of a compiler at work is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splitllm.engines.compiled import YOUNG, open_dead_locks

WHOSE = [(0, False, True), (YOUNG + 1, False, False), (YOUNG + 1, True, True)]


@pytest.mark.parametrize(("age", "at_work", "stays"), WHOSE)
def test_only_locks_of_the_dead_are_opened(
    age: float, at_work: bool, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "operator" / "lock"
    lock.parent.mkdir()
    lock.touch()
    then = time.time() - age
    os.utime(lock, (then, then))
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], cwd=lock.parent if at_work else tmp_path, stdin=subprocess.PIPE
    ) as worker:
        open_dead_locks("operator", "another")
        assert lock.exists() == stays
        worker.communicate(b"\n")
