"""Rounds of real processes, of which some are killed in every round, one crawls and one sends what is not finite."""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from splitllm.metrics import read_records
from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.faults.deployment import Deployment, Process, deployed
from tests.marks import soaked
from tests.processes import ROOT
from tests.tiny import write_recipe

pytestmark = pytest.mark.system

CLIENTS = [f"client-{number}" for number in range(5)]
STEPS, EVERY = 16, 4
LEARNS = (
    f"train.steps={STEPS}",
    "split.tiers={client: 5, edge: 2, cloud: 1}",
    "split.cuts=[2, 4]",
    "data.max_length=96",
    "data.limit=600",
    "train.batch_size=2",
    "train.threads=1",
    "lora.dropout=0.0",
    "model.dropout=0",
    "rounds.replicas=local",
    f"rounds.edge_every={EVERY // 2}",
    f"rounds.cloud_every={EVERY}",
    "train.optimizer.lr=4e-3",
    "train.schedule={name: constant}",
    "train.eval_every=null",
    "wire.keepalive=0.25",
)
SLOW, ON, OFF = "client-4", 0.01, 0.19  # runs a twentieth of the time
POISONED = "client-3"


def _poisoned(words: list[str], out: str, err: str) -> None:
    """A client's process that sends NaN in every round."""
    import torch

    from splitllm.roles.rounds import Rounds
    from tests.faults.deployment import _splitllm

    honest = Rounds.value

    def value(self: Rounds, due: int) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(tensor, float("nan")) for name, tensor in honest(self, due).items()}

    Rounds.value = value  # type: ignore[method-assign]
    _splitllm(words, out, err, {})


class Poisoned(Process):
    """One start of it."""

    def __init__(self, words: list[str], out: Path, err: Path) -> None:
        self.since = out.stat().st_size if out.exists() else 0
        fork: Any = multiprocessing.get_context("forkserver")
        self._process = fork.Process(target=_poisoned, args=(words, str(out), str(err)), daemon=True)
        self._process.start()


class Crawl(threading.Thread):
    """Lets one role run for a twentieth of the time."""

    def __init__(self, deployment: Deployment, name: str) -> None:
        super().__init__(daemon=True)
        self._deployment, self._name, self.over = deployment, name, threading.Event()

    def run(self) -> None:
        process = self._deployment.running[self._name]
        while not self.over.is_set():
            process.signal(signal.SIGSTOP)
            time.sleep(OFF)
            process.signal(signal.SIGCONT)
            time.sleep(ON)


def start(deployment: Deployment) -> None:
    """All of them, one poisoned."""
    deployment.start(*(name for name in deployment.names if name != POISONED))
    words = deployment.words_of(POISONED, deployment._listen, deployment._relayed, directory=None)
    deployment.running[POISONED] = Poisoned(words, deployment.log_of(POISONED), deployment.log_of(POISONED, "err"))
    deployment.since[POISONED] = deployment.running[POISONED].since


@pytest.mark.soak
def test_some_lost_in_every_round_one_slow_one_sending_nan_and_it_learns_the_same(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    recipe, drawn = ROOT / "recipes" / "quickstart.yaml", random.Random(time.time_ns())
    clean = train(load_recipe(recipe, LEARNS), tmp_path / "clean")
    with deployed(recipe, tmp_path / "run", *LEARNS) as deployment:
        start(deployment)
        deployment.until_step(1)
        crawl = Crawl(deployment, SLOW)
        crawl.start()
        in_turn = drawn.sample([name for name in CLIENTS if name not in (SLOW, POISONED)], 3)
        for step in range(2, STEPS, EVERY // 2):
            deployment.until_step(step)
            time.sleep(drawn.random() / 4)
            lost = in_turn[step // (EVERY // 2) % len(in_turn)]
            if not deployment.said("cloud", "done"):
                deployment.kill(lost)
                deployment.start(lost)
        deployment.until_step(STEPS)
        crawl.over.set()
        crawl.join()
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert deployment.killed == set(in_turn) and len(deployment.said("cloud", "generation begins")) > 5
        found = deployment.summary()
        rounds = [r for r in read_records(deployment.folder / "cloud" / "metrics.jsonl") if r["event"] == "round"]
        tensors = load_file(deployment.folder / "cloud" / "adapter" / "adapter_model.safetensors")
    before, after = clean["eval_loss_before"], clean["eval_loss_after"]
    record_property("loss", f"clean {before:.4f} -> {after:.4f}, with faults {found['eval_loss_after']:.4f}")
    assert after < 0.9 * before, "who learns nothing is more than 3 % off"
    assert found["eval_loss_after"] < 1.03 * after
    left_out = [r["rejected"] for r in rounds if r["role"] == "edge-1"]
    assert len(left_out) == STEPS // (EVERY // 2) and all(each == {POISONED: "not finite"} for each in left_out)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize(
    "options", [soaked(()), ("rounds.weights=equal", "rounds.secure={aggregate: true}")], ids=["", "masked"]
)
def test_processes_give_the_adapter_of_one_process(tmp_path: Path, options: tuple[str, ...]) -> None:
    tiny = ("split.cuts=[2, 3]", "data.max_length=24", "data.limit=null")
    words = (*LEARNS, *tiny, "train.steps=6", *options)
    recipe = write_recipe(tmp_path)
    train(load_recipe(recipe, words), tmp_path / "one")
    with deployed(recipe, tmp_path / "run", *words) as deployment:
        deployment.start()
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert deployment.adapter() == (tmp_path / "one" / "adapter" / "adapter_model.safetensors").read_bytes()
