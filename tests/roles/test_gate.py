"""A tree whose processes are killed at any moment ends with the adapter of the undisturbed run, bit for bit."""

from __future__ import annotations

import asyncio
from functools import cache
from random import Random
from typing import Any

import pytest

from splitllm.errors import CheckpointError, DivergedError, PeerError, RejoinError
from splitllm.recipe import Recipe
from splitllm.wire.message import Message
from tests.families import corpus, recipe
from tests.roles.tree import KEPT, TickLoop, Tree, same

LABELS = ["client", "cloud"]
TIERS = {"client": 3, "edge": 2, "cloud": 1}  # client-0 and client-1 on edge-0, client-2 on edge-1
Faults = dict[int, list[tuple[str, int]]]
PATIENCE = 1.5


def wanted(labels: str = "cloud", **train: Any) -> Recipe:
    settings = {"steps": 3, "batch_size": 1, "accumulate": 2, "in_flight": 2, "eval_every": 1, **train}
    return recipe("gpt2", [1, 2], labels, split={"tiers": TIERS}, train=settings)


def tree(labels: str = "cloud", *, seed: int = 0, patience: float | None = None, **train: Any) -> Tree:
    return Tree(wanted(labels, **train), corpus(3, rows=6), seed=seed, patience=patience)


def finish(tree: Tree, faults: Faults | None = None, absent: list[str] | None = None) -> Tree:
    with asyncio.Runner(loop_factory=TickLoop) as runner:
        runner.run(tree.run(faults, absent or []))
    return tree


@cache
def undisturbed(labels: str) -> Tree:
    return finish(tree(labels))


def random_faults(seed: int, ticks: int, names: list[str]) -> Faults:
    """One to five moments; at each one role is killed, or several or all at once, and returns soon or late."""
    rng, faults = Random(seed), dict[int, list[tuple[str, int]]]()
    for _ in range(rng.randint(1, 5)):
        hit = rng.sample(names, rng.choice([1, 1, 2, len(names)]))
        faults.setdefault(rng.randint(1, ticks), []).extend((name, rng.choice([1, 2, 5, 30, 100])) for name in hit)
    return faults


def seeds(fast: int, all_of_them: int) -> list[Any]:
    return [pytest.param(n, marks=[] if n < fast else [pytest.mark.soak]) for n in range(all_of_them)]


@pytest.mark.parametrize("seed", seeds(8, 400))
def test_whoever_is_killed_whenever_the_run_is_the_same(seed: int) -> None:
    labels = LABELS[seed % 2]
    expected = undisturbed(labels)
    found = finish(tree(labels, seed=seed), random_faults(seed, int(expected.ticks * 1.3), expected.names))
    assert same(found.adapter, expected.adapter)
    assert found.observed == expected.observed and [step for step, _, _ in found.observed] == [0, 1, 2]
    assert found.evaluations == expected.evaluations == [0, 1, 2, 3]
    for name, past in found.pasts.items():
        assert set(past.kept) == {2, 3}
        assert same(past.kept[3], expected.pasts[name].kept[3]), name


def test_where_all_are_waited_for_nobody_is_left_out() -> None:
    found = finish(tree(), {200: [("client-0", 3000)]})
    assert found.ticks > 3000 and found.observed == undisturbed("cloud").observed


# `absent: drop`


def test_a_client_that_never_comes_is_left_out() -> None:
    found = finish(tree(patience=PATIENCE), absent=["client-1"])
    assert [clients for _, _, clients in found.observed] == [2, 2, 2]


@pytest.mark.parametrize("gone", [["client-2"], ["edge-1", "client-2"], ["client-0", "client-1"]], ids="+".join)
def test_one_that_stays_away_is_left_out_and_the_others_go_on(gone: list[str]) -> None:
    found = finish(tree(patience=PATIENCE), {200: [(name, 0) for name in gone]})
    counts = [clients for _, _, clients in found.observed]
    assert counts[0] == 3 and counts[-1] == 3 - max(1, len([name for name in gone if "client" in name]))


