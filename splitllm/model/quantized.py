"""Frozen linear layers in 4 or 8 bits: bitsandbytes' codes and scales, read from a checkpoint piece by piece.

The arithmetic of the codes is bitsandbytes'; the layer is ours, as its own ones compute otherwise in evaluation than in
training, and otherwise on CPUs than on GPUs (decision 18).

Shape suffixes: D width in, O width out, K blocks of 64 numbers of a weight, row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitllm.model.loading import Checkpoint
from splitllm.recipe import QuantizationRecipe

BLOCK = 64  # numbers that share a scale in nf4
OUTER_BLOCK = 256  # scales of nf4 that share a scale where these are quantised, too
PIECE_BYTES = 2**20  # of a stored weight that are quantised at once
COMPUTE = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
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
        held: the weight, as `quantized` gives it.
        how: the method, and in which dtype products are computed.
        bias: the layer's own, or None.
    """

    def __init__(
        self, width_in: int, width_out: int, held: Held, how: QuantizationRecipe, bias: nn.Parameter | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = width_in, width_out
        self.method, self.compute_dtype = how.method, COMPUTE[how.compute_dtype]
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


def quantize_blocks(model: PreTrainedModel, prefix: str, checkpoint: Checkpoint, how: QuantizationRecipe) -> None:
    """Put a `QuantizedLinear` in the place of every linear layer inside a model's blocks, one weight after another.

    Args:
        model: without its weights; biases stay as they are.
        prefix: of the names of what is in its blocks.
        checkpoint: where the weights are read.
        how: the method.

    Raises:
        CheckpointError: a weight is missing or misshapen.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear | Conv1D)
    }
    checkpoint.require({f"{name}.weight": tuple(module.weight.shape) for name, module in linear.items()})
    for name, module in linear.items():
        wide, narrow = widths(module)
        rows = _rows(checkpoint, f"{name}.weight", module)
        layer = QuantizedLinear(wide, narrow, quantized(rows, (narrow, wide), how), how, module.bias)
        model.set_submodule(name, layer)


def round_weight(module: nn.Module, how: QuantizationRecipe) -> None:
    """Give an ordinary linear layer the weight that a `QuantizedLinear` in its place would multiply with."""
    weight, turned = module.get_parameter("weight").data, isinstance(module, Conv1D)
    weight_OD = weight.t().contiguous() if turned else weight
    narrow, wide = weight_OD.shape
    layer = QuantizedLinear(wide, narrow, quantized(_pieces(weight_OD), (narrow, wide), how), how)
    rounded_OD = layer.dequantized(weight.dtype)
    weight.copy_(rounded_OD.t() if turned else rounded_OD)


def widths(module: nn.Module) -> tuple[int, int]:
    """Width in and width out of a linear layer; GPT-2's Conv1D is stored transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    wide, narrow = module.get_parameter("weight").shape
    return wide, narrow


def quantized(rows: Iterable[torch.Tensor], shape: tuple[int, int], how: QuantizationRecipe) -> Held:
    """A weight in fewer bits; the same whatever pieces it comes in.

    Args:
        rows: pieces of the weight [O, D], each of a multiple of 64 rows but the last.
        shape: O and D.
        how: the method.
    """
    if how.method == "int8":
        return _int8(rows, shape)
    held = _nf4(rows, shape)
    return {"codes": held["codes"], **_doubled(held["scales"])} if how.double else held


def _int8(rows: Iterable[torch.Tensor], shape: tuple[int, int]) -> Held:
    codes_OD, scales_O, done = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0]), 0
    for piece in rows:
        stop = done + piece.shape[0]
        codes_OD[done:stop], scales_O[done:stop], _ = library().int8_vectorwise_quant(piece.to(torch.float16))
        done = stop
    return {"codes": codes_OD, "scales": scales_O}


def _nf4(rows: Iterable[torch.Tensor], shape: tuple[int, int]) -> Held:
    blocks, done = -(-shape[0] * shape[1] // BLOCK), 0
    codes, scales_K = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8), torch.empty(blocks)
    for piece in rows:
        numbers = F.pad(piece.reshape(-1).to(torch.float32), (0, -piece.numel() % BLOCK))
        packed, state = library().quantize_4bit(numbers, blocksize=BLOCK, quant_type="nf4")
        stop = done + state.absmax.numel()
        codes[done * BLOCK // 2 : stop * BLOCK // 2], scales_K[done:stop] = packed.reshape(-1), state.absmax
        done = stop
    return {"codes": codes, "scales": scales_K}


def _doubled(scales_K: torch.Tensor) -> Held:
    """Scales in 8 bits around their mean."""
    offset = scales_K.mean()
    inner_K, state = library().quantize_blockwise(scales_K - offset, blocksize=OUTER_BLOCK)
    return {"scales": inner_K, "outer_scales": state.absmax, "offset": offset}


def _rows(checkpoint: Checkpoint, name: str, module: nn.Module) -> Iterator[torch.Tensor]:
    """A weight [O, D] in pieces; one that is stored [D, O] is in memory as a whole, once."""
    wide, narrow = widths(module)
    if isinstance(module, nn.Linear):
        yield from checkpoint.pieces(name, (narrow, wide), PIECE_BYTES, BLOCK)
        return
    whole_OD, done = None, 0
    for piece in checkpoint.pieces(name, (wide, narrow), PIECE_BYTES, BLOCK):
        whole_OD = torch.empty(narrow, wide, dtype=piece.dtype) if whole_OD is None else whole_OD
        whole_OD[:, done : done + piece.shape[0]] = piece.t()
        done += piece.shape[0]
    if whole_OD is not None:
        yield from _pieces(whole_OD)


def _pieces(weight_OD: torch.Tensor) -> Iterator[torch.Tensor]:
    step = max(1, PIECE_BYTES // (weight_OD.shape[1] * weight_OD.element_size() * BLOCK)) * BLOCK
    yield from torch.split(weight_OD, step)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@cache
def _table(device: torch.device) -> torch.Tensor:
    """The numbers that quantised scales stand for; one table for all layers."""
    table: torch.Tensor = library().create_dynamic_map().to(device)
    return table
