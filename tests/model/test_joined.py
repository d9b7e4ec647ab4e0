"""Who is in a batch at which block, and where the others join."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.model.joined import Joined, Rows
from splitllm.model.randomness import MicroBatchId


def joined(entries: list[int]) -> Joined:
    return Joined(tuple(Rows(MicroBatchId(0, client, 0), (2,), entry) for client, entry in enumerate(sorted(entries))))


def test_those_that_enter_deeper_join_where_they_enter() -> None:
    batch = joined([0, 3, 3, 5])
    found = [(start, stop, [each.micro_batch.client for each in new]) for start, stop, new in batch.stretches(2, 8)]
    assert found == [(2, 3, [0]), (3, 5, [1, 2]), (5, 8, [3])]
    assert [len(batch.at(layer)) for layer in range(2, 8)] == [1, 3, 3, 4, 4, 4]


def test_who_enters_below_the_shard_enters_with_its_first_block() -> None:
    assert [(start, stop, len(new)) for start, stop, new in joined([0, 1, 2]).stretches(2, 4)] == [(2, 4, 3)]


def test_a_batch_is_ordered_by_entry() -> None:
    with pytest.raises(AssertionError):
        Joined((Rows(MicroBatchId(0, 0, 0), (2,), 3), Rows(MicroBatchId(0, 1, 0), (2,), 1)))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 4), st.integers(10, 12))
def test_every_block_runs_once_and_everybody_joins_once(entries: list[int], start: int, stop: int) -> None:
    batch = joined(entries)
    stretches = list(batch.stretches(start, stop))
    blocks = [block for first, after, _ in stretches for block in range(first, after)]
    lowest = max(start, min(entries))
    assert blocks == list(range(lowest, stop))
    assert [member for _, _, new in stretches for member in new] == list(batch.members)
    present = 0
    for first, after, new in stretches:
        present += len(new)
        assert all(len(batch.at(block)) == present for block in range(first, after))
