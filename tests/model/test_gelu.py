"""GPT-2's activation that keeps its input alone: the bits of transformers' own, forward and backward."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import NewGELUActivation

from splitllm.model.gelu import LeanGelu
from splitllm.model.loading import Checkpoint
from splitllm.model.shard import Shard
from tests.families import checkpoint_folder


def both(x: torch.Tensor, gradient: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output and gradient of the input, behind another operation as in a model."""
    found = []
    for module in (NewGELUActivation(), LeanGelu()):
        leaf = x.detach().clone().requires_grad_()
        out = module(leaf * 1.0)
        out.backward(gradient.to(out.dtype))
        assert leaf.grad is not None
        found.append((out.detach(), leaf.grad))
    return found


@given(
    st.integers(0, 999),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from([1e-30, 1e-3, 1.0, 5.0, 1e4]),
)
def test_the_bits_are_those_of_transformers(seed: int, dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, gradient = (torch.randn(7, 33, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    plain, lean = both(x * size, gradient)
    assert _same(plain, lean)


def _same(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and a.dtype == b.dtype for a, b in pairs)


def test_under_autocast_too() -> None:
    x, gradient = torch.randn(5, 8), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        plain, lean = both(x.bfloat16(), gradient)
    assert _same(plain, lean)


def test_nothing_but_the_input_is_kept() -> None:
    kept: list[int] = []
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        LeanGelu()(x)
    assert kept == [x.data_ptr()]


def test_a_shard_of_gpt2_has_it_in_all_its_blocks() -> None:
    shard = Shard.cut(Checkpoint(checkpoint_folder("gpt2")), 1, 4)
    assert sum(isinstance(module, LeanGelu) for module in shard.modules()) == 3
    assert not any(type(module) is NewGELUActivation for module in shard.modules())
