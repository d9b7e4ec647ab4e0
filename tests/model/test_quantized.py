"""Quantised layers: bitsandbytes' codes whatever the pieces, and products and gradients of what they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from splitllm import Shard
from splitllm.errors import CheckpointError
from splitllm.model import quantizing
from splitllm.model.loading import Checkpoint
from splitllm.model.quantized import QuantizedLinear
from splitllm.model.quantizing import quantized, round_weight
from splitllm.recipe import QuantizationRecipe
from tests.families import checkpoint_folder
from tests.quantized import METHODS, stands_for

SHAPES = [(48, 32), (96, 64), (24, 80), (31, 33), (130, 176), (7, 5)]
WIDE = (4, 300)


def recipe(method: str, compute: str | None = None) -> QuantizationRecipe:
    return QuantizationRecipe.model_validate({**METHODS[method], "compute_dtype": compute})


def weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.1


def layer(
    method: str, shape: tuple[int, int], *, bias: bool = True, compute: str | None = None
) -> tuple[QuantizedLinear, torch.Tensor]:
    """A layer and, in fp64, the weight that it stands for."""
    how, weight_OD = recipe(method, compute), weight(shape)
    held = quantized([weight_OD], shape, how)
    offset = nn.Parameter(torch.randn(shape[0]), requires_grad=False) if bias else None
    return QuantizedLinear(shape[1], shape[0], held, how, offset), stands_for(weight_OD, method)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_weight_is_what_its_codes_stand_for(method: str, shape: tuple[int, int]) -> None:
    found, wanted_OD = layer(method, shape)
    torch.testing.assert_close(found.dequantized(torch.float32).double(), wanted_OD, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.dequantized(torch.bfloat16).double(), wanted_OD, rtol=2**-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_those_of_bitsandbytes_own_layers(dtype: torch.dtype) -> None:
    weight_OD = weight((96, 200)).to(dtype)
    four = Params4bit(weight_OD.clone(), quant_type="nf4", compress_statistics=True).to("cpu")
    held = quantized([weight_OD], (96, 200), recipe("nf4 double"))
    assert torch.equal(held["codes"], four.data.reshape(-1))
    assert torch.equal(held["scales"], four.quant_state.absmax)
    assert torch.equal(held["outer_scales"], four.quant_state.state2.absmax)
    assert torch.equal(held["offset"], four.quant_state.offset)
    eight = Int8Params(weight_OD.clone(), requires_grad=False).to("cpu")
    held = quantized([weight_OD], (96, 200), recipe("int8"))
    assert torch.equal(held["codes"], eight.data) and torch.equal(held["scales"], eight.SCB)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_pieces_of_any_size_give_the_codes_of_the_whole(
    method: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = []
    for size in (1, 2**20):
        monkeypatch.setattr(quantizing, "PIECE_BYTES", size)
        checkpoint = Checkpoint(checkpoint_folder(family))
        shards.append(Shard.cut(checkpoint, 1, 3, dtype=torch.float32, quantization=recipe(method)))
    layers = [dict(shard.named_modules()) for shard in shards]
    found = [name for name, module in layers[0].items() if isinstance(module, QuantizedLinear)]
    assert len(found) == {"gpt2": 8, "llama": 14}[family]
    for name in found:
        for (key, one), other in zip(layers[0][name].named_parameters(), layers[1][name].parameters(), strict=True):
            assert torch.equal(one, other), (name, key)


@pytest.mark.parametrize("shape", [*SHAPES, WIDE])
@pytest.mark.parametrize("method", METHODS)
def test_products_and_gradients_are_those_of_the_dequantised_weight(method: str, shape: tuple[int, int]) -> None:
    found, wanted_OD = layer(method, shape)
    x = torch.randn(2, 5, shape[1], requires_grad=True)
    upper = torch.randn(2, 5, shape[0])
    out = found(x)
    out.backward(upper)
    assert found.bias is not None and x.grad is not None
    expected = x.detach().double() @ wanted_OD.T + found.bias.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), upper.double() @ wanted_OD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_errs_by_rounding_alone(method: str) -> None:
    found, wanted_OD = layer(method, (96, 128))
    x = torch.randn(4, 3, 128).bfloat16().requires_grad_()
    out = found(x)
    assert out.dtype == torch.bfloat16
    out.backward(torch.ones_like(out))
    assert x.grad is not None and found.bias is not None
    for got, known in (
        (out, x.detach().double() @ wanted_OD.T + found.bias.double()),
        (x.grad, torch.ones(4, 3, 96).double() @ wanted_OD),
    ):
        assert float((got.double() - known).abs().max() / known.abs().max()) < 2**-7


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_computes_as_training_does_and_leaves_no_trace(method: str) -> None:
    found, _ = layer(method, (96, 64))  # 96 and 64: sizes that bitsandbytes' own layer repacks in evaluation
    held = {name: parameter.clone() for name, parameter in found.named_parameters()}
    x = torch.randn(3, 64, requires_grad=True)
    (before,) = torch.autograd.grad(found.train()(x).square().sum(), x)
    with torch.no_grad():
        assert torch.equal(found.eval()(x), found.train()(x))
    (after,) = torch.autograd.grad(found.train()(x).square().sum(), x)
    assert torch.equal(before, after) and float(after.abs().max()) > 0
    assert all(torch.equal(parameter, held[name]) for name, parameter in found.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_rows_do_not_depend_on_what_else_is_in_the_batch(method: str) -> None:
    found, _ = layer(method, (96, 64))
    x = torch.randn(4, 64)
    alone = found(x[:2])
    x[2:] *= 1e4
    torch.testing.assert_close(found(x)[:2], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_kept_for_the_backward(method: str) -> None:
    found, _ = layer(method, (96, 64))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = found(torch.randn(3, 64, requires_grad=True))
    assert not kept
    node = out.grad_fn
    assert node is not None
    held = [value for value in vars(node).values() if isinstance(value, torch.Tensor)]
    assert not held, "an input on the context is kept even where activations are checkpointed"


@pytest.mark.parametrize("compute", [None, "float32", "bfloat16"])
def test_under_autocast_the_answer_is_of_its_dtype_and_the_product_of_the_recipes(compute: str | None) -> None:
    found, wanted_OD = layer("nf4", (96, 64), bias=False, compute=compute)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = found(x)
    assert out.dtype == torch.bfloat16 and found(x).dtype == torch.float32
    exact = (x.double() @ wanted_OD.T).to(torch.bfloat16)
    assert torch.equal(out, exact) == (compute == "float32")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_an_ordinary_layer_gets_the_weight_that_a_quantised_one_has(method: str, turned: bool) -> None:
    weight_OD = weight((96, 80))
    plain: nn.Module = Conv1D(96, 80) if turned else nn.Linear(80, 96)
    plain.get_parameter("weight").data.copy_(weight_OD.t() if turned else weight_OD)
    round_weight(plain, recipe(method))
    found_OD = plain.get_parameter("weight").data.t() if turned else plain.get_parameter("weight").data
    torch.testing.assert_close(found_OD.double(), stands_for(weight_OD, method), rtol=1e-6, atol=1e-8)


def test_zeros_stay_zeros() -> None:
    for method in METHODS:
        how, zeros_OD = recipe(method), torch.zeros(4, 64)
        found = QuantizedLinear(64, 4, quantized([zeros_OD], (4, 64), how), how)
        assert torch.equal(found.dequantized(torch.float32), zeros_OD)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_only_linear_layers_of_its_own_blocks_are_quantised(family: str) -> None:
    checkpoint = Checkpoint(checkpoint_folder(family))
    plain = Shard.cut(checkpoint, 2, 6, head=True, dtype=torch.float32)
    shard = Shard.cut(checkpoint, 2, 6, head=True, dtype=torch.float32, quantization=recipe("nf4"))
    parameters = dict(plain.named_parameters())
    small = {name for name, p in shard.named_parameters() if p.dtype == torch.uint8}
    assert small and all(name.endswith(".weight") and parameters[name].dim() == 2 for name in small)
    for name, parameter in parameters.items():
        if parameter.dim() == 1 or not name.startswith("model.") or ".bias" in name:
            assert torch.equal(shard.get_parameter(name), parameter), name
    assert shard.head is not None and plain.head is not None
    assert torch.equal(shard.head.output.weight, plain.head.output.weight)


def test_another_roles_copy_has_the_same_memory() -> None:
    shard = Shard.cut(
        Checkpoint(checkpoint_folder("llama")), 1, 3, quantization=recipe("nf4 double"), dtype=torch.float32
    )
    for one, other in zip(shard.parameters(), shard.replica().parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    source = checkpoint_folder("llama")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        Shard.cut(Checkpoint(tmp_path), 1, 3, quantization=recipe("int8"))


def test_why_weights_are_decoded_as_rows_of_one_block() -> None:
    """On AVX-512 bitsandbytes 0.50.2 decodes rows of 16 n numbers that are no whole blocks wrongly."""
    packed, state = functional.quantize_4bit(weight((24, 80)), blocksize=64, quant_type="nf4")
    found, wanted_OD = layer("nf4", (24, 80))
    error = float((functional.dequantize_4bit(packed, state) - wanted_OD).abs().max())
    if error < 1e-6:
        pytest.skip("this CPU or this bitsandbytes decodes them right")
    assert float((found.dequantized(torch.float32) - wanted_OD).abs().max()) < 1e-6 < error


def test_why_the_layer_is_not_that_of_bitsandbytes() -> None:
    """On AVX512-BF16 an evaluation leaves its own one without a gradient."""
    options = {"bias": False, "quant_type": "nf4", "compress_statistics": False, "compute_dtype": torch.float32}
    theirs = Linear4bit(64, 96, **options)
    if not theirs.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no path that is for evaluation alone")
    theirs.load_state_dict({"weight": weight((96, 64))})
    theirs, (ours, _), x = theirs.to("cpu"), layer("nf4", (96, 64), bias=False), torch.randn(3, 64, requires_grad=True)
    (before,) = torch.autograd.grad(theirs.train()(x).square().sum(), x)
    with torch.no_grad():
        theirs.eval()(x.detach()), ours.eval()(x.detach())
    (after,) = torch.autograd.grad(ours.train()(x).square().sum(), x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(theirs.train()(x).square().sum(), x)
