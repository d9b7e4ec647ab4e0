"""Micro-batches in parts: what is cut and put together again is what it was."""

from __future__ import annotations

import json

import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.model.joined import Rows
from splitllm.model.randomness import MicroBatchId
from splitllm.ranks.pieces import ask_of, companion, described, piece, put_together, tensors_of
from splitllm.ranks.shares import share_out
from splitllm.roles.worker import Ask

LENGTHS = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4)


def asks_of(lengths: list[list[int]], *, packed: bool) -> list[Ask]:
    asks = []
    for client, rows in enumerate(lengths):
        micro_batch = MicroBatchId(3, client, 0)
        positions = torch.arange(max(rows)).expand(len(rows), -1) + 100 * client if packed else None
        inputs = torch.randn(sum(rows), 5)
        asks.append(Ask(Rows(micro_batch, tuple(rows), client), inputs, positions, input_gradient=client % 2 == 0))
    return asks


@given(LENGTHS, st.integers(1, 4), st.booleans())
def test_parts_that_travelled_are_the_batch_when_put_together(
    lengths: list[list[int]], ranks: int, packed: bool
) -> None:
    asks, found = asks_of(lengths, packed=packed), []
    for share in share_out(lengths, ranks):
        for part in share:
            cut = piece(asks[part.ask], part, asks[part.ask].inputs)
            come = ask_of(json.loads(json.dumps(described(cut))), iter(tensors_of(cut)))
            assert come.rows == cut.rows
            assert (come.train, come.input_gradient) == (cut.train, cut.input_gradient)
            if packed:
                whole = asks[part.ask].position_ids_BS
                assert whole is not None
                assert come.position_ids_BS is not None
                assert torch.equal(come.position_ids_BS, whole[part.start : part.stop, : max(come.rows.lengths)])
            found.append((part, come.inputs))
    for ask, together in zip(asks, put_together(asks, iter(found)), strict=True):
        assert torch.equal(together, ask.inputs)


def test_a_companion_enters_where_the_batch_does() -> None:
    asks = asks_of([[4, 2], [3]], packed=False)
    beside = companion(asks)
    assert (beside.rows.lengths, beside.rows.entry, beside.train) == ((1,), 0, True)
    assert beside.inputs.shape == (1, 5)
    assert not beside.input_gradient
