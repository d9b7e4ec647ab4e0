"""Any t shares give the secret back, fewer tell nothing."""

from __future__ import annotations

import contextlib
from itertools import combinations

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import PeerError
from splitllm.privacy.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, join, split

secrets_drawn = st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES)


def some(shares: list[bytes], points: tuple[int, ...]) -> dict[int, bytes]:
    return {point: shares[point - 1] for point in points}


def test_the_field_has_room_for_every_secret() -> None:
    assert sympy.isprime(PRIME)
    assert 1 << (8 * SECRET_BYTES) < PRIME < 1 << (8 * SHARE_BYTES)


@given(secrets_drawn, st.integers(1, 6), st.integers(0, 4))
def test_any_t_shares_give_the_secret(secret: bytes, threshold: int, more: int) -> None:
    members = threshold + more
    shares = split(secret, threshold, members)
    assert {len(share) for share in shares} == {SHARE_BYTES}
    for points in combinations(range(1, members + 1), threshold):
        assert join(some(shares, points)) == secret


@pytest.mark.parametrize("secret", [b"\0" * 32, b"\xff" * 32])
def test_the_smallest_and_the_largest_secret(secret: bytes) -> None:
    assert join(some(split(secret, 3, 5), (5, 1, 3))) == secret


@pytest.mark.parametrize("threshold", [2, 3, 5])
def test_one_share_less_gives_another_number(threshold: int) -> None:
    """With a polynomial of too low a degree it would be the secret."""
    secret = bytes(range(32))
    shares = split(secret, threshold, threshold)
    for points in combinations(range(1, threshold + 1), threshold - 1):
        with contextlib.suppress(PeerError):  # a number that is no secret
            assert join(some(shares, points)) != secret


def test_shares_below_t_fit_every_secret() -> None:
    """For each other secret there is one third share that makes it the secret of these two: 3 s1 - 3 s2 + s3 = s."""
    shares = some(split(b"\1" * 32, 3, 3), (1, 2))
    first, second = (int.from_bytes(share, "big") for share in shares.values())
    for candidate in (b"\0" * 32, b"\1" * 32, bytes(range(32)), b"\xff" * 32):
        third = (int.from_bytes(candidate, "big") - 3 * first + 3 * second) % PRIME
        assert join({**shares, 3: third.to_bytes(SHARE_BYTES, "big")}) == candidate


@pytest.mark.parametrize("secret", [b"\0" * 32, b"\xff" * 32])
def test_shares_below_t_are_uniform_whatever_the_secret(secret: bytes) -> None:
    """Each of two shares of three, their sum and difference, in 64 equal parts of the field: a chi-square of 63 degrees
    of freedom is above 63 + 12 x 11.2 with a probability of 1e-14."""
    drawn = [[int.from_bytes(share, "big") for share in split(secret, 3, 3)] for _ in range(4000)]
    for values in (
        [a for a, _, _ in drawn],
        [b for _, b, _ in drawn],
        [(a + b) % PRIME for a, b, _ in drawn],
        [(a - b) % PRIME for a, b, _ in drawn],
    ):
        counts = np.bincount([value * 64 // PRIME for value in values], minlength=64)
        each = len(values) / 64
        assert ((counts - each) ** 2 / each).sum() < 63 + 12 * 11.2


def test_two_sharings_of_a_secret_differ() -> None:
    assert split(b"\0" * 32, 2, 3) != split(b"\0" * 32, 2, 3)


@pytest.mark.parametrize("share", [b"", b"\0" * 32, PRIME.to_bytes(33, "big"), b"\xff" * 33])
def test_what_is_no_share_is_refused(share: bytes) -> None:
    with pytest.raises(PeerError, match="share 2"):
        join({1: b"\0" * 33, 2: share})


def test_shares_of_no_secret_are_refused() -> None:
    with pytest.raises(PeerError, match="not of one secret"):
        join({1: (PRIME - 1).to_bytes(33, "big")})


@pytest.mark.parametrize(("size", "threshold", "members"), [(31, 2, 3), (33, 2, 3), (32, 0, 3), (32, 4, 3)])
def test_no_such_sharing(size: int, threshold: int, members: int) -> None:
    with pytest.raises(ValueError, match="no such sharing"):
        split(b"\0" * size, threshold, members)