@pytest.mark.parametrize("gone", [["client-0"], ["edge-1"], ["client-0", "client-1"]], ids="+".join)
def test_one_that_returns_gets_the_state_of_the_others(gone: list[str]) -> None:
    found = finish(tree(patience=PATIENCE, steps=16, eval_every=None), {300: [(name, 600) for name in gone]})
    counts = [clients for _, _, clients in found.observed]
    assert len(counts) == 16 and counts[0] == counts[-1] == 3 and min(counts) < 3
    assert any(message.kind == "share" for message, _ in found.seen)
    clients = [found.pasts[name] for name in found.names if name.startswith("client")]
    assert all(same(past.state(), clients[0].state()) for past in clients)
    assert same(found.pasts["edge-0"].state(), found.pasts["edge-1"].state())
    assert all(same(past.adapter(), {n: found.adapter[n] for n in past.adapter()}) for past in found.pasts.values())


def test_when_all_are_away_the_run_waits_for_them() -> None:
    clients = ["client-0", "client-1", "client-2"]
    found = finish(tree(patience=PATIENCE), {200: [(name, 2000) for name in clients]})
    assert found.ticks > 2000 and [step for step, _, _ in found.observed] == [0, 1, 2]
    assert found.observed[-1][2] == 3


@pytest.mark.parametrize("seed", seeds(5, 200))
def test_whoever_is_left_out_whenever_the_replicas_end_alike(seed: int) -> None:
    rng = Random(seed)
    clients_or_edges = undisturbed("cloud").names[1:]
    faults: Faults = {}
    for _ in range(rng.randint(1, 4)):
        hit = rng.sample(clients_or_edges, rng.choice([1, 2, 3]))
        faults.setdefault(rng.randint(1, 900), []).extend((name, rng.choice([5, 100, 200, 400])) for name in hit)
    found = finish(tree(patience=PATIENCE, steps=12, eval_every=None, seed=seed), faults)
    assert [step for step, _, _ in found.observed] == list(range(12))
    done = [found.pasts[name] for name in found.names if name.startswith("client")]
    assert all(same(past.state(), done[0].state()) for past in done)
    assert all(len(past.kept) <= KEPT for past in done)


def test_one_that_returns_when_the_run_is_complete_does_not_run_it_again() -> None:
    found = tree(patience=PATIENCE, steps=2)
    with pytest.raises(PeerError, match="the run is complete without client-2, cloud, edge-1"):
        finish(found, {200: [("client-2", 2000)]})
    assert [clients for _, _, clients in found.observed] == [3, 2]


# What is refused


def ask(message: Message, tree: Tree) -> None:
    async def run() -> None:
        tree.start("cloud")
        gate = tree.running["cloud"].gate
        assert gate is not None
        await gate.handle(message)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["open", "forward", "backward", "close", "share", "evaluated", "finish"])
def test_before_a_generation_begins_and_after_it_is_over_all_must_join(kind: Any) -> None:
    with pytest.raises(RejoinError, match="cloud: generation 3 is over; join again"):
        ask(Message(kind, "edge-0", (0, 0, 0), generation=3), tree())


def test_a_role_below_ends_the_run_when_its_values_are_not_finite() -> None:
    with pytest.raises(DivergedError, match=r"^hidden_TD of edge-0: a value is nan$"):
        ask(Message("diverged", "edge-0", (0, 0, 0), {"what": "hidden_TD of edge-0: a value is nan"}), tree())


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("tiers", [TIERS, {"client": 1, "edge": 1, "cloud": 1}], ids=["replicas", "lone roles"])
def test_norms_that_are_not_finite_travel_and_end_the_run(labels: str, tiers: dict[str, int]) -> None:
    settings = {"steps": 3, "batch_size": 1, "accumulate": 2, "in_flight": 2, "optimizer": {"lr": 1e200}}
    wild = recipe("gpt2", [1, 2], labels, split={"tiers": tiers}, train=settings)
    with pytest.raises(DivergedError, match=r"^step [23]: the gradient norm is (inf|nan); lower the learning rate$"):
        finish(Tree(wild, corpus(tiers["client"], rows=6)))


def test_where_no_step_is_left_everybody_learns_why() -> None:
    hopeless = tree()
    hopeless.pasts["cloud"].kept = {7: hopeless.pasts["cloud"].kept[0]}
    with pytest.raises(CheckpointError, match=r"there is no step whose state every tier still has .*cloud: \[7\]"):
        finish(hopeless)
