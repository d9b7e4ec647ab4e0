"""Weights in fewer bits, from a checkpoint piece by piece: no more than one of them is in memory as it was stored.

Shape suffixes: D width in, O width out, K blocks of 64 numbers of a weight, row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitllm.model.loading import Checkpoint
from splitllm.model.quantized import BLOCK, OUTER_BLOCK, Held, QuantizedLinear, library
from splitllm.recipe import QuantizationRecipe

PIECE_BYTES = 2**20  # of a stored weight that are quantised at once


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
    assert isinstance(module, Conv1D)
    return module.nx, module.nf


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
