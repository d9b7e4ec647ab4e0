"""What leaves a client, and what does not; and that padding and packing change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from splitllm.data.batching import collate
from splitllm.data.corpus import Corpus
from splitllm.data.examples import Example
from splitllm.data.packing import pack
from splitllm.roles.assembly import Roles
from splitllm.wire.message import Message
from tests.families import corpus, examples, recipe, roles_of
from tests.test_exactness import LABELS, gradients, one_step, with_moved_b

Wire = list[tuple[Message, Message]]
PROMPT, LEARNED = range(40, 50), range(50, 61)  # token ids that are larger than any position or count here
WIDTH, BYTES = 32, 8
COUNTS = ("bytes", "losses")  # sums over a step, which are as large as token ids


def marked(clients: int = 2) -> Corpus:
    """Rows whose prompt and learned tokens can be told from all other numbers that travel."""
    rng = np.random.default_rng(0)

    def row() -> Example:
        prompt = rng.integers(PROMPT.start, PROMPT.stop, rng.integers(1, 5))
        learned = rng.integers(LEARNED.start, LEARNED.stop, rng.integers(1, 7))
        targets = np.arange(len(prompt) + len(learned)) >= len(prompt)
        return Example(np.concatenate([prompt, learned]).astype(np.int32), targets)

    rows = tuple(tuple(row() for _ in range(9)) for _ in range(clients))
    return Corpus(rows, tuple(part[:4] for part in rows), ())


def integers(value: Any) -> Iterator[int]:
    """Every whole number in a header or among the tensors."""
    if isinstance(value, torch.Tensor):
        yield from [] if value.is_floating_point() else value.flatten().tolist()
    elif isinstance(value, dict):
        yield from (number for pair in value.items() for item in pair for number in integers(item))
    elif isinstance(value, list | tuple):
        yield from (number for item in value for number in integers(item))
    elif isinstance(value, int):
        yield value


def run_all(roles: Roles, steps: int = 2) -> None:
    """Train some steps, then evaluate."""
    for step in range(steps):
        one_step(roles, step)
    for client in roles.clients:
        asyncio.run(client.evaluate())


@pytest.mark.parametrize("cuts", [[2], [2, 4], [1, 3, 5]], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_where_labels_stay_no_token_id_leaves_the_client(family: str, cuts: list[int], wire: Wire) -> None:
    run_all(roles_of(recipe(family, cuts, "client"), marked()))
    names = {name for message, _ in wire if message.kind != "close" for name in message.tensors}
    assert names == {"hidden_TD", "positions_N", "gradient_ND"}
    for message, _ in wire:
        header = {key: value for key, value in message.header.items() if key not in COUNTS}
        assert max(integers([header, dict(message.tensors), message.micro_batch])) < PROMPT.start
    assert {message.kind for message, _ in wire} == {"open", "forward", "backward", "close"}


@pytest.mark.parametrize("cuts", [[2], [2, 4]], ids=str)
def test_where_labels_leave_only_learned_tokens_do(cuts: list[int], wire: Wire) -> None:
    run_all(roles_of(recipe("gpt2", cuts, "cloud"), marked()))
    for message, _ in wire:
        header = {key: value for key, value in message.header.items() if key not in COUNTS}
        numbers = set(integers([header, dict(message.tensors), message.micro_batch]))
        assert not numbers & set(PROMPT)
        assert bool(numbers & set(LEARNED)) == (message.kind == "forward") == ("targets_N" in message.tensors)
    assert "backward" not in {message.kind for message, _ in wire}


@pytest.mark.parametrize("labels", LABELS)
def test_bytes_are_those_of_real_tokens(labels: str, wire: Wire) -> None:
    roles = roles_of(recipe("llama", [2, 4], labels), marked())
    client = roles.clients[0]
    one_step(roles)
    batches = [client.stream.take(index) for index in range(2)]
    assert any(len(set(batch.lengths)) > 1 for batch in batches)  # there is padding to be left out
    for index, batch in enumerate(batches):
        tokens, learned = batch.tokens * WIDTH * BYTES, batch.labels * WIDTH * BYTES
        exchanged = [pair for pair in wire if pair[0].micro_batch == (0, 0, index) and pair[0].sender == client.name]
        bytes_of = {m.kind: (m.nbytes, r.nbytes) for m, r in exchanged if m.kind in ("forward", "backward")}
        if labels == "client":
            assert bytes_of == {"forward": (tokens + batch.labels * 4, learned), "backward": (learned, tokens)}
        else:
            assert bytes_of == {"forward": (tokens + batch.labels * 8, tokens)}


@pytest.mark.parametrize("tiers", [["edge", "cloud"], ["cloud"]], ids="+".join)
def test_a_frozen_client_asks_for_no_gradient_and_gets_none(tiers: list[str], wire: Wire) -> None:
    roles = roles_of(recipe("llama", [2, 4], "cloud", lora={"rank": 4, "alpha": 8, "tiers": tiers}), marked())
    run_all(roles)
    frozen = {"client-0", "client-1"} | ({"edge-0", "edge-1"} if tiers == ["cloud"] else set())
    forwards = [(m, r) for m, r in wire if m.kind == "forward"]
    for message, reply in forwards:
        trained = message.sender not in frozen and message.step >= 0
        assert message.header["input_gradient"] == trained == ("gradient_TD" in reply.tensors)
    assert all(link.traffic.down == 0 for link in roles.links["client"])
    assert {m.sender for m, _ in forwards} == {"client-0", "client-1", "edge-0", "edge-1"}


def test_a_frozen_client_that_keeps_its_labels_gets_only_the_rows_it_asked_for(wire: Wire) -> None:
    roles = roles_of(recipe("llama", [2, 4], "client", lora={"rank": 4, "alpha": 8, "tiers": ["cloud"]}), marked())
    run_all(roles)
    assert not any("gradient_TD" in reply.tensors for _, reply in wire)
    rows = sum(r.nbytes for m, r in wire if m.kind == "forward" and m.sender.startswith("client"))
    assert sum(link.traffic.down for link in roles.links["client"]) == rows > 0


@pytest.mark.parametrize("labels", LABELS)
def test_evaluation_asks_for_no_gradient_and_changes_nothing(labels: str, wire: Wire) -> None:
    roles = roles_of(recipe("gpt2", [2, 4], labels, lora={"rank": 4, "alpha": 8, "dropout": 0.5}), marked())
    with_moved_b(roles)
    first, second = (asyncio.run(roles.clients[0].evaluate()) for _ in range(2))
    assert first == second and first.labels == sum(batch.labels for batch in roles.clients[0].evaluation)
    assert {message.kind for message, _ in wire} == {"forward"}
    assert not any(message.header["train"] or message.header["input_gradient"] for message, _ in wire)
    for workers in roles.workers.values():
        assert all(p.grad is None for worker in workers.values() for p in worker.shard.parameters())


@pytest.mark.parametrize("labels", LABELS)
def test_a_report_counts_tokens_labels_and_the_norm_of_all_roles(labels: str) -> None:
    roles = roles_of(recipe("gpt2", [2, 4], labels), marked())

    async def together() -> list[Any]:
        return await asyncio.gather(*(client.step(0) for client in roles.clients))

    reports = asyncio.run(together())
    for client, report in zip(roles.clients, reports, strict=True):
        batches = [client.stream.take(index) for index in range(2)]
        assert report.tokens == sum(batch.tokens for batch in batches)
        assert report.labels == sum(batch.labels for batch in batches)
    assert reports[0].norm == reports[1].norm > 0


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_packed_rows_equal_their_documents_alone(family: str, labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = corpus(2, rows=9).train
    packed = tuple(tuple(pack(part, 24)) for part in documents)
    batch = collate(packed[0])
    assert batch.position_ids_BS is not None and len(packed[0]) < 9
    train = {"steps": 1, "batch_size": 9, "accumulate": 1, "clip_norm": None}
    found = []
    for rows in (documents, packed):
        roles = roles_of(recipe(family, [2, 4], labels, train=train), Corpus(rows, rows, ()))
        with_moved_b(roles)
        found.append(gradients(roles, monkeypatch))
    (loss, wanted), (packed_loss, got) = found
    assert packed_loss == pytest.approx(loss, rel=1e-10)
    for name, tensor in wanted.items():
        assert float((got[name] - tensor).abs().max() / tensor.abs().max()) < 1e-10, name


def test_a_client_without_labels_in_a_step_still_takes_part() -> None:
    silent = tuple(Example(row.ids, np.zeros(len(row), dtype=bool)) for row in examples(4, seed=0))
    train, evaluation = (silent, examples(4, seed=1)), (silent, silent)
    for labels in LABELS:
        roles = roles_of(recipe("llama", [2, 4], labels), Corpus(train, evaluation, ()))
        assert one_step(roles) > 0
        assert asyncio.run(roles.clients[0].evaluate()).loss == 0.0
