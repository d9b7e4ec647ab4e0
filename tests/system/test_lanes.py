"""Clients at their own pace, as processes that are killed: nobody's lane notices another's, and each learns right."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitllm.metrics import read_records
from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.deployment.lanes import kept
from tests.faults.deployment import Deployment, deployed
from tests.tiny import write_recipe

pytestmark = pytest.mark.system

STEPS = 60
LONG = 120  # a restart takes seconds: clients that are left alone must not be done before it
CLIENTS = [f"client-{number}" for number in range(4)]
TRAIN = (
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.eval_every=20",
    "wire.keepalive=0.25",
    "model.dtype=float64",
    "model.dropout=0",
    "split.client_cuts={client-1: 2, client-2: 2}",
)
PER_CLIENT = ("split.tiers={client: 4, edge: 2, cloud: 1}", "lora.adapters=per_client")
CONTINUOUS = ("server.batching=continuous", "server.gradient_wait=0.02")


def adapters(run: Path) -> dict[str, Any]:
    return {name: load_file(run / "adapter" / name / "adapter_model.safetensors") for name in CLIENTS}


def joined(deployment: Deployment) -> dict[str, int]:
    """How often every client has joined: the generations of its lane."""
    return {name: len(deployment.said(name, "joined")) for name in CLIENTS}


def steps_of(deployment: Deployment) -> Counter[tuple[str, int]]:
    """How often the top's metrics tell of each step of each client."""
    path = deployment.folder / "cloud" / "metrics.jsonl"
    records = read_records(path) if path.exists() else []
    return Counter((record["client"], record["step"]) for record in records if record["event"] == "train")


def last_steps(deployment: Deployment) -> dict[str, int]:
    found = dict.fromkeys(CLIENTS, 0)
    for name, step in steps_of(deployment):
        found[name] = max(found[name], step)
    return found


def until_all_did(deployment: Deployment, step: int) -> None:
    deployment.until(lambda: min(last_steps(deployment).values()) >= step, f"step {step} of all", every=0.02)


@pytest.mark.parametrize("labels", ["client", "cloud"])
@pytest.mark.soak
def test_whoever_is_killed_every_client_learns_what_it_learns_undisturbed(labels: str, tmp_path: Path) -> None:
    recipe, drawn = write_recipe(tmp_path), random.Random(time.time_ns())
    words = (*TRAIN, *PER_CLIENT, f"train.steps={LONG}", "train.eval_every=60", f"split.labels={labels}")
    with deployed(recipe, tmp_path / "run", *words, *CONTINUOUS) as deployment:
        deployment.start()
        until_all_did(deployment, drawn.randint(1, 8))
        time.sleep(drawn.random() / 5)
        before = joined(deployment)
        deployment.kill("client-1")
        assert before == dict.fromkeys(CLIENTS, 1)
        at = last_steps(deployment)
        others = [name for name in CLIENTS if name != "client-1"]
        deployment.until(
            lambda: all(last_steps(deployment)[name] >= at[name] + 3 for name in others), "others go on", every=0.02
        )
        deployment.start("client-1")
        deployment.until(lambda: joined(deployment)["client-1"] == 2, "client-1 to join")
        assert joined(deployment) == {**before, "client-1": 2}

        time.sleep(drawn.random() / 5)
        before = joined(deployment)
        deployment.kill("edge-0")
        at = last_steps(deployment)
        deployment.until(
            lambda: all(last_steps(deployment)[name] >= min(LONG, at[name] + 3) for name in ("client-2", "client-3")),
            "the other edge's clients go on",
            every=0.02,
        )
        deployment.start("edge-0")
        deployment.until(lambda: joined(deployment)["client-0"] == before["client-0"] + 1, "client-0 to join")
        assert {name: joined(deployment)[name] for name in ("client-2", "client-3")} == {"client-2": 1, "client-3": 1}

        time.sleep(drawn.random() / 5)
        assert not deployment.said("cloud", "done"), "it is over before the cloud is killed"
        deployment.kill("cloud")
        deployment.start("cloud")
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert steps_of(deployment) == Counter((name, step) for name in CLIENTS for step in range(1, LONG + 1))

        train(load_recipe(recipe, words), tmp_path / "whole")
        expected, found = adapters(tmp_path / "whole"), adapters(deployment.folder / "cloud")
        for name in CLIENTS:
            assert found[name].keys() == expected[name].keys()
            for key, tensor in expected[name].items():
                error = float((found[name][key] - tensor).abs().max() / tensor.abs().max())
                assert error <= 1e-9, f"{name}: {key} is off by {error:.1e}"
        summary = (deployment.folder / "cloud" / "summary.json").read_text()
        assert '"train_tokens"' in summary


@pytest.mark.soak
def test_whoever_is_killed_every_step_is_in_what_is_common_once(tmp_path: Path) -> None:
    recipe, drawn = write_recipe(tmp_path), random.Random(time.time_ns())
    words = (*TRAIN, *CONTINUOUS, "split.tiers={client: 4, edge: 1, cloud: 1}", "lora.adapters=common")
    with deployed(recipe, tmp_path / "run", *words, "server.step_tenants=3") as deployment:
        deployment.start()
        until_all_did(deployment, drawn.randint(1, 8))
        for role in ("client-1", "edge", "client-2", "cloud", "edge"):
            time.sleep(drawn.random() / 3)
            assert not deployment.said("cloud", "done"), f"it is over before {role} is killed"
            deployment.kill(role)
            deployment.start(role)
            goal = min(STEPS, min(last_steps(deployment).values()) + 2)
            until_all_did(deployment, goal)
        assert deployment.finish() == dict.fromkeys(deployment.names, 0), deployment.tails()
        assert steps_of(deployment) == Counter((name, step) for name in CLIENTS for step in range(1, STEPS + 1))
        for server in ("edge", "cloud"):
            values = kept(deployment.folder / server)
            assert values["given"] == {str(client): STEPS for client in range(4)}
            assert values["changes"] == 4 * STEPS + values["steps"] and values["steps"] == 4 * STEPS // 3
        first, *others = adapters(deployment.folder / "cloud").values()
        for key, tensor in first.items():
            if ".h.2." in key or ".h.3." in key:
                assert all(torch.equal(other[key], tensor) for other in others), key
        records = read_records(deployment.folder / "cloud" / "metrics.jsonl")
        losses = [record["loss"] for record in records if record["event"] == "eval"]
        assert sum(losses[-4:]) < sum(losses[:4])
