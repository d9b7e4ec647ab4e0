"""Servers as processes whose weights an engine holds, killed and started again; what they log of their memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.engines.test_zero import files_work
from tests.faults.deployment import deployed
from tests.tiny import write_recipe

pytestmark = pytest.mark.system

WORDS = ("split.tiers={client: 2, edge: 1, cloud: 1}", "model.dropout=0", "train.steps=6", "train.eval_every=2")
ENGINES = {
    "zero 2": ["server.zero={stage: 2, offload_optimizer: cpu}"],
    "zero 3": ["server.zero={stage: 3, offload_param: cpu}"],
    "files": ["server.zero={stage: 3, offload_param: nvme, nvme_path: FILES}"],
    "fsdp": ["server.fsdp=true"],
}


@pytest.mark.parametrize("engine", ENGINES)
def test_processes_give_the_adapter_of_a_plain_run_though_servers_are_killed(tmp_path: Path, engine: str) -> None:
    if engine == "files" and not files_work():
        pytest.skip("needs libaio: install the package libaio-dev")
    recipe, files = write_recipe(tmp_path), tmp_path / "files"
    files.mkdir()
    words = (*WORDS, *(word.replace("FILES", str(files)) for word in ENGINES[engine]))
    plain, other = tmp_path / "plain", tmp_path / "one"
    train(load_recipe(recipe, WORDS), plain)
    train(load_recipe(recipe, words), other)
    known = (plain / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (other / "adapter" / "adapter_model.safetensors").read_bytes() == known
    with deployed(recipe, tmp_path / "run", *words, "wire.keepalive=0.25") as deployment:
        deployment.start()
        for step, name in ((2, "edge"), (4, "cloud")):
            deployment.until_step(step)
            deployment.kill(name)
            deployment.start(name)
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert deployment.adapter() == known
