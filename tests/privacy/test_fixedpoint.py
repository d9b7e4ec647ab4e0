"""Floats become integers within half a step, and sums of them are exact."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import DivergedError, PrivacyError
from splitllm.privacy.fixedpoint import FixedPoint

clips = st.floats(1e-6, 1e6)
finests = st.builds(FixedPoint.finest, clips, st.integers(1, 10_000), st.sampled_from([32, 64]))


@given(finests, st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_what_is_within_the_clip_comes_back_within_half_a_step(fixed: FixedPoint, shares: list[float]) -> None:
    values = np.array(shares) * fixed.clip
    back = fixed.decode(fixed.integers(fixed.encode(values)))
    for value, found in zip(values, back, strict=True):
        assert abs(Fraction(float(value)) - Fraction(float(found))) <= Fraction(2) ** -fixed.fraction_bits / 2


@given(finests, st.floats(1, 1e300))
def test_what_is_beyond_the_clip_is_the_limit(fixed: FixedPoint, times: float) -> None:
    values = np.array([1.0, -1.0]) * fixed.clip * times
    assert fixed.integers(fixed.encode(values)).tolist() == [fixed.limit, -fixed.limit]


@given(finests)
def test_the_finest_cannot_wrap_and_a_bit_more_could(fixed: FixedPoint) -> None:
    bound = min(2 ** (fixed.word_bits - 1) - 1, 2**53)
    assert fixed.limit * fixed.members <= bound
    with pytest.raises(PrivacyError, match=f"use at most {fixed.fraction_bits}$"):
        FixedPoint(fixed.clip, fixed.fraction_bits + 1, fixed.members, fixed.word_bits)


@given(st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=1, max_size=9), st.sampled_from([32, 64]))
def test_sums_of_words_are_sums_of_rounded_values(rows: list[list[float]], word_bits: int) -> None:
    fixed = FixedPoint.finest(2.0, len(rows), word_bits)
    total = np.zeros(3, fixed.dtype)
    for row in rows:
        total += fixed.encode(np.array(row))
    scale = 2**fixed.fraction_bits
    for at, found in enumerate(fixed.decode(fixed.integers(total))):
        clipped = (min(max(row[at], -2.0), 2.0) for row in rows)
        assert Fraction(float(found)) == Fraction(sum(round(Fraction(value) * scale) for value in clipped), scale)


def test_known_words() -> None:
    fixed = FixedPoint(1.0, 4, 3)
    assert fixed.limit == 16
    words = fixed.encode(np.array([0, 1 / 16, -1 / 16, 0.5 / 16, 1.5 / 16, 9, -9], np.float32))
    assert words.dtype == np.uint32
    assert words.tolist() == [0, 1, 2**32 - 1, 0, 2, 16, 2**32 - 16]


def test_ten_members_and_32_bits_leave_27_bits() -> None:
    assert FixedPoint.finest(1.0, 10).fraction_bits == 27
    assert FixedPoint.finest(1.0, 10, 64).fraction_bits == 49


@pytest.mark.parametrize("word_bits", [32, 64])
def test_signs_survive_the_modulus(word_bits: int) -> None:
    fixed = FixedPoint.finest(1.0, 2, word_bits)
    integers = np.array([0, 1, -1, fixed.limit, -fixed.limit, 2 * fixed.limit, -2 * fixed.limit])
    assert fixed.integers(fixed.wrap(integers)).tolist() == integers.tolist()


@pytest.mark.parametrize(
    ("clip", "bits", "members", "word_bits", "key"),
    [
        (1.0, 10, 5, 16, "word_bits"),
        (0.0, 10, 5, 32, "clip"),
        (-1.0, 10, 5, 32, "clip"),
        (math.nan, 10, 5, 32, "clip"),
        (math.inf, 10, 5, 32, "clip"),
        (1.0, 10, 0, 32, "members"),
        (1.0, -2, 5, 32, "fraction_bits"),
        (1.0, 10**9, 5, 32, "fraction_bits"),
        (1.0, 30, 5, 32, "fraction_bits"),
        (1.0, 52, 3, 64, "fraction_bits"),
    ],
)
def test_what_cannot_be_is_refused(clip: float, bits: int, members: int, word_bits: int, key: str) -> None:
    with pytest.raises(PrivacyError, match=rf"^{key}: .*use"):
        FixedPoint(clip, bits, members, word_bits)
    if key != "fraction_bits":
        with pytest.raises(PrivacyError, match=rf"^{key}: .*use"):
            FixedPoint.finest(clip, members, word_bits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_word(value: float) -> None:
    with pytest.raises(DivergedError, match="1 of 3"):
        FixedPoint(1.0, 10, 5).encode(np.array([0.0, value, 1.0]))


def test_the_norm_that_rounding_adds_is_reached_and_never_passed() -> None:
    fixed = FixedPoint(1.0, 4, 5)
    values = np.full(100, 0.5 / 16)
    moved = float(np.linalg.norm(fixed.decode(fixed.integers(fixed.encode(values))) - values))
    assert moved == pytest.approx(fixed.rounding_norm(100), rel=1e-12)
    drawn = np.random.default_rng(0).uniform(-1, 1, 100)
    moved = float(np.linalg.norm(fixed.decode(fixed.integers(fixed.encode(drawn))) - drawn))
    assert 0.3 * fixed.rounding_norm(100) < moved < fixed.rounding_norm(100)
