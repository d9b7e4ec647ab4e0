"""Differential privacy of users: what comes out of the rounds hardly depends on any one client.

DP-FedAvg (McMahan et al., ICLR 2018, arXiv 1710.06963): each client clips its update to an L2 norm of S, and noise
N(0, (z S)^2) is added to each value of the sum. The weights have to be 1 for all, and the mean is the sum over a number
fixed before (sampling rate x clients), not over how many came.

The sum is one of integers (`fixedpoint.py`), and the noise is rounded to integers before it is added. Rounding it
afterwards would give the same, since the sum is whole: so the outcome is that of ideal noise, rounded, and the low bits
of floats, from which added noise has been taken off again (Mironov, CCS 2012), are not there. What is left of floating
point is the noise's own: it has 53 random bits, and nothing beyond 8.58 standard deviations (probability 1e-17).

It is the server that adds the noise: to the server itself the sum is not private in this sense. And what a split model
sends at every step, activations and gradients at the cut, is outside of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import numpy as np
import torch

from splitllm.errors import DivergedError, PrivacyError
from splitllm.privacy.fixedpoint import FixedPoint, Floats, Integers
from splitllm.privacy.masks import KEY_BYTES, random_words

_BITS = 53
_SLACK = 2.0**-40
_ORDERS = [2.0, *(tenths / 10 for tenths in range(27, 110)), *range(11, 65), 96, 128, 192, 256, 512, 1024]
"""Of Renyi's divergence. Any of them bounds epsilon; the library's own for the smallest ones may not converge."""


def clip_update(update: Mapping[str, torch.Tensor], bound: float) -> tuple[dict[str, torch.Tensor], float]:
    """The update in fp64, scaled down if need be so that its joint L2 norm is at most `bound`.

    Returns:
        The tensors, and the norm that they had.

    Raises:
        DivergedError: a value, or the norm, is not finite.
        PrivacyError: the bound is not positive.
    """
    if not (math.isfinite(bound) and bound > 0):
        raise PrivacyError(f"bound: {bound} is not possible; use a positive number")
    wide = {name: tensor.detach().to(torch.float64) for name, tensor in update.items()}
    norm = math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in wide.values()))
    if not math.isfinite(norm):
        raise DivergedError(f"the update has a norm of {norm}; it is left out")
    # What rounding does to the norm and to the scaled values is far below the slack.
    factor = 1.0 if norm <= bound * (1 - _SLACK) else bound * (1 - _SLACK) / norm
    return {name: tensor * factor for name, tensor in wide.items()}, norm


def gaussian(size: int, deviation: float) -> Floats:
    """Independent values of N(0, deviation^2) from the operating system's randomness: no seed brings them back.

    Box and Muller's, over words of ChaCha20 with a key that is used once.
    """
    words = random_words(os.urandom(KEY_BYTES), size + size % 2) >> np.uint64(64 - _BITS)
    first, second = (words.astype(np.float64) * 2.0**-_BITS).reshape(2, -1)
    radius = np.sqrt(-2 * np.log1p(-first))
    angle = 2 * math.pi * second
    return deviation * np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def add_noise(total: Integers, noise_multiplier: float, bound: float, fixed: FixedPoint) -> Integers:
    """The sum with noise, still whole: `fixed.decode` makes values of it.

    Args:
        total: integers [size], the sum of updates, each clipped to `bound` and then made words.
        noise_multiplier: z; the deviation is z times the norm that one client can add, rounding included.
        bound: S.
        fixed: how values are words.

    Raises:
        PrivacyError: this noise cannot be added.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0 and math.isfinite(bound) and bound > 0):
        raise PrivacyError(
            f"noise_multiplier, bound: {noise_multiplier}, {bound} are not possible; use positive numbers"
        )
    sensitivity = bound + fixed.rounding_norm(total.size)
    deviation = math.ldexp(noise_multiplier * sensitivity, fixed.fraction_bits)
    if deviation > 2.0**_BITS:
        raise PrivacyError(
            f"noise_multiplier: {noise_multiplier} with a bound of {bound} is beyond exact integers; use less"
        )
    return total + np.rint(gaussian(total.size, deviation)).astype(np.int64)


def epsilon(noise_multiplier: float, sampling_rate: float, rounds: int, delta: float) -> float:
    """What the rounds together cost: the epsilon of (epsilon, delta)-privacy for adding or taking away one client.

    Renyi accounting of the Poisson-subsampled Gaussian by the library dp-accounting. An upper bound; where it is above
    20 or so, and promises nothing, others would be lower.

    Args:
        noise_multiplier: z; 0 costs infinitely much.
        sampling_rate: with which probability each client takes part, drawn for each client and round by itself; 1 for
            any other way to choose them.
        rounds: whose sums were used, void ones not.
        delta: from 0 to 1, well below one over the number of clients.

    Raises:
        PrivacyError: a value is not possible, or the library is not installed.
    """
    if not (noise_multiplier >= 0 and 0 <= sampling_rate <= 1 and rounds >= 0 and 0 < delta < 1):
        raise PrivacyError(
            f"noise_multiplier {noise_multiplier}, sampling_rate {sampling_rate}, rounds {rounds}, delta {delta}: not "
            "possible; use at least 0, from 0 to 1, at least 0, and between 0 and 1"
        )
    if rounds == 0 or sampling_rate == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    try:
        import dp_accounting
    except ImportError as error:
        raise PrivacyError("epsilon: the library dp-accounting is missing; pip install 'splitllm[privacy]'") from error
    event = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    accountant = dp_accounting.rdp.RdpAccountant(_ORDERS)
    return float(accountant.compose(event, rounds).get_epsilon(delta))
