"""The norm is bounded, the noise is normal and of the promised size, and epsilon is what others have derived."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import DivergedError, PrivacyError
from splitllm.privacy.dp import add_noise, clip_update, epsilon, gaussian
from splitllm.privacy.fixedpoint import FixedPoint

SIZE = 400_000
FARTHEST = math.sqrt(math.log(2e10) / (2 * SIZE))
"""The distribution of so many values is farther than that (0.0054) from their law with a probability below 1e-10: the
inequality of Dvoretzky, Kiefer, Wolfowitz and Massart."""
SPREAD = 7 / math.sqrt(SIZE)
"""Seven standard deviations of a mean of so many values of variance 1: a probability of 3e-12."""


def distance(values: np.ndarray) -> float:
    """Kolmogorov's and Smirnov's, from the standard normal distribution."""
    law = torch.special.ndtr(torch.from_numpy(np.sort(values)).double()).numpy()
    steps = np.arange(len(values) + 1) / len(values)
    return float(max((steps[1:] - law).max(), (law - steps[:-1]).max()))


@given(st.lists(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=5), min_size=1, max_size=4), st.floats(1e-6, 1e6))
def test_the_joint_norm_is_at_most_the_bound_in_exact_arithmetic(rows: list[list[float]], bound: float) -> None:
    update = {str(at): torch.tensor(row, dtype=torch.float64) for at, row in enumerate(rows)}
    clipped, norm = clip_update(update, bound)
    square = sum(Fraction(value) ** 2 for tensor in clipped.values() for value in tensor.tolist())
    assert square <= Fraction(bound) ** 2
    if norm <= bound * (1 - 1e-11):
        assert all(torch.equal(clipped[name], update[name]) for name in update)
    else:
        assert float(square) >= (bound * (1 - 1e-11)) ** 2


def test_direction_is_kept_and_dtypes_become_fp64() -> None:
    update = {"a": torch.tensor([3.0], dtype=torch.bfloat16), "b": torch.tensor([[0.0, 4.0]], dtype=torch.float32)}
    clipped, norm = clip_update(update, 1.0)
    assert norm == 5.0
    torch.testing.assert_close(clipped["a"], torch.tensor([0.6]).double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(clipped["b"], torch.tensor([[0.0, 0.8]]).double(), rtol=1e-7, atol=0)
    assert clip_update({}, 1.0) == ({}, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_an_update_without_a_finite_norm_is_refused(value: float) -> None:
    with pytest.raises(DivergedError, match="left out"):
        clip_update({"a": torch.tensor([value, value], dtype=torch.float64) * 1e150}, 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_is_none_is_refused(bound: float) -> None:
    with pytest.raises(PrivacyError, match="bound"):
        clip_update({}, bound)


def test_noise_is_normal() -> None:
    values = gaussian(SIZE, 1.0)
    assert distance(values) < FARTHEST
    assert distance(values * 1.05) > FARTHEST and distance(values + 0.05) > FARTHEST  # so the test sees that much
    assert distance(gaussian(SIZE, 3.0) / 3) < FARTHEST
    assert 4 < np.abs(values).max() < 8.58  # that none is above 4 has a probability of 1e-11


def test_values_do_not_depend_on_each_other() -> None:
    """Neither those of one pair of words (half a vector apart) nor neighbours, nor their squares."""
    values = gaussian(SIZE, 1.0)
    squares = (values**2 - 1) / math.sqrt(2)
    for apart in (1, SIZE // 2):
        for each in (values, squares):
            assert abs(np.mean(each * np.roll(each, apart))) < 2 * SPREAD  # a half counts twice: sqrt(2) wider


def test_noise_never_repeats() -> None:
    values = np.concatenate([gaussian(501, 1.0), gaussian(501, 1.0)])
    assert len(values) == 1002 == len(np.unique(values))
    torch.manual_seed(0)
    np.random.seed(0)
    assert not np.isin(gaussian(100, 1.0), values).any()


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_short_noise(size: int) -> None:
    assert gaussian(size, 1.0).shape == (size,) and not gaussian(size, 0.0).any()


def test_noise_on_a_sum_is_whole_and_as_large_as_promised() -> None:
    fixed = FixedPoint.finest(1.0, 10)
    total = np.arange(SIZE) - SIZE // 2
    noise = add_noise(total, 1.5, 0.2, fixed) - total
    assert noise.dtype == np.int64
    deviation = 1.5 * (0.2 + math.sqrt(SIZE) * 2.0 ** -(fixed.fraction_bits + 1))
    assert distance(fixed.decode(noise) / deviation) < FARTHEST
    assert (add_noise(total, 0.0, 0.2, fixed) == total).all()


def test_rounding_counts_where_the_grid_is_coarse() -> None:
    """Steps of 1/4 and 400,000 values: rounding moves by up to 79 what is clipped to 1."""
    noise = FixedPoint(1.0, 2, 10).decode(add_noise(np.zeros(SIZE, np.int64), 1.0, 1.0, FixedPoint(1.0, 2, 10)))
    assert np.std(noise) == pytest.approx(1 + math.sqrt(SIZE) / 8, rel=0.011)  # 7 of its own standard deviations


@pytest.mark.parametrize(
    ("multiplier", "bound"), [(-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0), (1.0, math.inf), (1e9, 1.0)]
)
def test_noise_that_cannot_be_added_is_refused(multiplier: float, bound: float) -> None:
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        add_noise(np.zeros(3, np.int64), multiplier, bound, FixedPoint.finest(1.0, 3))


def renyi(alpha: int, noise: float, rate: float) -> float:
    """Of one round, at a whole order (Mironov, Talwar, Zhang, arXiv 1908.10530, section 3.3)."""
    terms = [
        math.log(math.comb(alpha, k))
        + (k * math.log(rate) if k else 0.0)
        + ((alpha - k) * math.log1p(-rate) if rate < 1 else (0.0 if k == alpha else -math.inf))
        + k * (k - 1) / (2 * noise**2)
        for k in range(alpha + 1)
    ]
    largest = max(terms)
    return (largest + math.log(sum(math.exp(term - largest) for term in terms))) / (alpha - 1)


def by_whole_orders(noise: float, rate: float, rounds: int, delta: float) -> float:
    """With the conversion of Canonne, Kamath, Steinke (arXiv 2004.00010, proposition 12)."""
    return min(
        rounds * renyi(alpha, noise, rate) + math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1)
        for alpha in range(2, 200)
    )


def exact(noise: float, rounds: int, delta: float) -> float:
    """Without sampling: rounds of noise z are one of z / sqrt(rounds), whose delta is known (Balle, Wang, 2018)."""
    mu = math.sqrt(rounds) / noise

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    low, high = 0.0, 500.0
    for _ in range(200):
        middle = (low + high) / 2
        too_much = normal(mu / 2 - middle / mu) - math.exp(middle) * normal(-mu / 2 - middle / mu) > delta
        low, high = (middle, high) if too_much else (low, middle)
    return high


def test_the_formula_here_gives_the_published_moments_accountant() -> None:
    """1.26 for q = 0.01, z = 4, 10,000 rounds, delta = 1e-5 (Abadi et al., arXiv 1607.00133, section 3.2): by its
    conversion, and orders up to 33."""
    published = min(10_000 * renyi(alpha, 4.0, 0.01) + math.log(1e5) / (alpha - 1) for alpha in range(2, 34))
    assert published == pytest.approx(1.26, abs=0.005)


@pytest.mark.parametrize(
    ("noise", "rate", "rounds", "delta"),
    [(4.0, 0.01, 10_000, 1e-5), (1.1, 0.1, 100, 1e-4), (2.0, 0.5, 20, 1e-3), (3.0, 1.0, 50, 1e-5)],
)
def test_epsilon_is_that_of_the_published_formula(noise: float, rate: float, rounds: int, delta: float) -> None:
    """There are orders between the whole ones too, so it may be a little less: 2.9 % where 4 is the best of them."""
    whole = by_whole_orders(noise, rate, rounds, delta)
    assert 0.97 * whole <= epsilon(noise, rate, rounds, delta) <= 1.001 * whole


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_all_orders_converge(rate: float, caplog: pytest.LogCaptureFixture) -> None:
    """The library warns of those that do not, each time."""
    for noise in (0.3, 1.0, 10.0, 100.0):
        assert 0 < epsilon(noise, rate, 100, 1e-5) < math.inf
    assert not caplog.records


@pytest.mark.parametrize(("noise", "rounds", "delta"), [(1.0, 1, 1e-5), (5.0, 30, 1e-5), (20.0, 100, 1e-3)])
def test_epsilon_is_never_below_the_exact_one(noise: float, rounds: int, delta: float) -> None:
    """And at most a quarter above, which is what Renyi accounting gives away."""
    assert exact(noise, rounds, delta) <= epsilon(noise, 1.0, rounds, delta) <= 1.25 * exact(noise, rounds, delta)


def test_the_exact_one_is_the_known_one() -> None:
    """delta = 0.1269 for mu = 1, epsilon = 1 (Balle and Wang's curve)."""
    assert exact(1.0, 1, 0.12693673750664397) == pytest.approx(1.0, abs=1e-9)


def test_more_noise_costs_less_and_more_rounds_and_clients_more() -> None:
    base = epsilon(1.0, 0.1, 100, 1e-5)
    assert epsilon(1.1, 0.1, 100, 1e-5) < base < min(epsilon(1.0, 0.1, 110, 1e-5), epsilon(1.0, 0.11, 100, 1e-5))
    assert base < epsilon(1.0, 0.1, 100, 1e-6)


def test_nothing_costs_nothing_and_no_noise_costs_all() -> None:
    assert epsilon(1.0, 0.1, 0, 1e-5) == epsilon(1.0, 0.0, 10, 1e-5) == 0.0
    assert epsilon(0.0, 0.1, 1, 1e-5) == math.inf


@pytest.mark.parametrize(
    "arguments",
    [(-1.0, 0.1, 1, 1e-5), (math.nan, 0.1, 1, 1e-5), (1.0, 1.1, 1, 1e-5), (1.0, -0.1, 1, 1e-5), (1.0, 0.1, -1, 1e-5)]
    + [(1.0, 0.1, 1, delta) for delta in (0.0, 1.0, math.nan)],
)
def test_what_cannot_be_is_refused(arguments: tuple[float, float, int, float]) -> None:
    with pytest.raises(PrivacyError, match="not possible"):
        epsilon(*arguments)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(PrivacyError, match=r"pip install 'splitllm\[privacy\]'"):
        epsilon(1.0, 0.1, 1, 1e-5)
