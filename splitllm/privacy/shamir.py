"""A secret in n shares: any t of them give it back, and t - 1 tell nothing of it (Shamir, 1979).

A share is the value, at a point from 1 to n, of a random polynomial of degree t - 1 whose value at 0 is the secret,
modulo the prime 2^257 - 93: there each secret of 32 bytes is a number of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from splitllm.errors import PeerError

PRIME = (1 << 257) - 93
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, members: int) -> list[bytes]:
    """Shares of 33 bytes, for the points 1 to `members`.

    Args:
        secret: 32 bytes.
        threshold: how many shares give it back.
        members: how many there are, at least `threshold`.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= members:
        raise ValueError(f"{len(secret)} bytes, {threshold} of {members}: there is no such sharing")
    polynomial = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(polynomial, point).to_bytes(SHARE_BYTES, "big") for point in range(1, members + 1)]


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from as many shares as the threshold, by their points (1, 2, ...).

    Raises:
        PeerError: they cannot be shares of one secret; that they give a wrong one, the caller has to find out.
    """
    values = {point: int.from_bytes(share, "big") for point, share in shares.items()}
    wrong = [point for point, value in values.items() if value >= PRIME or len(shares[point]) != SHARE_BYTES]
    if wrong:
        raise PeerError(f"share {wrong[0]}: it is not a number below the prime in {SHARE_BYTES} bytes")
    secret = sum(value * _weight(point, values) for point, value in values.items()) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise PeerError(f"shares {sorted(values)}: they are not of one secret of {SECRET_BYTES} bytes")
    return secret.to_bytes(SECRET_BYTES, "big")


def _value(polynomial: list[int], point: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % PRIME
    return value


def _weight(point: int, points: Mapping[int, int]) -> int:
    """Of the value at a point, in the value at 0 (Lagrange)."""
    above = below = 1
    for other in points:
        if other != point:
            above = above * other % PRIME
            below = below * (other - point) % PRIME
    return above * pow(below, -1, PRIME)
