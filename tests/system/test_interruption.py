"""Real signals to real processes: a run that was interrupted or killed ends like one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from splitllm.checkpoint import newest
from splitllm.metrics import read_records
from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.faults.deployment import counted
from tests.tiny import write_recipe

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
STEPS = 50
LONG = (f"train.steps={STEPS}", "train.checkpoint_every=3", "train.keep=2")


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "splitllm", "train", str(folder / "recipe.yaml"), *LONG, *words]
    return subprocess.Popen(
        [*command, "--output-dir", str(folder / "run")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_of(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [record["step"] for record in read_records(file) if record["event"] == "train"] if file.exists() else []


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while max(steps_of(run), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def test_ctrl_c_then_kills_then_the_end(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    run = tmp_path / "run"

    process = start(tmp_path)
    wait_for_step(process, run, 4)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    saved = newest(run)
    assert saved is not None and 4 <= saved.step < STEPS
    assert process.returncode == 1
    assert said.startswith(f"stopped after step {saved.step} of {STEPS}, which is saved in {run}/checkpoints/step-")
    assert "--resume" in said and said.count("\n") == 1

    for further in (3, 13):
        reached = saved.step
        process = start(tmp_path, "--resume")
        wait_for_step(process, run, reached + further)
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        saved = newest(run)
        assert saved is not None and reached <= saved.step < STEPS

    process = start(tmp_path, "--resume")
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, "")
    assert steps_of(run) == list(range(1, STEPS + 1))

    train(load_recipe(tmp_path / "recipe.yaml", LONG), tmp_path / "whole")
    same = "adapter/adapter_model.safetensors"
    assert (run / same).read_bytes() == (tmp_path / "whole" / same).read_bytes()
    losses = [[found[2] for found in counted(folder)] for folder in (run, tmp_path / "whole")]
    assert losses[0] == losses[1]


@pytest.mark.soak
def test_a_kill_before_the_first_checkpoint_costs_only_time(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    process = start(tmp_path, "train.checkpoint_every=1000")
    wait_for_step(process, tmp_path / "run", 2)
    process.kill()
    process.communicate(timeout=60)
    assert newest(tmp_path / "run") is None
    process = start(tmp_path, "train.checkpoint_every=1000", "--resume")
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, "")
    assert steps_of(tmp_path / "run") == list(range(1, STEPS + 1))
