"""A server answers what the protocol allows and refuses the rest by name."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from splitllm.errors import PeerError
from splitllm.roles.assembly import Roles
from splitllm.roles.together import add_into
from splitllm.wire.message import Message
from tests.families import corpus, recipe, roles_of
from tests.test_exactness import one_step, with_moved_b

Wire = list[tuple[Message, Message]]


def roles(cuts: list[int], labels: str = "client") -> Roles:
    return roles_of(recipe("gpt2", cuts, labels), corpus(2))


def ask(roles: Roles, message: Message, tier: str = "client") -> Message:
    return asyncio.run(roles.links[tier][0].request(message))


def gradient(step: int, client: int, index: int) -> Message:
    tensors = {"gradient_ND": torch.zeros(3, 32, dtype=torch.float64)}
    return Message("backward", "client-0", (step, client, index), tensors=tensors)


@pytest.mark.parametrize("tier", ["client", "edge"])
def test_a_gradient_for_an_unknown_micro_batch_is_refused(tier: str) -> None:
    with pytest.raises(PeerError, match=r"client-0 sent a gradient for .*step=5.*, which is not waiting for one"):
        ask(roles([2, 4]), gradient(5, 0, 0), tier)


def test_a_gradient_is_taken_once(wire: Wire) -> None:
    several = roles([2, 4])
    one_step(several)
    sent = next(message for message, _ in wire if message.kind == "backward" and message.sender == "client-0")
    with pytest.raises(PeerError, match="not waiting for one"):
        ask(several, sent)


def test_an_evaluated_micro_batch_waits_for_no_gradient(wire: Wire) -> None:
    several = roles([2, 4])
    asyncio.run(several.clients[0].evaluate())
    evaluated = {message.micro_batch for message, _ in wire}
    assert evaluated and all(step == -1 for step, _, _ in evaluated)
    for micro_batch in evaluated:
        with pytest.raises(PeerError, match="not waiting for one"):
            ask(several, gradient(*micro_batch))


def test_a_coordinator_computes_nothing() -> None:
    hidden = {"hidden_TD": torch.zeros(3, 32), "positions_N": torch.tensor([0])}
    header = {"lengths": [3], "train": False, "input_gradient": False}
    with pytest.raises(PeerError, match="coordinator only coordinates: it holds no blocks"):
        ask(roles([]), Message("forward", "client-0", (0, 0, 0), header, hidden))
    with pytest.raises(PeerError, match="not waiting for one"):
        ask(roles([]), gradient(0, 0, 0))


@pytest.mark.parametrize("kind", ["open", "close"])
def test_a_stranger_cannot_open_or_close_a_step(kind: str) -> None:
    content = {"labels": {0: [1]}} if kind == "open" else {"norms": {}, "own": {}}
    with pytest.raises(PeerError, match="mallory is not a child here"):
        ask(roles([2, 4]), Message(kind, "mallory", (0, 0, 0), content))  # type: ignore[arg-type]


@pytest.mark.parametrize("cuts", [[], [2], [2, 4]], ids=str)
def test_when_the_top_fails_every_client_learns_it(cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_counts: object) -> object:
        raise PeerError("the top is out of order")

    monkeypatch.setattr("splitllm.roles.assembly.token_weights", fail)
    several = roles(cuts)

    async def together() -> list[object]:
        steps = asyncio.gather(*(client.step(0) for client in several.clients), return_exceptions=True)
        return await asyncio.wait_for(steps, timeout=5)

    assert [str(outcome) for outcome in asyncio.run(together())] == ["the top is out of order"] * 2


@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_all_get_the_same_weights_norm_and_factor(labels: str, wire: Wire) -> None:
    several = roles([2, 4], labels)
    with_moved_b(several)
    one_step(several)
    counts = [sum(several.clients[0].stream.take(index).labels for index in range(2))]
    counts.append(sum(several.clients[1].stream.take(index).labels for index in range(2)))
    opened = [reply.header for message, reply in wire if message.kind == "open"]
    assert opened == [{"weights": dict.fromkeys((0, 1), 1 / sum(counts))}] * 4
    closed = [dict(reply.header) for message, reply in wire if message.kind == "close"]
    assert closed == [closed[0]] * 4
    assert closed[0]["norm"] > 0.5  # the limit, so the factor is no 1
    assert closed[0]["factor"] == pytest.approx(0.5 / closed[0]["norm"], rel=1e-5)


def test_only_roles_with_twins_send_gradients_and_the_others_norms(wire: Wire) -> None:
    several = roles([2, 4])
    one_step(several)
    closes = {message.sender: message for message, _ in wire if message.kind == "close"}
    client = several.workers["client"]["client-0"].trainable.parameters
    edge = several.workers["edge"]["edge-0"].trainable.parameters
    assert set(closes["client-0"].tensors) == set(client) and closes["client-0"].header["norms"] == {}
    assert set(closes["edge-0"].tensors) == {*client, *edge} and closes["edge-0"].header["norms"] == {}


def test_a_lone_server_hands_up_norms_and_no_tensors_of_its_own(wire: Wire) -> None:
    several = roles_of(recipe("gpt2", [1, 2, 4], split={"tiers": {"client": 2, "a": 1, "b": 1, "cloud": 1}}), corpus(2))
    one_step(several)
    up = next(message for message, _ in wire if message.kind == "close" and message.sender == "b")
    own = {*several.workers["a"]["a"].trainable.parameters, *several.workers["b"]["b"].trainable.parameters}
    assert set(up.header["norms"]) == own and all(norm >= 0 for norm in up.header["norms"].values())
    assert set(up.tensors) == set(several.workers["client"]["client-0"].trainable.parameters)


def test_sums_are_made_by_name_and_leave_the_terms_alone() -> None:
    first, second = {"a": torch.ones(2)}, {"a": torch.full((2,), 3.0), "b": torch.ones(1)}
    sums: dict[str, torch.Tensor] = {}
    add_into(sums, first)
    add_into(sums, second)
    assert sums["a"].tolist() == [4.0, 4.0] and sums["b"].tolist() == [1.0]
    assert first["a"].tolist() == [1.0, 1.0] and second["a"].tolist() == [3.0, 3.0]


def test_a_micro_batch_that_was_not_announced_or_comes_twice_is_refused(wire: Wire) -> None:
    several = roles([2, 4])
    one_step(several)
    sent = next(message for message, _ in wire if message.kind == "forward" and message.sender == "client-0")
    with pytest.raises(PeerError, match=r"client-0 sent .*step=0.*, which is not due, or for the second time"):
        ask(several, sent)
    with pytest.raises(PeerError, match="which is not due"):
        ask(several, replace(sent, micro_batch=(7, 0, 0)))


def test_a_step_is_not_closed_while_a_gradient_is_missing() -> None:
    several = roles([2])

    async def run() -> None:
        links = several.links["client"]
        opens = [Message("open", f"client-{n}", (0, n, 0), {"labels": {n: [3]}}) for n in range(2)]
        await asyncio.gather(*(link.request(message) for link, message in zip(links, opens, strict=True)))
        await links[0].request(
            Message("close", "client-0", (0, 0, 0), {"norms": {}, "own": {}, "losses": {}, "bytes": {}})
        )

    with pytest.raises(PeerError, match=r"client-0 closes step 0, but .*client=0, number=0.* has no gradient yet"):
        asyncio.run(run())


def test_what_was_under_way_is_forgotten_when_a_generation_begins(wire: Wire) -> None:
    several = roles([2])
    one_step(several)
    server = several.links["client"][0]._handler.__self__  # type: ignore[attr-defined]
    server.begin(["client-0", "client-1"], 7)
    sent = next(message for message, _ in wire if message.kind == "forward")
    with pytest.raises(PeerError, match="which is not due"):
        ask(several, sent)
    assert server.message("open", (0, 0, 0)).generation == 7


def test_a_step_is_observed_before_it_is_committed_and_committed_before_anybody_is_told() -> None:
    several, events = roles([2]), list[str]()
    server = several.links["client"][0]._handler.__self__  # type: ignore[attr-defined]
    server.commit = lambda steps, generation: events.append(f"cloud {steps}")
    server.top = replace(server.top, observe=lambda step, sums: events.append(f"observed {step} {sorted(sums.losses)}"))
    for client in several.clients:
        client.commit = lambda steps, generation, name=client.name: events.append(f"{name} {steps}")  # type: ignore[misc]
    one_step(several)
    assert events[:2] == ["observed 0 [0, 1]", "cloud 1"] and sorted(events[2:]) == ["client-0 1", "client-1 1"]
