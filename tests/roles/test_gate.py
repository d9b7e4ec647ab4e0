"""A tree whose processes are killed at any moment ends with the adapter of the undisturbed run, bit for bit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest

from splitllm.errors import CheckpointError, DivergedError, PeerError, RejoinError
from splitllm.recipe import Recipe
from splitllm.wire.message import Message
from tests.families import corpus, recipe
from tests.grids import fast_if
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
    return [pytest.param(n, marks=fast_if(n < fast, "soak")) for n in range(all_of_them)]


@pytest.mark.parametrize("seed", seeds(4, 400))
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


TWO_TIERS = {"client": 2, "cloud": 1}


@pytest.mark.parametrize("tiers", [TWO_TIERS, TIERS], ids=["two", "three"])
def test_who_returns_first_without_a_state_that_fits_waits_for_the_others(tiers: dict[str, int]) -> None:
    """client-1 is long left out when all others are lost too, and it is the first to be back."""
    train = {"steps": 16, "batch_size": 1, "accumulate": 2}
    wide = recipe("gpt2", list(range(1, len(tiers))), split={"tiers": tiers}, train=train)
    others = [f"client-{index}" for index in range(tiers["client"]) if index != 1]
    faults = {200: [("client-1", 1000)], 600: [(name, 1500) for name in others]}
    found = finish(Tree(wide, corpus(tiers["client"], rows=6), patience=PATIENCE), faults)
    assert [step for step, _, _ in found.observed] == list(range(16))
    assert found.observed[-1][2] == tiers["client"]
    clients = [past.state() for name, past in found.pasts.items() if name.startswith("client")]
    assert all(same(state, clients[0]) for state in clients)


@pytest.mark.parametrize("seed", seeds(3, 200))
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


def test_a_step_that_is_run_again_without_a_client_is_not_the_one_that_it_kept() -> None:
    """The cloud and client-0 commit a step, client-1 does not; client-0 is away while it is run again, and returns."""
    two = recipe("gpt2", [2], split={"tiers": {"client": 2, "cloud": 1}}, train={"steps": 12, "batch_size": 1})
    found = Tree(two, corpus(2, rows=6), patience=PATIENCE)
    kept = {name: past.kept for name, past in found.pasts.items()}

    async def until(done: Callable[[], bool]) -> None:
        while not done():
            assert found.ticks < 60_000, found.stuck()
            found.tick()
            found._raise_failures()
            kept.update({name: past.kept for name, past in found.pasts.items()})
            await asyncio.sleep(0)

    async def run() -> None:
        for name in found.names:
            found.start(name)
        await until(lambda: 3 <= max(kept["client-0"]) == max(kept["cloud"]) > max(kept["client-1"]))
        step = max(kept["cloud"])
        found.kill("client-0")
        found.kill("client-1")
        found.start("client-1")
        await until(lambda: max(kept["client-1"]) == step)
        assert not same(kept["client-0"][step], kept["client-1"][step])
        found.start("client-0")
        await until(found.complete)

    with asyncio.Runner(loop_factory=TickLoop) as runner:
        runner.run(run())
    assert set(kept["client-0"]) == set(kept["client-1"]) == {11, 12}
    assert all(same(kept["client-0"][step], kept["client-1"][step]) for step in (11, 12))


def joining(name: str, *below: str) -> Message:
    roles = {role: [role.split("-")[0], [[0, "new"]]] for role in (name, *below)}
    return Message("join", name, (0, 0, 0), {"standings": roles})


@pytest.mark.parametrize("patience", [None, PATIENCE])
def test_whoever_is_connected_may_take_its_time_and_patience_counts_from_when_it_left(patience: float | None) -> None:
    found = tree(patience=patience)

    async def wait(seconds: float) -> None:
        for _ in range(int(seconds * 100)):
            found.tick()
            await asyncio.sleep(0)

    async def run() -> None:
        found.start("cloud")
        gate = found.running["cloud"].gate
        assert gate is not None
        gate.back("edge-0")
        gate.back("edge-1")
        found.running["cloud"].spawn(gate.handle(joining("edge-0", "client-0")))
        await wait(10 * PATIENCE)
        assert gate.members == []
        gate.left("edge-1")  # as if its run were complete, which is not
        gate.away("edge-1")
        await wait(1.5 * PATIENCE)  # the cloud has twice the patience of an edge
        assert gate.members == []
        gate.back("edge-1")  # whoever comes and goes is not waited for longer
        await wait(PATIENCE)
        assert gate.members == ([] if patience is None else ["edge-0"])
        found.kill("cloud")

    with asyncio.Runner(loop_factory=TickLoop) as runner:
        runner.run(run())


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
    hopeless.pasts["cloud"].kept, hopeless.pasts["cloud"].origins = {7: hopeless.pasts["cloud"].kept[0]}, {7: "7000"}
    with pytest.raises(CheckpointError, match=r"there is no step whose state every tier still has .*cloud: \[7\]"):
        finish(hopeless)


# What is due of whom


def of_a_generation(messages: list[Message], standings: dict[str, list[str]], kept: dict[str, Any]) -> list[str]:
    """Begin a generation at the cloud with edges that stand for these roles; why each message is refused."""
    found, refusals = tree(), list[str]()

    async def run() -> None:
        found.start("cloud")
        process = found.running["cloud"]
        gate = process.gate
        assert gate is not None
        joins = [joining(name, *below) for name, below in standings.items()]
        for name, states in kept.items():
            for join in joins:
                if name in join.header["standings"]:
                    join.header["standings"][name][1] = states
        replies = await asyncio.gather(*(gate.handle(join) for join in joins))
        for message in messages:
            with pytest.raises(PeerError) as error:
                await gate.handle(replace(message, generation=replies[0].header["generation"]))
            refusals.append(str(error.value))
        found.kill("cloud")

    with asyncio.Runner(loop_factory=TickLoop) as runner:
        runner.run(run())
    return refusals


BOTH = {"edge-0": ["client-0", "client-1"], "edge-1": ["client-2"]}


def test_label_counts_and_losses_are_those_of_the_clients_that_take_part() -> None:
    messages = [
        Message("open", "edge-0", (0, 0, 0), {"labels": {"0": [3], "1": [3]}}),
        Message("close", "edge-0", (0, 0, 0), {"losses": {}}),
        Message("evaluated", "edge-1", (0, 0, 0), {"losses": {"3": [1.0, 2, 3]}}),
    ]
    assert of_a_generation(messages, {**BOTH, "edge-0": ["client-0"]}, {}) == [
        "edge-0 sent open with labels of clients [0, 1], where [0] take part",
        "edge-0 sent close with losses of clients [], where [0] take part",
        "edge-1 sent evaluated with losses of clients [3], where [2] take part",
    ]


def test_states_come_from_the_donor_alone_and_are_whole() -> None:
    donor = {f"adapter/{name}": tensor for name, tensor in tree().pasts["client-0"].adapter().items()}
    messages = [
        Message("share", "edge-0", (0, 0, 0)),
        Message("share", "edge-1", (0, 0, 0), {}, donor),
    ]
    assert of_a_generation(messages, BOTH, {"client-1": [[5, "6999"]]}) == [
        f"edge-0 sent share with the states of 0 adapter tensors, where those of {len(donor)} are due",
        f"edge-1 sent share with the states of {len(donor)} adapter tensors, where those of 0 are due",
    ]
