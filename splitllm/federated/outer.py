"""Optimizers of the top: from round to round they step by the difference between the average and what was before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outer:
    """How the top steps.

    Attributes:
        name: a row of `STEPS`.
        lr: multiplies the step.
        betas: of the first and second moment.
        tau: what is added to the root of the second, for being adaptive to so small a degree.
    """

    name: str
    lr: float
    betas: tuple[float, float]
    tau: float


def outer_step(
    outer: Outer, before: Mapping[str, torch.Tensor], average: Mapping[str, torch.Tensor], moments: Tensors
) -> Tensors:
    """One step of the top, in fp64.

    Args:
        outer: how.
        before: what was handed out last.
        average: of what has come back since; of some tensors or all.
        moments: `m/NAME` and `v/NAME`; are renewed.

    Returns:
        What is handed out now, of the tensors in `average`.
    """
    made: Tensors = {}
    for name, mean in average.items():
        change = mean.double() - before[name].to(mean.device).double()
        step = STEPS[outer.name](outer, change, name, moments)
        made[name] = (before[name].to(mean.device).double() + outer.lr * step).to(mean.dtype)
    return made


def _fedavgm(outer: Outer, change: torch.Tensor, name: str, moments: Tensors) -> torch.Tensor:
    """Momentum as in arXiv 1909.06335: m <- beta m + change, and a step of m."""
    moments[f"m/{name}"] = outer.betas[0] * moments.get(f"m/{name}", torch.zeros_like(change)) + change
    return moments[f"m/{name}"]


def _adaptive(grow: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Algorithm 2 of arXiv 2003.00295: m <- b1 m + (1 - b1) change, a step of m / (sqrt(v) + tau), v first tau^2."""

    def step(outer: Outer, change: torch.Tensor, name: str, moments: Tensors) -> torch.Tensor:
        m = moments.get(f"m/{name}", torch.zeros_like(change))
        v = moments.get(f"v/{name}", torch.full_like(change, outer.tau**2))
        moments[f"m/{name}"] = m = outer.betas[0] * m + (1 - outer.betas[0]) * change
        moments[f"v/{name}"] = v = grow(v, change.square(), outer.betas[1])
        return m / (v.sqrt() + outer.tau)

    return step


STEPS: dict[str, Callable[[Outer, torch.Tensor, str, Tensors], torch.Tensor]] = {
    "fedavgm": _fedavgm,
    "fedadam": _adaptive(lambda v, square, beta: beta * v + (1 - beta) * square),
    "fedyogi": _adaptive(lambda v, square, beta: v - (1 - beta) * square * torch.sign(v - square)),
}
