"""Rounds in a tree whose processes are killed at any moment: the same adapter, bit for bit, and no round twice."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from splitllm.deployment.bounds import allowed
from splitllm.errors import PeerError
from splitllm.recipe import parent_of
from splitllm.wire.message import Message
from tests.families import corpus, recipe, roles_of
from tests.grids import each_fast, fast_if
from tests.roles.test_gate import TIERS, finish, random_faults
from tests.roles.tree import Tree, same

OPTIONS: list[dict[str, Any]] = [
    {"rounds": {}},
    {"rounds": {"rule": "fedex", "prox": 0.1, "moments": "average"}, "split": {"client_cuts": {"client-1": 2}}},
    {"rounds": {"rule": "flora"}},
    {"rounds": {"rule": "rolora", "outer": {"name": "fedadam", "lr": 0.01}, "clip_update": 0.3}},
    {"rounds": {"rule": "flexlora"}, "lora": {"adapters": "per_client", "clients": {"client-2": {"rank": 2}}}},
    {"rounds": {"weights": "equal", "secure": {"aggregate": True}}, "tiers": {"client": 5, "edge": 2, "cloud": 1}},
    {"rounds": {"rule": "median", "reject_beyond": 50.0}, "lora": {"adapters": "common"}},
]


def tree(options: int, *, seed: int = 0) -> Tree:
    given = OPTIONS[options]
    rounds = {"replicas": "local", "edge_every": 1, "cloud_every": 2, **given["rounds"]}
    split = {"tiers": given.get("tiers", TIERS), **given.get("split", {})}
    steps = {"steps": 3, "batch_size": 1, "accumulate": 2, "in_flight": 2, "eval_every": 1}
    cuts = [1, 3]
    wanted = recipe("gpt2", cuts, "cloud", split=split, train=steps, rounds=rounds, lora=given.get("lora", {}))
    return Tree(wanted, corpus(split["tiers"]["client"], rows=6), seed=seed)


@cache
def undisturbed(options: int) -> Tree:
    return finish(tree(options))


@pytest.mark.parametrize("options", each_fast(1, 5, slow=[0, 2, 3, 4, 6]))
def test_over_messages_it_is_the_adapter_of_one_process(options: int) -> None:
    found = undisturbed(options)
    roles = roles_of(found.recipe, found.corpus)
    for step in range(3):
        asyncio.run(_steps(roles, step))
    assert same(roles.adapter(), found.adapter)


async def _steps(roles: Any, step: int) -> None:
    await asyncio.gather(*(client.step(step) for client in roles.clients))


@pytest.mark.parametrize("seed", [1, 5, *(pytest.param(n, marks=fast_if(False, "soak")) for n in range(7, 245))])
def test_whoever_is_killed_whenever_the_rounds_are_the_same(seed: int) -> None:
    options = seed % len(OPTIONS)
    expected = undisturbed(options)
    found = finish(tree(options, seed=seed), random_faults(seed, int(expected.ticks * 1.3), expected.names))
    assert same(found.adapter, expected.adapter)
    assert found.observed == expected.observed
    for name, past in found.pasts.items():
        assert same(past.kept[3], expected.pasts[name].kept[3]), name


@pytest.mark.parametrize("options", each_fast(1, 4, slow=[0, 2, 3, 5, 6]))
def test_what_a_client_says_at_the_end_changes_nothing_of_what_comes_out(options: int) -> None:
    found = tree(options)
    found.look = replaced
    assert same(finish(found).adapter, undisturbed(options).adapter)


def replaced(message: Message) -> None:
    """An adapter of its own, larger than any where ranks may differ."""
    if message.kind != "finish" or not message.sender.startswith("client"):
        return
    assert isinstance(message.tensors, dict) and message.tensors
    for name, tensor in message.tensors.items():
        shape = [16 if extent == min(tensor.shape) else extent for extent in tensor.shape]
        message.tensors[name] = torch.full(shape, 7.0)


def rounds_of(found: Tree) -> list[Message]:
    return [message for _, message in found.seen if message.kind == "round"]


@pytest.mark.system
def test_every_message_of_a_round_is_allowed_and_each_is_sent_once() -> None:
    for options in range(len(OPTIONS)):
        found = undisturbed(options)
        bounds = {name: allowed(tree(options).plan, name) for name in ("edge-0", "edge-1", "cloud")}
        at = [(message.sender, message.step) for message in rounds_of(found)]
        assert sorted(at) == sorted({(n, s) for n in found.names if n != "cloud" for s in (1, 2, 3)})
        for message in (m for _, m in found.seen):
            bounds[str(parent_of(found.recipe, message.sender))].check(message)


def spoiled(message: Message) -> list[tuple[str, Message]]:
    """What is wrong with it, by a word of the refusal."""
    name = next(n for n in message.tensors if n.startswith("adapter/") and ".lora_A." in n)
    tensors = dict(message.tensors)
    without = {n: t for n, t in tensors.items() if n != name}
    return [
        ("no base_model", replace(message, tensors=without)),
        ("which is not due", replace(message, tensors={**tensors, "adapter/x.lora_A.weight": torch.zeros(4, 32)})),
        ("which is not due", replace(message, tensors={**tensors, "exp/" + name: tensors[name]})),
        (f"{name} of", replace(message, tensors={**tensors, name: tensors[name][:, :-1]})),
        (f"{name} of", replace(message, tensors={**tensors, name: tensors[name].int()})),
        ("not below", replace(message, header={"examples": {"77": 5}})),
        ("that are none", replace(message, header={"examples": {"0": 0}})),
        ("that are none", replace(message, header={"examples": {"0": 1.5}})),
        ("reports that", replace(message, header={**message.header, "reports": [{"role": "edge-0"}]})),
        ("no examples", replace(message, header={})),
    ]


@pytest.mark.parametrize("options", each_fast(1, slow=[0, 4]))
def test_what_is_wrong_with_a_round_is_refused_by_name(options: int) -> None:
    found = undisturbed(options)
    message = next(m for m in rounds_of(found) if m.sender == "client-0" and m.step == 2)
    bounds = allowed(found.plan, "edge-0")
    bounds.check(message)
    for words, wrong in spoiled(message):
        with pytest.raises(PeerError, match="client-0 sent round with") as refused:
            bounds.check(wrong)
        assert words in str(refused.value)


def test_a_round_out_of_turn_is_refused() -> None:
    found = tree(0)
    asked = next(m for m in rounds_of(undisturbed(0)) if m.sender == "client-0")
    errors: list[str] = []

    async def ask() -> None:
        run = asyncio.create_task(found.run())
        while not found.observed:
            await asyncio.sleep(0)
        gate = found.running["edge-0"].gate
        assert gate is not None
        late = replace(asked, generation=gate._begun.number if gate._begun else 0, micro_batch=(3, 0, 0))
        with pytest.raises(PeerError) as refused:
            await gate.handle(late)
        errors.append(str(refused.value))
        await run

    from tests.roles.tree import TickLoop

    with asyncio.Runner(loop_factory=TickLoop) as runner:
        runner.run(ask())
    assert errors[0] in (
        "client-0 sent round before its close was answered",
        "client-0 sent round, where no round is due",
    )
    assert same(found.adapter, undisturbed(0).adapter)


def test_what_an_edge_says_of_its_clients_is_refused_if_it_is_none() -> None:
    found = undisturbed(0)
    message = next(m for m in rounds_of(found) if m.sender == "edge-0" and m.step == 2)
    bounds = allowed(found.plan, "cloud")
    bounds.check(message)
    for weights in ({"0": [1.0]}, {"0": [-1.0, 1.0]}, {"0": [1e300, 1.0]}, {"0": 1.0}):
        with pytest.raises(PeerError, match="edge-0 sent round with weights of client 0 that are none"):
            bounds.check(replace(message, header={**message.header, "weights": weights}))
    with pytest.raises(PeerError, match="which is not below it"):
        bounds.check(replace(message, header={**message.header, "weights": {"2": [1.0, 1.0]}}))
