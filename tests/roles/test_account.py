"""Device time is shared out whole, by positions and blocks; tokens, bytes and padding add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.roles.account import Account, Part

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=5)
batches = st.lists(st.lists(st.builds(Part, st.integers(0, 3), lengths, st.integers(0, 6)), min_size=1), max_size=5)


def test_drawn() -> None:
    """Two rows of 4 and 3, and one of 8 through half as many blocks: 8 x 2 against 8 x 1 positions and blocks."""
    account = Account()
    account.ran([Part(0, (4, 3), 2), Part(1, (8,), 1)], 3.0)
    assert account.seconds == {0: pytest.approx(2.0), 1: pytest.approx(1.0)}
    assert (account.positions, account.padding) == (24, 9)
    assert account.last == (2, 9 / 24)


def test_a_shard_without_blocks_shares_by_positions() -> None:
    account = Account()
    account.ran([Part(0, (2,), 0), Part(1, (6,), 0)], 4.0)
    assert account.seconds == {0: 1.0, 1: 3.0}


def test_how_long_the_rows_of_others_are_changes_nobody_s_share_among_the_rest() -> None:
    short, long = Account(), Account()
    short.ran([Part(0, (5,), 1), Part(1, (5,), 1)], 2.0)
    long.ran([Part(0, (5,), 1), Part(1, (5,), 1), Part(2, (90,), 1)], 20.0)
    assert long.seconds[0] == pytest.approx(short.seconds[0])


def test_a_batch_of_nobody_is_none() -> None:
    account = Account()
    account.ran([], 1.0)
    assert (account.batches, account.seconds) == (0, {})


def test_tokens_and_bytes_add_up_by_client() -> None:
    account = Account()
    for client, tokens, nbytes in ((0, 10, 100), (1, 5, 50), (0, 0, 7)):
        account.asked(client, tokens, nbytes)
    account.answered(0, 30)
    assert (account.tokens, account.up, account.down) == ({0: 10, 1: 5}, {0: 107, 1: 50}, {0: 30})


@given(batches)
def test_all_the_device_s_time_is_somebody_s_and_no_one_else_s(drawn: list[list[Part]]) -> None:
    account = Account()
    for batch in drawn:
        account.ran(batch, 2.5)
    assert sum(account.seconds.values()) == pytest.approx(2.5 * len(drawn))
    assert account.seconds.keys() == {part.client for batch in drawn for part in batch}
    assert account.micro_batches == sum(map(len, drawn)) and account.batches == len(drawn)
    tokens = sum(sum(part.lengths) for batch in drawn for part in batch)
    assert account.positions - account.padding == tokens
