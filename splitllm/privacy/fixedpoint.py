"""Numbers as integers modulo a power of two, so that sums are exact, whatever their order, and masks are uniform."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from splitllm.errors import DivergedError, PrivacyError

Words = npt.NDArray[np.unsignedinteger]
"""Integers modulo 2^32 (uint32) or 2^64 (uint64)."""
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_TYPES: dict[int, tuple[type[np.unsignedinteger], type[np.signedinteger]]] = {
    32: (np.uint32, np.int32),
    64: (np.uint64, np.int64),
}
_EXACT_BITS = 53
_MOST_FRACTION_BITS = 900


@dataclass(frozen=True)
class FixedPoint:
    """x is round(min(max(x, -clip), clip) 2^fraction_bits) modulo 2^word_bits.

    The sum of as many as `members` cannot wrap, and is exact in fp64: members x `limit` is below 2^(word_bits - 1) and
    at most 2^53.

    Attributes:
        clip: the largest absolute value; what is larger is taken for it.
        fraction_bits: a step of the grid is 2^-fraction_bits; may be negative.
        members: how many are added at most.
        word_bits: 32 or 64.

    Raises:
        PrivacyError: a sum could wrap, or the values make no sense.
    """

    clip: float
    fraction_bits: int
    members: int
    word_bits: int = 32

    def __post_init__(self) -> None:
        if self.word_bits not in _TYPES:
            raise PrivacyError(f"word_bits: {self.word_bits} is not possible; use 32 or 64")
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise PrivacyError(f"clip: {self.clip} is not possible; use a positive number")
        if self.members < 1:
            raise PrivacyError(f"members: {self.members} is not possible; use at least 1")
        if abs(self.fraction_bits) > _MOST_FRACTION_BITS:
            raise PrivacyError(
                f"fraction_bits: {self.fraction_bits} is not possible; use at most {_MOST_FRACTION_BITS}"
            )
        if self.limit < 1:
            raise PrivacyError(f"fraction_bits: {self.fraction_bits} makes nothing but 0 of {self.clip:g}; use more")
        if self.limit * self.members > _largest_sum(self.word_bits):
            raise PrivacyError(
                f"fraction_bits: {self.members} values of {self.clip:g} with {self.fraction_bits} fraction bits do not "
                f"fit into {self.word_bits} bits; use at most {_finest(self.clip, self.members, self.word_bits)}"
            )

    @classmethod
    def finest(cls, clip: float, members: int, word_bits: int = 32) -> FixedPoint:
        """With as many fraction bits as there is room for: 10 members and 32 bits leave 27 with a clip of 1.

        Raises:
            PrivacyError: the values make no sense.
        """
        if not (word_bits in _TYPES and math.isfinite(clip) and clip > 0 and members >= 1):
            return cls(clip, 0, members, word_bits)  # which says what is wrong
        return cls(clip, _finest(clip, members, word_bits), members, word_bits)

    @property
    def limit(self) -> int:
        """The largest absolute value of one integer."""
        return _limit(self.clip, self.fraction_bits)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of the words."""
        return np.dtype(_TYPES[self.word_bits][0])

    def encode(self, values: npt.NDArray[np.floating]) -> Words:
        """Floats of any shape as words; what is beyond `clip` is clipped, halves go to the even neighbour.

        Raises:
            DivergedError: one is not finite.
        """
        wide = np.asarray(values, np.float64)
        if not np.isfinite(wide).all():
            raise DivergedError(f"{np.count_nonzero(~np.isfinite(wide))} of {wide.size} values are not finite")
        whole = np.rint(np.ldexp(np.clip(wide, -self.clip, self.clip), self.fraction_bits))
        return self.wrap(whole.astype(np.int64))

    def wrap(self, integers: Integers) -> Words:
        """Integers modulo 2^word_bits."""
        return integers.astype(np.uint64).astype(self.dtype)

    def integers(self, words: Words) -> Integers:
        """Those between -2^(word_bits - 1) and 2^(word_bits - 1) that the words stand for."""
        return words.astype(self.dtype, copy=False).view(_TYPES[self.word_bits][1]).astype(np.int64)

    def decode(self, integers: Integers) -> Floats:
        """The numbers that integers, or sums of as many as `members`, stand for: exactly."""
        return np.ldexp(integers.astype(np.float64), -self.fraction_bits)

    def rounding_norm(self, size: int) -> float:
        """By how much rounding can move a vector of so many values, in the L2 norm: half a step in each."""
        return math.sqrt(size) * 2.0 ** -(self.fraction_bits + 1)


def _limit(clip: float, fraction_bits: int) -> int:
    return round(Fraction(clip) * Fraction(2) ** fraction_bits)


def _largest_sum(word_bits: int) -> int:
    return min((1 << (word_bits - 1)) - 1, 1 << _EXACT_BITS)


def _finest(clip: float, members: int, word_bits: int) -> int:
    bits = math.frexp(_largest_sum(word_bits) / members)[1] - math.frexp(clip)[1] + 1
    while _limit(clip, bits) * members > _largest_sum(word_bits):
        bits -= 1
    return bits
