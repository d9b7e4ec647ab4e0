"""What is wrong in one lane stays in it: real gates and servers, asked by hand."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from splitllm.deployment.bounds import allowed
from splitllm.errors import DivergedError, PeerError, RejoinError
from splitllm.recipe import children_of, clients_below, parent_of
from splitllm.roles.assembly import batching_of, entries_of
from splitllm.roles.device import Inline
from splitllm.roles.gate import Gate
from splitllm.roles.generation import Summit
from splitllm.roles.lanes import LaneError, Lanes
from splitllm.roles.server import Server
from splitllm.wire.link import Traffic
from splitllm.wire.message import Kind, Message
from tests.families import corpus
from tests.roles.test_batching import wanted
from tests.roles.tree import Past, Tree
from tests.wire.serving import raises

SETTINGS = {"server": {"batching": "continuous"}, "lora": {"adapters": "per_client"}}


class Above:
    """The role above: takes note, and answers what it is told to."""

    def __init__(self) -> None:
        self.traffic, self.asked = Traffic(), list[Message]()

    async def request(self, message: Message) -> Message:
        self.asked.append(message)
        if message.kind == "diverged":
            raise DivergedError(message.header["what"])
        origin = {"generation": 7, "step": 0, "origin": "new", "donors": {}, "lacking": [], "evaluated": False}
        return replace(message, sender="cloud", header=origin)


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree(wanted("gpt2", [2, 4], "cloud", 4, "float64", **SETTINGS), corpus(4))


def evaluated(step: int, losses: Mapping[int, Any]) -> None:
    if any(told[0] is None for told in losses.values()):
        raise DivergedError(f"step {step}: not finite")


def lanes_of(
    tree: Tree, name: str, over: list[int], uplink: Above | None = None, park_after: float | None = None
) -> Lanes:
    worker = tree.pasts[name].worker
    batching = batching_of(tree.recipe, worker, Inline())
    gates = {}
    for client in clients_below(tree.recipe, name):
        own = worker.lane(client)
        past = Past(name, own)
        children = [child for child in children_of(tree.recipe, name) if client in clients_below(tree.recipe, child)]
        top = tree.assembly.top() if parent_of(tree.recipe, name) is None else None
        server = Server(
            name,
            children,
            own,
            uplink=uplink,
            top=top,
            entries=entries_of(tree.recipe, name),
            batching=batching,
            schedule=tree.schedule,
        )
        summit = Summit(lambda step: False, evaluated, lambda words, adapter: None, 1)
        limits = allowed(tree.plan, name, client)
        gates[client] = Gate(server, past, limits, summit=summit if top is not None else None, lane=client)
    return Lanes(gates, batching, park_after, over.append)


def said(kind: Kind, client: int, sender: str | None = None, step: int = 0, **header: object) -> Message:
    return Message(kind, sender or f"edge-{client // 2}", (step, client, 0), header)


def joining(client: int, states: list[list[object]] | None = None, sender: str | None = None) -> Message:
    standing = states or [[0, "new"]]
    names = [f"client-{client}", f"edge-{client // 2}"][: 1 if sender else 2]
    return said("join", client, sender, standings={name: [name, standing] for name in names})


async def joined(lanes: Lanes, client: int) -> int:
    """The generation that begins."""
    number = (await lanes.handle(joining(client))).header["generation"]
    assert isinstance(number, int)
    return number


async def trains(lanes: Lanes, client: int, generation: int) -> None:
    """Whether it may open a step."""
    opened = said("open", client, labels={str(client): [3, 4]})
    lanes.check(opened)
    reply = await lanes.handle(replace(opened, generation=generation))
    assert reply.header["weights"] == {client: 1 / 7}


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def test_a_message_belongs_to_the_lane_that_its_place_names_if_that_is_below_its_sender(tree: Tree) -> None:
    async def test() -> None:
        lanes = lanes_of(tree, "cloud", [])
        numbers = [await joined(lanes, client) for client in range(4)]
        for client, number in enumerate(numbers):
            await trains(lanes, client, number)
        for sender, client in (("edge-1", 0), ("edge-0", 4), ("edge-0", -1), ("client-0", 0)):
            for look in (lanes.check, lanes._gate):
                with pytest.raises(PeerError, match="not below it"):
                    look(said("open", client, sender, labels={"0": [1]}))

    run(test)


def test_one_lane_begins_anew_and_the_others_go_on(tree: Tree) -> None:
    async def test() -> None:
        lanes = lanes_of(tree, "cloud", [])
        first, second = await joined(lanes, 0), await joined(lanes, 1)
        await joined(lanes, 0)
        await raises(lanes.handle(replace(said("open", 0, labels={"0": [1]}), generation=first)), RejoinError)
        await trains(lanes, 1, second)

    run(test)


def test_of_a_child_with_several_lanes_what_is_wrong_is_an_error_in_one_of_them(
    tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        lanes = lanes_of(tree, "cloud", [])
        first, second = await joined(lanes, 0), await joined(lanes, 1)
        wrong = said("open", 0, labels={"1": [3]})
        lanes.check(wrong)
        assert "client '1', which is not below it" in await raises(lanes.handle(wrong), LaneError)
        own = {"0": [1.0] * lanes.gates[0].allowed.children["edge-0"].own[0]}
        closing = replace(said("close", 0, norms={}, own=own, losses={"0": [1.0, 1, 1]}, bytes={}), generation=first)
        assert "not open" in await raises(lanes.handle(closing), LaneError)
        await trains(lanes, 1, second)

    with caplog.at_level(logging.WARNING):
        run(test)
    assert [record.fields["client"] for record in caplog.records] == [0, 0]  # type: ignore[attr-defined]


def test_a_child_with_one_lane_is_refused_for_what_is_wrong(tree: Tree) -> None:
    async def test() -> None:
        lanes = lanes_of(tree, "edge-0", [], Above())
        wrong = said("open", 0, "client-0", labels={"1": [3]})
        with pytest.raises(PeerError) as refused:
            lanes.check(wrong)
        assert refused.type is PeerError
        generation = (await lanes.handle(joining(0, sender="client-0"))).header["generation"]
        own = {"0": [1.0] * lanes.gates[0].allowed.children["client-0"].own[0]}
        closing = said("close", 0, "client-0", norms={}, own=own, losses={"0": [1.0, 1, 1]}, bytes={})
        assert "not open" in await raises(lanes.handle(replace(closing, generation=generation)), PeerError)

    run(test)


def test_a_client_without_a_state_that_fits_does_not_end_the_run(tree: Tree) -> None:
    async def test() -> None:
        over: list[int] = []
        lanes = lanes_of(tree, "cloud", over)
        second = await joined(lanes, 1)
        told = await raises(lanes.handle(joining(0, [[3, "1"]])), LaneError)
        assert "no step whose state every tier still has" in told
        await trains(lanes, 1, second)
        await trains(lanes, 0, await joined(lanes, 0))
        assert not over and not lanes.finished.is_set()

    run(test)


def finished(tree: Tree, lanes: Lanes, client: int, generation: int) -> Message:
    child = lanes.gates[client].allowed.children[f"edge-{client // 2}"]
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in child.adapter.items()}
    return replace(said("finish", client, roles={}), tensors=tensors, generation=generation)


def test_nobody_waits_for_a_lane_whose_values_are_not_finite(tree: Tree) -> None:
    async def test() -> None:
        over: list[int] = []
        lanes = lanes_of(tree, "cloud", over)
        first = await joined(lanes, 0)
        for client in (1, 2, 3):
            await lanes.handle(finished(tree, lanes, client, await joined(lanes, client)))
        assert not lanes.finished.is_set()
        evaluated = replace(said("evaluated", 0, losses={"0": [None, 3, 3]}), generation=first)
        assert "not finite" in await raises(lanes.handle(evaluated), DivergedError)
        await asyncio.wait_for(lanes.finished.wait(), 1)
        assert over == [0]
        for name in ("edge-0", "edge-1"):
            lanes.left(name)
        assert lanes.all_left.is_set()
        await trains(lanes, 0, await joined(lanes, 0))

    run(test)


def test_the_role_above_hears_of_a_client_that_says_it_has_diverged(tree: Tree) -> None:
    async def test() -> None:
        over: list[int] = []
        above = Above()
        lanes = lanes_of(tree, "edge-0", over, above)
        await lanes.handle(joining(1, sender="client-1"))
        await raises(lanes.handle(said("diverged", 1, "client-1", what="enough")), DivergedError)
        await asyncio.sleep(0)
        assert [(message.kind, message.micro_batch[1], message.sender) for message in above.asked] == [
            ("join", 1, "edge-0"),
            ("diverged", 1, "edge-0"),
        ]
        assert above.asked[1].header == {"what": "enough"} and over == [1]

    run(test)


def test_a_child_is_away_in_all_its_lanes(tree: Tree) -> None:
    async def test() -> None:
        lanes = lanes_of(tree, "cloud", [])
        for name in ("edge-0", "edge-1"):
            lanes.back(name)
        assert lanes.missing(0) == []
        lanes.away("edge-1")
        assert lanes.missing(0) == ["edge-1"] and lanes.children == ["edge-0", "edge-1"]
        assert not lanes.gates[1].missing(0) and lanes.gates[2].missing(0) and lanes.gates[3].missing(0)

    run(test)
