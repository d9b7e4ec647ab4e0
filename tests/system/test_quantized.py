"""Quantised servers as processes, killed and started again; and what loading takes while it goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.faults.deployment import deployed
from tests.marks import soaked
from tests.processes import ROOT
from tests.tiny import write_recipe

pytestmark = pytest.mark.system

MIB = 2**20
BESIDE = 32 * MIB
"""What a piece that is being quantised takes, with pages of libraries that the first load brings in."""
WORDS = (
    "split.tiers={client: 3, edge: 2, cloud: 1}",
    "model.dropout=0",
    "train.steps=6",
    "train.eval_every=2",
    "quantization={client: int8, edge: {method: nf4, double: true}, cloud: nf4}",
)


@pytest.mark.parametrize("family", ["gpt2", soaked("llama")])
def test_processes_give_the_adapter_of_one_process_though_servers_are_killed(tmp_path: Path, family: str) -> None:
    recipe = write_recipe(tmp_path, family)
    train(load_recipe(recipe, WORDS), tmp_path / "one")
    with deployed(recipe, tmp_path / "run", *WORDS, "wire.keepalive=0.25") as deployment:
        deployment.start()
        for step, name in ((2, "edge-1"), (4, "cloud")):
            deployment.until_step(step)
            deployment.kill(name)
            deployment.start(name)
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert deployment.adapter() == (tmp_path / "one" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.soak
def test_loading_takes_little_more_than_the_quantised_weights(tmp_path: Path) -> None:
    """A shard of 420 MiB in bf16, of which the largest weight has 64 MiB."""
    script = ROOT / "scripts" / "bench_quantized.py"
    command = [sys.executable, str(script), "--json", "--blocks", "2", "--loading", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    figures: dict[str, dict[str, float]] = json.loads(done.stdout)
    for name, case in figures.items():
        sys.stdout.write(f"{name}, MiB: { ({key: round(value / MIB, 1) for key, value in case.items()}) }\n")
        assert case["weights"] == case["predicted weights"]
    plain = figures.pop("plain, bfloat16")
    assert plain["weights"] > 400 * MIB
    for name, case in figures.items():
        assert case["load growth"] <= case["weights"] + BESIDE, name
        assert case["weights"] < {"int8": 0.51, "nf4": 0.29}[name[:4].rstrip(",")] * plain["weights"], name
