"""`splitllm up`: real processes, real gRPC, mutual TLS; the adapter of `splitllm train`, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from splitllm.metrics import read_records
from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.faults.deployment import counted
from tests.tiny import write_recipe

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "adapter/adapter_model.safetensors"
SMALL = ("train.threads=1", "train.log_every=1")


def start(recipe: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "splitllm", "up", str(recipe), *words, "--output-dir", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(out: Path) -> dict[str, int]:
    """Roles that run with a folder below `out`, and their process numbers."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if "--name" in words and str(out / "deployment.yaml") in words:
                found[words[words.index("--name") + 1]] = int(entry.name)
    return found


def steps_of(out: Path) -> list[int]:
    """Steps that the top has committed."""
    file = out / "cloud" / "metrics.jsonl"
    return [record["step"] for record in read_records(file) if record["event"] == "train"] if file.exists() else []


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while max(steps_of(out), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_the_quickstart_gives_the_adapter_of_train(tmp_path: Path) -> None:
    words = ("train.steps=6", "train.threads=1", "train.schedule.warmup_steps=2", "train.verify_adapter=false")
    recipe = ROOT / "recipes" / "quickstart.yaml"
    process = start(recipe, tmp_path / "up", *words)
    said, complaints = process.communicate(timeout=300)
    assert (process.returncode, complaints) == (0, "")
    assert "7 done" in said and "held-out loss" in said and "splitllm merge" in said
    assert processes_of(tmp_path / "up") == {}
    deployed = yaml.safe_load((tmp_path / "up" / "deployment.yaml").read_text())
    assert deployed["wire"]["certificates"] and len(deployed["wire"]["addresses"]) == 3

    whole = train(load_recipe(recipe, words), tmp_path / "whole")
    assert (tmp_path / "up" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    losses = [[found[2] for found in counted(tmp_path / run)] for run in ("up", "whole")]
    assert losses[0] == losses[1]
    assert whole is not None


def test_a_kill_then_ctrl_c_then_a_kill_of_up_itself_then_the_end(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    steps = 150
    words = (f"train.steps={steps}", "train.threads=1", "split.tiers={client: 1, edge: 1, cloud: 1}")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "up"

    process = start(recipe, out, *words)
    wait_for_step(process, out, 3)
    os.kill(processes_of(out)["edge"], signal.SIGKILL)
    wait_for_step(process, out, 40)
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "edge ended with SIGKILL and is started again" in said
    assert complaints.startswith("stopped after step ") and "--resume" in complaints and complaints.count("\n") == 1
    assert processes_of(out) == {}
    reached = max(steps_of(out))
    assert 40 <= reached < steps

    process = start(recipe, out, *words, "--resume")
    wait_for_step(process, out, reached + 10)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 5
    while processes_of(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(out) == {}, "children live on"

    process = start(recipe, out, *words, "--resume")
    said, complaints = process.communicate(timeout=240)
    assert (process.returncode, complaints) == (0, "")
    assert [r["step"] for r in read_records(out / "metrics.jsonl") if r["event"] == "train"] == [*range(1, steps + 1)]
    train(load_recipe(recipe, words), tmp_path / "whole")
    assert (out / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
