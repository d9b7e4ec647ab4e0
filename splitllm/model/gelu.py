"""GPT-2's activation, to the bit as transformers computes it, keeping nothing but its input for the backward.

transformers writes it as seven operations, whose results autograd keeps: about two thirds of what a block saves.
Here they are computed again in the backward, in place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import NewGELUActivation

SLOPE, CUBIC = math.sqrt(2.0 / math.pi), 0.044715


class LeanGelu(NewGELUActivation):  # type: ignore[misc]
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (arXiv 1606.08415)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape; under autocast, which casts single operations, it is transformers' own."""
        if torch.is_autocast_enabled(x.device.type):
            plain: torch.Tensor = super().forward(x)
            return plain
        out: torch.Tensor = _Gelu.apply(x)  # type: ignore[no-untyped-call]
        return out


def make_lean(model: nn.Module) -> None:
    """Replace transformers' module wherever a model has it."""
    for name, module in list(model.named_modules()):
        if type(module) is NewGELUActivation:
            model.set_submodule(name, LeanGelu())


class _Gelu(torch.autograd.Function):
    """Every operation, and the order of every sum, is that of autograd on transformers' expression."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return (0.5 * x).mul_(_tanh(x).add_(1.0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        tanh = _tanh(x)
        inner = torch.ops.aten.tanh_backward(gradient * (0.5 * x), tanh).mul_(SLOPE)
        cubic = torch.pow(x, 2.0).mul_(3.0).mul_(inner * CUBIC)
        outer = (gradient * tanh.add_(1.0)).mul_(0.5)
        result: torch.Tensor = inner.add_(cubic).add_(outer)
        return result


def _tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.pow(x, 3.0).mul_(CUBIC).add_(x).mul_(SLOPE).tanh_()
