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
    "zero 2": "server.zero={stage: 2, offload_optimizer: cpu}",
    "files": "server.zero={stage: 3, offload_param: nvme, nvme_path: FILES}",
}


@pytest.mark.parametrize(("engine", "killed"), [("zero 2", "cloud"), ("files", "edge")])
def test_processes_give_the_adapter_of_a_plain_run_though_a_server_is_killed(
    tmp_path: Path, engine: str, killed: str
) -> None:
    if engine == "files" and not files_work():
        pytest.skip("needs libaio: install the package libaio-dev")
    recipe, files = write_recipe(tmp_path), tmp_path / "files"
    files.mkdir()
    train(load_recipe(recipe, WORDS), tmp_path / "plain")
    words = (*WORDS, ENGINES[engine].replace("FILES", str(files)), "wire.keepalive=0.25")
    with deployed(recipe, tmp_path / "run", *words) as deployment:
        deployment.start()
        deployment.until_step(2)
        deployment.kill(killed)
        deployment.start(killed)
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert deployment.adapter() == (tmp_path / "plain" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert list(files.iterdir()) == []
