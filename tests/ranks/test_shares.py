"""Who computes what of a batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitllm.ranks.shares import Part, share_out

BATCHES = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=6)


@given(BATCHES, st.integers(1, 5), st.booleans())
def test_every_row_is_computed_once_in_order_and_rank_0_has_the_first(
    lengths: list[list[int]], ranks: int, whole: bool
) -> None:
    shares = share_out(lengths, ranks, whole=whole)
    rows = [(part.ask, row) for share in shares for part in share for row in range(part.start, part.stop)]
    assert len(shares) == ranks
    assert rows == [(ask, row) for ask, each in enumerate(lengths) for row in range(len(each))]
    assert shares[0][0].ask == shares[0][0].start == 0


@given(BATCHES, st.integers(1, 5))
def test_no_rank_has_much_more_than_its_share_of_the_tokens(lengths: list[list[int]], ranks: int) -> None:
    total, longest = sum(map(sum, lengths)), max(map(max, lengths))
    for share in share_out(lengths, ranks):
        tokens = sum(sum(lengths[part.ask][part.start : part.stop]) for part in share)
        assert tokens <= total / ranks + 2 * longest


@given(BATCHES, st.integers(1, 5))
def test_whole_micro_batches_are_not_cut(lengths: list[list[int]], ranks: int) -> None:
    parts = [part for share in share_out(lengths, ranks, whole=True) for part in share]
    assert parts == [Part(ask, 0, len(rows)) for ask, rows in enumerate(lengths)]


def test_two_equal_rows_are_one_a_rank() -> None:
    assert share_out([[7, 7]], 2) == [[Part(0, 0, 1)], [Part(0, 1, 2)]]
    assert share_out([[7], [7]], 2) == [[Part(0, 0, 1)], [Part(1, 0, 1)]]
