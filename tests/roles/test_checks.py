"""No healthy message is refused; a corrupt one is, in one line that names the sender."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitllm.data.corpus import Corpus
from splitllm.data.examples import Example
from splitllm.data.packing import pack
from splitllm.deployment.bounds import allowed
from splitllm.errors import PeerError
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import matched_modules
from splitllm.plan import Plan
from splitllm.recipe import Recipe, parent_of
from splitllm.roles.checks import Allowed
from splitllm.wire.message import KINDS, Message
from tests.families import corpus, examples, recipe
from tests.roles.test_gate import finish
from tests.roles.tree import Tree

LONGEST = 24


def plan_of(wanted: Recipe, rows: Corpus) -> Plan:
    config = Checkpoint(wanted.model.base).config
    modules = matched_modules(config, wanted.lora.targets)
    return Plan(wanted, config, rows, tuple(modules), True)


class Checked:
    """What every server of a recipe allows."""

    def __init__(self, wanted: Recipe, rows: Corpus) -> None:
        self.recipe, self.plan = wanted, plan_of(wanted, rows)
        self.by_server: dict[str, Allowed] = {}

    def of(self, message: Message) -> Allowed:
        server = parent_of(self.recipe, message.sender)
        assert server is not None
        if server not in self.by_server:
            self.by_server[server] = allowed(self.plan, server)
        return self.by_server[server]


def run(wanted: Recipe, rows: Corpus, faults: Any = None) -> tuple[Tree, Checked]:
    """A whole run in which every message, as it arrives, is looked at."""
    tree, checked = Tree(wanted, rows), Checked(wanted, rows)
    tree.look = lambda message: checked.of(message).check(message)
    return finish(tree, faults), checked


def wanted(family: str, cuts: list[int], labels: str, **changes: Any) -> Recipe:
    train = {"steps": 2, "batch_size": 3, "accumulate": 2, "in_flight": 2, "eval_every": 1}
    data = {"source": "unused", "max_length": LONGEST, **changes.pop("data", {})}
    return recipe(family, cuts, labels, train=train, data=data, **changes)


LORA = {"rank": 4, "alpha": 8}
CASES: dict[str, Recipe] = {
    "two tiers": wanted("gpt2", [2], "cloud"),
    "three tiers": wanted("llama", [2, 4], "client"),
    "five tiers": wanted("gpt2", [1, 2, 3, 4], "cloud"),
    "lone client": wanted("gpt2", [2, 4], "client", split={"tiers": {"client": 1, "edge": 1, "cloud": 1}}),
    "many": wanted("gpt2", [2, 4], "cloud", split={"tiers": {"client": 4, "edge": 2, "cloud": 1}}),
    "dora": wanted("llama", [2, 4], "cloud", lora={**LORA, "dora": True}),
    "fp32": wanted("gpt2", [2, 4], "client", dtype="float32"),
    "bf16": wanted("gpt2", [2, 4], "cloud", dtype="bfloat16"),
    "empty tier": wanted("llama", [2, 6], "client"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_message_of_a_healthy_run_is_refused(case: str) -> None:
    clients = CASES[case].split.tiers["client"]
    tree, _ = run(CASES[case], corpus(clients, rows=6))
    assert [step for step, _, _ in tree.observed] == [0, 1] and tree.evaluations == [0, 1, 2]


def test_packed_rows_pass() -> None:
    documents = corpus(2, rows=9).train
    rows = tuple(tuple(pack(part, LONGEST)) for part in documents)
    settings = wanted("llama", [2, 4], "cloud", data={"pack": True, "format": "text"})
    tree, _ = run(settings, Corpus(rows, rows, ()))
    assert any("position_ids_BS" in message.tensors for message, _ in tree.seen)


@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_rows_without_labels_pass(labels: str) -> None:
    silent = tuple(Example(row.ids, np.zeros(len(row), dtype=bool)) for row in examples(4, seed=0))
    tree, _ = run(wanted("llama", [2, 4], labels), Corpus((silent, examples(4, seed=1)), (silent, silent), ()))
    assert any(m.tensors["positions_N"].numel() == 0 for m, _ in tree.seen if m.kind == "forward")


def test_a_state_that_is_shared_passes() -> None:
    tree = Tree(wanted("gpt2", [2, 4], "client"), corpus(2, rows=6))
    checked = Checked(tree.recipe, tree.corpus)
    tree.look = lambda message: checked.of(message).check(message)
    finish(tree)
    state = {name: tensor.clone() for name, tensor in tree.pasts["client-0"].state().items()}
    message = Message("share", "client-0", (0, 0, 0), {}, state)
    checked.of(message).check(message)
    for name in state:
        with pytest.raises(PeerError):
            checked.of(message).check(replace(message, tensors={**state, name: torch.zeros(3, 5)}))
        with pytest.raises(PeerError, match="not those of whole tiers below it"):
            checked.of(message).check(replace(message, tensors={n: t for n, t in state.items() if n != name}))
    adapter = {name: tensor for name, tensor in state.items() if name.startswith("adapter/")}
    for whole in ({}, adapter):  # nothing to give, or no step done yet
        checked.of(message).check(replace(message, tensors=whole))
    others = [*tree.pasts["edge-0"].state(), f"anything/{next(iter(adapter)).removeprefix('adapter/')}"]
    for name in others:
        with pytest.raises(PeerError, match="not those of whole tiers below it"):
            checked.of(message).check(replace(message, tensors={**state, name: torch.zeros(())}))


def test_of_an_edge_both_tiers_pass_and_that_above_it_does_not() -> None:
    tree = Tree(wanted("gpt2", [2, 4], "client"), corpus(2, rows=6))
    checked = Checked(tree.recipe, tree.corpus)
    client, edge, cloud = (tree.pasts[name].state() for name in ("client-0", "edge-0", "cloud"))
    message = Message("share", "edge-0", (0, 0, 0), {})
    for states in (client, edge, client | edge):
        checked.of(message).check(replace(message, tensors=states))
    with pytest.raises(PeerError, match="not those of whole tiers below it"):
        checked.of(message).check(replace(message, tensors=client | cloud))


@pytest.mark.parametrize("what", [None, 3, "", "x" * 301, "two\nlines", "\x1b[31m", ["nan"]])
def test_what_a_role_says_of_its_values_is_one_short_line(what: Any) -> None:
    checked = Checked(wanted("gpt2", [2, 4], "client"), corpus(2, rows=6))
    message = Message("diverged", "client-0", (0, 0, 0), {"what": "hidden_TD of client-0: a value is nan"})
    checked.of(message).check(message)
    with pytest.raises(PeerError, match="client-0 sent diverged with words that are no line"):
        checked.of(message).check(replace(message, header={"what": what}))


# Corrupt messages


@cache
def recorded(labels: str) -> tuple[Checked, dict[tuple[str, bool], Message]]:
    """Of every kind one message of a client and one of an edge, as they arrive."""
    settings = wanted("gpt2", [2, 4], labels, split={"tiers": {"client": 2, "edge": 1, "cloud": 1}})
    tree, checked = run(settings, corpus(2, rows=6))
    found: dict[tuple[str, bool], Message] = {}
    for _, message in tree.seen:
        if message.kind != "forward" or message.header["train"]:
            found.setdefault((message.kind, message.sender == "edge"), message)
    return checked, found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a header."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from places(below, (*path, key))


def changed(header: dict[str, Any], path: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    """A header with junk at a place."""
    result: Any = copy.deepcopy(header)
    at = result
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = junk
    return dict(result)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=6,
)


def verdict(checked: Checked, message: Message) -> str | None:
    """The refusal, or None."""
    try:
        checked.of(message).check(message)
    except PeerError as error:
        text = str(error)
    else:
        return None
    assert "\n" not in text and len(text) < 1000
    assert text.startswith(f"{message.sender} sent {message.kind} with ")
    return text


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_junk_in_a_header_is_refused_in_one_line_or_harmless(data: st.DataObject) -> None:
    checked, found = recorded(data.draw(st.sampled_from(["client", "cloud"])))
    message = found[data.draw(st.sampled_from(sorted(found)))]
    spots = [path for path in places(dict(message.header)) if path]
    if not spots:
        return
    path, junk = data.draw(st.sampled_from(spots)), data.draw(JUNK)
    verdict(checked, replace(message, header=changed(dict(message.header), path, junk)))


@pytest.mark.parametrize("junk", [None, True, -1, 1 << 63, float("nan"), float("inf"), "x", [], {}, [[]], {"x": 1}])
@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_what_is_of_a_wrong_kind_is_refused_in_every_place(labels: str, junk: Any) -> None:
    checked, found = recorded(labels)
    for (kind, _), message in found.items():
        for path in places(dict(message.header)):
            value = message.header
            for key in path:
                value = value[key]
            if path and _unlike(value, junk) and (kind, path, junk) != EMPTY_JOIN and not _diverged(path, junk):
                text = verdict(checked, replace(message, header=changed(dict(message.header), path, junk)))
                assert text is not None, (kind, path, junk)


EMPTY_JOIN = ("join", ("standings",), {})  # nobody is below


def _diverged(path: tuple[Any, ...], junk: Any) -> bool:
    """None stands for a norm or a loss that is not finite."""
    return junk is None and (path[0] == "norms" or (path[0] == "losses" and path[-1] == 0)) and len(path) > 1


def _unlike(value: Any, junk: Any) -> bool:
    """Whether the junk is certainly no such value."""
    number = type(junk) in (int, float) and junk == junk and abs(junk) != float("inf")
    if type(value) in (int, float):
        return not number or type(value) is int
    if isinstance(value, dict):
        return not isinstance(junk, dict)
    return type(value) is not type(junk)


@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_every_corrupt_tensor_is_refused(labels: str) -> None:
    checked, found = recorded(labels)
    unseen = {"share", "diverged", "secure", "round", "merge"} | ({"backward"} if labels == "cloud" else set())
    assert {kind for kind, _ in found} == set(KINDS) - unseen
    for message in found.values():
        for name, tensor in message.tensors.items():
            rest = {other: t for other, t in message.tensors.items() if other != name}
            wrong = [
                tensor.half(),
                tensor.to(torch.int64),
                tensor.reshape(-1, 1),
                tensor.repeat(2, *[1] * (tensor.dim() - 1)),
            ]
            wrong = [*wrong[:3], tensor - 1000, tensor + 10**6] if not tensor.is_floating_point() else wrong
            if message.kind == "backward":  # how many labels there were, the server remembers
                wrong.pop()
            for other in wrong:
                assert verdict(checked, replace(message, tensors={**rest, name: other})), (message.kind, name)
            assert verdict(checked, replace(message, tensors=rest)), (message.kind, name)
        assert verdict(checked, replace(message, tensors={**message.tensors, "x\n": torch.zeros(2)})), message.kind


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("number", [-2, 2, 77, 1 << 52])
def test_a_micro_batch_beyond_the_recipe_is_refused(place: int, number: int) -> None:
    checked, found = recorded("client")
    for kind in ("forward", "backward"):
        message = found[kind, False]
        micro_batch = list(message.micro_batch)
        micro_batch[place] = number
        assert verdict(checked, replace(message, micro_batch=tuple(micro_batch)))  # type: ignore[arg-type]


def test_headers_of_all_kinds_are_json() -> None:
    for message in recorded("client")[1].values():
        assert json.loads(json.dumps(message.header)) == message.header
