"""Headers are plain values: a run whose headers all go through JSON is the same run; a wrong answer is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from splitllm.errors import PeerError
from splitllm.roles.generation import Begun
from splitllm.roles.recovery import Decision
from splitllm.roles.together import state_in
from splitllm.wire.link import LocalLink
from splitllm.wire.message import Message
from tests.families import corpus, recipe, roles_of
from tests.test_exactness import adapter_of, one_step

Change = Callable[[Message], Message]


@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_headers_survive_json(labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe("llama", [2, 4], labels)
    plain = roles_of(wanted, corpus(2))
    losses = [one_step(plain, step) for step in range(2)]
    inner = LocalLink.request

    async def through_json(self: LocalLink, message: Message) -> Message:
        reply = await inner(self, replace(message, header=json.loads(json.dumps(message.header))))
        return replace(reply, header=json.loads(json.dumps(reply.header)))

    monkeypatch.setattr(LocalLink, "request", through_json)
    remote = roles_of(wanted, corpus(2))
    assert [one_step(remote, step) for step in range(2)] == losses
    adapter = adapter_of(plain)
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in adapter_of(remote).items())


def complaint_when(kind: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a step of real roles says when answers of a kind are changed."""
    inner = LocalLink.request

    async def changed(self: LocalLink, message: Message) -> Message:
        reply = await inner(self, message)
        return change(reply) if message.kind == kind else reply

    monkeypatch.setattr(LocalLink, "request", changed)
    with pytest.raises(PeerError) as error:
        one_step(roles_of(recipe("llama", [2, 4], "cloud"), corpus(2)), 0)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "key"), [("open", "weights"), ("forward", "loss"), ("close", "norm"), ("close", "factor")]
)
@pytest.mark.parametrize("junk", ["x", {}, [1.0], float("nan"), True, {"0": None, "1": 0.5}])
def test_a_wrong_value_in_an_answer_is_one_line(
    kind: str, key: str, junk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = complaint_when(kind, lambda reply: replace(reply, header={**reply.header, key: junk}), monkeypatch)
    assert f" answered {kind} with " in said and f" as {key}" in said and "\n" not in said


@pytest.mark.parametrize("key", ["open weights", "forward loss", "close norm", "close factor"])
def test_a_missing_value_in_an_answer_is_one_line(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, _, name = key.partition(" ")
    if name == "loss":  # None stands for one that is not finite
        return
    said = complaint_when(kind, lambda reply: replace(reply, header={}), monkeypatch)
    assert f" answered {kind} with None as {'norm' if kind == 'close' else name}" in said


def test_sums_that_are_missing_in_an_answer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = complaint_when("close", lambda reply: replace(reply, tensors={}), monkeypatch)
    assert "sent close with nothing as base_model.model." in said and "\n" not in said


BEGUN = Begun(7000, Decision(3, "6999", {"client": "client-1"}, ("client-0",)), evaluated=True)


def test_a_generation_travels_unchanged_and_one_that_is_none_is_one_line() -> None:
    header = json.loads(json.dumps(BEGUN.header()))
    assert Begun.from_reply(Message("join", "cloud", (0, 0, 0), header)) == BEGUN
    for key in header:
        for junk in (None, 1.5, -1, "", {"a": 1}, [None]):
            if key == "origin" and junk == "":
                continue
            with pytest.raises(PeerError, match=f"^cloud answered join with .* as {key}; that is none$"):
                Begun.from_reply(Message("join", "cloud", (0, 0, 0), {**header, key: junk}))


def test_a_state_of_which_something_is_missing_is_refused() -> None:
    adapter = {"a": torch.ones(2, 3)}
    start = {"adapter/a": torch.ones(2, 3)}
    slots = {"exp_avg/a": torch.ones(2, 3), "exp_avg_sq/a": torch.ones(2, 3), "step/a": torch.tensor(1.0)}
    for state in (start, start | slots):
        assert (
            state_in(Message("share", "cloud", (0, 0, 0), {}, {**state, "adapter/b": torch.ones(1)}), adapter) == state
        )
        for name in state if len(state) > 1 else ():
            rest = {key: tensor for key, tensor in state.items() if key != name}
            with pytest.raises(PeerError, match=f"with nothing as {name}"):
                state_in(Message("share", "cloud", (0, 0, 0), {}, rest), adapter)
    with pytest.raises(PeerError, match="with nothing as adapter/a"):
        state_in(Message("share", "cloud", (0, 0, 0)), adapter)
