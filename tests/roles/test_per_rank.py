"""The largest share of one process is what comes of cutting batches of rows of one length."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitllm.ranks.shares import share_out
from splitllm.roles.per_rank import Share, largest_share
from tests.roles.test_ledger import model, wanted

LENGTH = 8


def share(clients: int, rows: int, processes: int, *, dropout: float = 0.0, **server: Any) -> Share:
    split = {"tiers": {"client": clients, "edge": 1, "cloud": 1}}
    lora, train = {"dropout": dropout}, {"batch_size": rows}
    asked = wanted(split=split, lora=lora, train=train, server={"processes": processes, **server})
    return largest_share(asked, model("gpt2")[0], [rows] * clients)


def largest_of(batch: int, rows: int, processes: int, whole: bool) -> int:
    """Rows that the rank with the most of them has of a batch of so many micro-batches."""
    shares = share_out([[LENGTH] * rows] * batch, processes, whole=whole)
    return max(sum(part.stop - part.start for part in each) for each in shares)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(2, 4), st.booleans(), st.integers(1, 5))
def test_batches_of_all_clients_are_cut_as_the_ledger_says(
    clients: int, rows: int, processes: int, whole: bool, joined: int
) -> None:
    limits = {"batching": "synchronous", "tokens": joined * rows * LENGTH}
    found = share(clients, rows, processes, dropout=0.1 if whole else 0.0, **limits)
    joined = min(joined, clients)
    batches = [min(joined, clients - before) for before in range(0, clients, joined)]
    most = sum(largest_of(batch, rows, processes, whole) for batch in batches)
    assert found.part == pytest.approx(most / (clients * rows))
    assert found.rows == min(rows, largest_of(joined, rows, processes, whole))


@pytest.mark.parametrize("batching", ["none", "synchronous"])
def test_what_stays_whole_and_runs_alone_is_not_shared(batching: str) -> None:
    alone = {"batching": batching, "tokens": 1, "fsdp": True}
    assert share(3, 4, 2, dropout=0.1, **alone) == Share(1.0, 4)
    assert share(3, 4, 2, **alone) == Share(0.5, 2)


def test_one_process_computes_everything() -> None:
    assert share(3, 4, 1) == Share()
    assert Share().of([3, 5]) == 8


def test_of_a_batch_of_unequal_ones_rank_0_may_have_the_largest() -> None:
    assert Share(0.5, 4, cut=False).of([10, 40, 20, 30]) == 70
    assert Share(0.5, 4, cut=False).of([10, 40, 20]) == 40 + 10
    assert Share(0.5, 4).of([10, 40, 20]) == 35
