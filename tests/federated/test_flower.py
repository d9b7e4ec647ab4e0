"""Rounds by Flower: a real SuperLink and SuperNodes on loopback between edge processes. Part of `make test-flower`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.federated import sites
from tests.federated.edge import WEIGHTS, undisturbed
from tests.federated.flowers import Flowers

pytest.importorskip("flwr", reason="needs the extra flower: make test-flower")
pytestmark = pytest.mark.system


@pytest.fixture
def flowers(tmp_path: Path) -> Iterator[Flowers]:
    with Flowers(tmp_path / "flowers") as started:
        yield started


def through(flowers: Flowers) -> bool:
    return "through: " in flowers.log("run")


def assert_undisturbed(flowers: Flowers, rounds: int) -> None:
    for name, wanted in undisturbed(rounds).items():
        found = load_file(flowers.result(name))
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)


def test_edges_end_with_what_our_own_engine_gives(flowers: Flowers) -> None:
    for name in WEIGHTS:
        flowers.edge(name, rounds=3)
        flowers.node(f"node-of-{name}", name)
    flowers.run()
    flowers.wait(lambda: through(flowers))
    assert_undisturbed(flowers, rounds=3)
    assert "through: 3 rounds of 2 edges" in flowers.log("run")
    assert [flowers.stop(name) for name in ("node-of-edge-0", "node-of-edge-1", "link")] == [0, 0, -signal.SIGTERM]


def test_sites_of_the_real_engine_give_the_adapter_of_one_tree(flowers: Flowers, tmp_path: Path) -> None:
    """One by `splitllm train`, the other as processes: what the built-in engine gives with a cloud above both edges."""
    recipe = sites.written(flowers.folder)
    for index, (name, verb) in enumerate({"edge-0": "train", "edge-1": "up"}.items()):
        words = sites.site(flowers.folder, index, flowers.address(name))
        flowers.site(name, verb, recipe, [*words, "train.threads=1"])
        flowers.node(f"node-of-{name}", name)
    flowers.run()
    train(load_recipe(recipe, sites.one_tree(flowers.folder)), tmp_path / "tree")
    flowers.wait(lambda: through(flowers), 240)
    flowers.wait(lambda: all((flowers.folder / name / "summary.json").exists() for name in WEIGHTS), 60)
    assert "through: 3 rounds of 2 edges" in flowers.log("run")
    far = {name: sites.apart(flowers.folder / name / "adapter", tmp_path / "tree" / "adapter") for name in WEIGHTS}
    assert max(far.values()) < 1e-6, far


def test_a_node_that_is_killed_and_an_edge_that_starts_late_change_nothing(flowers: Flowers) -> None:
    flowers.edge("edge-0", rounds=3)
    for name in WEIGHTS:
        flowers.node(f"node-of-{name}", name)
    flowers.run()
    flowers.wait(lambda: "Start `flwr-clientapp` process" in flowers.log("node-of-edge-0"))
    flowers.stop("node-of-edge-0", signal.SIGKILL)
    flowers.edge("edge-1", rounds=3)
    flowers.node("another-of-edge-0", "edge-0")
    flowers.wait(lambda: through(flowers), 240)
    assert_undisturbed(flowers, rounds=3)


def test_edges_with_different_rules_are_told_so_and_end(flowers: Flowers) -> None:
    for name, rule in zip(WEIGHTS, ("fedavg", "median"), strict=True):
        flowers.edge(name, rounds=2, rule=rule)
        flowers.node(f"node-of-{name}", name)
    flowers.run()
    edges = [flowers.running.pop(name) for name in WEIGHTS]
    assert [edge.wait(timeout=120) for edge in edges] == [1, 1]
    for name in WEIGHTS:
        said = "cannot go on: edge-0, edge-1 have different rules; use one recipe everywhere"
        assert said in flowers.log(name)


def test_a_run_ends_after_as_many_rounds_as_are_configured(flowers: Flowers) -> None:
    for name in WEIGHTS:
        flowers.edge(name, rounds=2)
        flowers.node(f"node-of-{name}", name)
    flowers.run("run", "--run-config", "rounds=2")
    flowers.wait(lambda: through(flowers))
    flowers.wait(lambda: all(flowers.result(name).exists() for name in WEIGHTS), 10)
    assert_undisturbed(flowers, rounds=2)
