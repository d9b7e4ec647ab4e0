"""Who breaks the protocol of hidden sums is refused alone, over messages: nobody else's round is touched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from splitllm.errors import PeerError
from splitllm.roles.gate import Gate
from splitllm.wire.message import Message
from tests.families import corpus, recipe
from tests.grids import each_fast
from tests.roles.test_gate import finish
from tests.roles.tree import Tree, Wire, _as_sent, same

LIAR, SERVER = "client-0", "edge-0"
Change = Callable[[Message], Message]
MASKS: dict[str, Any] = {"secure": {"aggregate": True}}
CLIPPED: dict[str, Any] = {"privacy": {"clip": 1.0}}


def tree(rounds: dict[str, Any]) -> Tree:
    whole = {"replicas": "local", "edge_every": 1, "cloud_every": 2, "weights": "equal", **rounds}
    split = {"tiers": {"client": 5, "edge": 2, "cloud": 1}}
    steps = {"steps": 2, "batch_size": 1, "accumulate": 1}
    return Tree(recipe("gpt2", [1, 3], "cloud", split=split, train=steps, rounds=whole), corpus(5, rows=6))


@cache
def undisturbed(masked: bool) -> dict[str, torch.Tensor]:
    """The adapter of a run in which nobody lies."""
    return finish(tree(MASKS if masked else CLIPPED)).adapter


def said(**changes: Any) -> Change:
    return lambda message: replace(message, header={**message.header, "said": {**message.header["said"], **changes}})


def words(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda message: replace(message, tensors={"words": change(message.tensors["words"])})


def bare(message: Message) -> Message:
    """As of one who takes no part."""
    return replace(message, header={"examples": message.header["examples"]}, tensors={})


def of_phase(phase: str) -> Change:
    return lambda message: replace(message, header={**message.header, "phase": phase})


MASKED: dict[str, tuple[str, Change, str]] = {
    "no key": ("keys", said(sealing="00"), "Keys"),
    "one key twice": ("keys", lambda m: said(sealing=m.header["said"]["masking"])(m), "public keys"),
    "of another": ("keys", said(member="client-1"), "of client-1"),
    "of another round": ("shares", said(round="x"), "of round x"),
    "shares for nobody": ("shares", said(sealed={}), "not exactly those"),
    "another phase": ("shares", of_phase("keys"), "Keys"),
    "fewer words": ("masked", words(lambda each: each[:-1]), "are due"),
    "more words": ("masked", words(lambda each: torch.cat([each, each])), "are due"),
    "wider words": ("masked", words(lambda each: each.long()), "are due"),
    "no words": ("masked", lambda m: replace(m, tensors={}), "words in another phase"),
    "not a word of masks": ("round", bare, "without what is due of masks"),
    "seeds of nobody": ("round", said(seeds={}), "not exactly those"),
    "words again": ("round", lambda m: replace(m, tensors={"words": torch.zeros(3, dtype=torch.int32)}), "are due"),
}


async def asked(gate: Gate, message: Message) -> None:
    gate.check(message)
    await asyncio.wait_for(gate.handle(message), 60)


def broken(monkeypatch: pytest.MonkeyPatch, found: Tree, place: str, change: Change) -> list[str]:
    """Once, in the last round, that client sends something else first; what it hears, and then it sends what is due."""
    heard, request = list[str](), Wire.request

    async def lie(self: Wire, message: Message) -> Message:
        here = place in (message.kind, message.header.get("phase")) and message.step == 2
        if message.sender == LIAR and here and not heard:
            gate = (await self._connected()).gate
            assert gate is not None and gate._begun is not None
            begun, wrong = gate._begun, _as_sent(change(message))
            with pytest.raises(PeerError, match=LIAR) as refused:
                await asked(gate, wrong)
            heard.append(str(refused.value))
            for _ in range(500):
                await asyncio.sleep(0)
            assert gate._begun is begun, "the others are in their round as before"
        return await request(self, message)

    monkeypatch.setattr(Wire, "request", lie)
    return heard


@pytest.mark.parametrize(
    "case",
    each_fast("shares for nobody", "words again", slow=sorted(MASKED.keys() - {"shares for nobody", "words again"})),
)
def test_who_breaks_the_protocol_of_masks_is_refused_alone(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    place, change, line = MASKED[case]
    found = tree(MASKS)
    heard = broken(monkeypatch, found, place, change)
    assert same(finish(found).adapter, undisturbed(True))
    assert line in heard[0] and LIAR in heard[0]


@pytest.mark.parametrize(
    ("change", "line"),
    [(words(lambda each: each[:-1]), "are due"), (bare, "with 0 words")],
    ids=["fewer words", "no words"],
)
def test_who_brings_other_words_than_are_due_is_refused_alone(
    monkeypatch: pytest.MonkeyPatch, change: Change, line: str
) -> None:
    found = tree(CLIPPED)
    heard = broken(monkeypatch, found, "round", change)
    assert same(finish(found).adapter, undisturbed(False))
    assert line in heard[0]


def test_who_is_not_asked_brings_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {"privacy": {"clip": 1.0}, "participation": {"policy": "random", "count": 1}}
    found = tree(rounds)
    server = found.pasts[SERVER].rounds
    assert server is not None and server.participation is not None
    (wanted,) = server.participation.asked(1)
    monkeypatch.setattr("tests.roles.test_gate_hidden.LIAR", f"client-{1 - wanted if wanted < 2 else 0}")
    size = sum(tensor.numel() for tensor in server.summed_tensors(2).values())
    heard = broken(
        monkeypatch, found, "round", lambda m: replace(m, tensors={"words": torch.zeros(size, dtype=torch.int32)})
    )
    finish(found)
    assert "where 0 are due" in heard[0]
