"""Several gloo ranks on the CPU: the same adapter as one process, refusals in one line, one consistent checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from splitllm.checkpoint import newest
from splitllm.metrics import read_records
from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.faults.deployment import counted
from tests.marks import soaked
from tests.processes import free_port
from tests.tiny import write_recipe

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
THREE = "split.tiers={client: 4, edge: 2, cloud: 1}"
WIDE = "model.dtype=float64"
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_recipe(tmp_path)
    return tmp_path


def launch(launcher: list[str], folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *launcher, "-m", "splitllm", "train", str(folder / "recipe.yaml"), *words]
    return subprocess.Popen(
        [*command, "--output-dir", str(folder / "two")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def two_ranks(name: str, folder: Path, *words: str) -> subprocess.Popen[str]:
    return launch([*LAUNCHERS[name], str(free_port())], folder, *words)


def ends(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it says until it ends; its whole family is gone afterwards."""
    try:
        return process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def furthest(one: Path, two: Path) -> float:
    first, second = adapter(one), adapter(two)
    assert first.keys() == second.keys()
    assert {tensor.dtype for tensor in second.values()} == {torch.float64}
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    ("launcher", "split"),
    [
        ("torchrun", [THREE]),
        ("accelerate", [THREE, "split.labels=cloud", "train.loss_weights=tenant"]),
        soaked("accelerate", ["split.tiers={client: 2}", "split.cuts=[]"]),
    ],
)
def test_two_ranks_give_the_adapter_of_one(folder: Path, launcher: str, split: list[str]) -> None:
    process = two_ranks(launcher, folder, *split, WIDE, "train.processes=2", "train.verify_adapter=true")
    summary = train(load_recipe(folder / "recipe.yaml", [*split, WIDE]), folder / "one")
    said, complaints = ends(process)
    assert process.returncode == 0, complaints
    assert furthest(folder / "one", folder / "two") <= 1e-11
    losses = [[found[2] for found in counted(folder / run)] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-11)
    assert "process-0" in said and "process-1" in said
    assert str(summary["train_tokens"]) in said


def test_more_processes_than_the_recipe_says_are_refused(folder: Path) -> None:
    process = two_ranks("torchrun", folder, THREE)
    said, complaints = ends(process)
    assert process.returncode != 0
    assert said == ""
    lines = [line for line in complaints.splitlines() if line.startswith("train.processes:")]
    assert len(lines) == 1
    assert lines[0].startswith("train.processes: the recipe expects 1, but 2 run; ")
    assert "exitcode  : 2" in complaints
    assert not (folder / "two").exists()


def test_the_flags_that_start_one_process_only_are_not_taken_for_two(folder: Path) -> None:
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    process = launch(launcher, folder, THREE, "train.processes=2")
    said, complaints = ends(process)
    assert process.returncode != 0
    assert "train.processes: the recipe expects 2, but 1 run; start 2: accelerate launch --multi_gpu" in complaints
    assert "non-zero exit status 2" in complaints
    assert said == ""
    assert not (folder / "two").exists()


def test_ctrl_c_stops_both_ranks_at_the_same_step(folder: Path) -> None:
    words = [THREE, WIDE, "train.steps=30", "train.checkpoint_every=1000"]
    process = two_ranks("torchrun", folder, *words, "train.processes=2")
    metrics = folder / "two" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() or len(read_records(metrics)) < 5:
        assert process.poll() is None and time.monotonic() < deadline, ends(process)
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher and to every rank
    _, complaints = ends(process)
    saved = newest(folder / "two")
    assert saved is not None and 4 <= saved.step < 30
    assert f"stopped after step {saved.step} of 30" in complaints and "--resume" in complaints
    assert max(record["step"] for record in read_records(metrics)) == saved.step

    process = two_ranks("torchrun", folder, *words, "train.processes=2", "--resume")
    _, complaints = ends(process)
    assert process.returncode == 0, complaints
    train(load_recipe(folder / "recipe.yaml", words), folder / "one")
    assert furthest(folder / "one", folder / "two") <= 1e-11
