"""Frozen linear layers in 4 or 8 bits: bitsandbytes' codes and scales in a layer of our own.

The arithmetic of the codes is bitsandbytes'; the layer is ours, as its own ones compute otherwise in evaluation than in
training, and otherwise on CPUs than on GPUs (decision 18).

Shape suffixes: D width in, O width out.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from splitllm.recipe import QuantizationRecipe

BLOCK = 64  # numbers that share a scale in nf4
OUTER_BLOCK = 256  # scales of nf4 that share a scale where these are quantised, too
COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Held = dict[str, torch.Tensor]
"""`codes` and `scales`, and where the scales of nf4 are quantised `outer_scales` and `offset`."""


@cache
def library() -> Any:
    """The functions of bitsandbytes, imported where something is quantised and nowhere else."""
    import bitsandbytes.functional

    return bitsandbytes.functional


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that holds its weight as codes and scales, and multiplies with what they stand for.

    Args:
        width_in, width_out: of the layer.
        held: the weight, as `quantizing.quantized` gives it.
        how: the method, and in which dtype products are computed.
        bias: the layer's own, or None.
    """

    def __init__(
        self, width_in: int, width_out: int, held: Held, how: QuantizationRecipe, bias: nn.Parameter | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = width_in, width_out
        self.method = how.method
        self.compute_dtype = None if how.compute_dtype is None else COMPUTE[how.compute_dtype]
        self.weight = _frozen(held["codes"])
        self.scales = _frozen(held["scales"])
        self.outer_scales = _frozen(held["outer_scales"]) if how.double else None
        self.offset = _frozen(held["offset"]) if how.double else None
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., O], in the dtype that an ordinary layer would answer in."""
        device = x.device.type
        outer = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            product: torch.Tensor = _Product.apply(x.to(self.compute_dtype or outer), self)  # type: ignore[no-untyped-call]
        return product.to(outer)

    def matrix(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A matrix [O, D] in `dtype`, and by what its rows are to be multiplied, if by anything."""
        if self.method == "int8":
            return self.weight.to(dtype), self.scales / 127
        numbers = library().dequantize_4bit(self.weight, self._state(dtype)).reshape(-1)
        return numbers[: self.out_features * self.in_features].view(self.out_features, self.in_features), None

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that this layer multiplies with, [O, D]."""
        matrix_OD, scales_O = self.matrix(dtype)
        return matrix_OD if scales_O is None else matrix_OD.mul_(scales_O.unsqueeze(1))

    def _state(self, dtype: torch.dtype) -> Any:
        """As rows of one block each: of other widths bitsandbytes 0.50 finds other numbers on some CPUs."""
        outer = None
        if self.outer_scales is not None:
            table = _table(self.weight.device)
            outer = library().QuantState(self.outer_scales, code=table, blocksize=OUTER_BLOCK, dtype=torch.float32)
        return library().QuantState(
            self.scales,
            shape=torch.Size((self.scales.numel(), BLOCK)),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.offset,
            state2=outer,
        )


class _Product(torch.autograd.Function):
    """x W^T + bias. The weight is made of its codes here, and once more in the backward; nothing is kept for that."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        matrix_OD, scales_O = layer.matrix(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        if scales_O is None:
            return F.linear(x, matrix_OD, bias)
        out = F.linear(x, matrix_OD).mul_(scales_O)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (upper,) = gradients
        matrix_OD, scales_O = ctx.layer.matrix(upper.dtype)
        return (upper if scales_O is None else (upper * scales_O).to(upper.dtype)) @ matrix_OD, None


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@cache
def _table(device: torch.device) -> torch.Tensor:
    """The numbers that quantised scales stand for; one table for all layers."""
    table: torch.Tensor = library().create_dynamic_map().to(device)
    return table
