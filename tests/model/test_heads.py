"""The loss equals plain cross-entropy over all logits, and never holds more than a chunk of them."""

from __future__ import annotations

import copy
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from splitllm import Shard
from splitllm.model import heads
from splitllm.model.heads import Head
from splitllm.model.loading import Checkpoint
from tests.families import checkpoint_folder

WIDTH, WORDS, ROWS = 8, 13, 23
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft-cap": {"final_logit_softcapping": 3.0},
    "multiplier": {"logit_scale": 0.25},
    "divisor": {"logits_scaling": 8.0},
    "bias": {"bias": True},
    "all": {"final_logit_softcapping": 2.0, "logit_scale": 1.5, "logits_scaling": 0.5, "bias": True},
}


def head_of(dtype: torch.dtype = torch.float64, *, bias: bool = False, **config: float) -> Head:
    torch.manual_seed(1)
    norm, output = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=bias)
    for parameter in [*norm.parameters(), *output.parameters()]:
        nn.init.normal_(parameter)
    return Head(norm, output, SimpleNamespace(tie_word_embeddings=False, **config)).to(dtype).requires_grad_(False)


def rows(count: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden_ND = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden_ND, torch.randint(0, WORDS, (count,), generator=generator)


def plain(head: Head, hidden_ND: torch.Tensor, targets_N: torch.Tensor, **config: float) -> torch.Tensor:
    """The loss written down in one piece, from the definitions of the families."""
    logits_NV = F.linear(head.norm(hidden_ND), head.output.weight, head.output.bias)
    logits_NV = logits_NV * config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)
    if "final_logit_softcapping" in config:
        logits_NV = config["final_logit_softcapping"] * torch.tanh(logits_NV / config["final_logit_softcapping"])
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")


@pytest.mark.parametrize("positions", [1, 2, 5, ROWS, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_equal_plain_cross_entropy(
    shape: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "CHUNK_BYTES", positions * WORDS * 8)
    head, (hidden_ND, targets_N) = head_of(**SHAPES[shape]), rows()
    weighted, nats_N = head.loss(hidden_ND, targets_N, 0.37)
    total = nats_N.sum()
    expected = plain(head, hidden_ND, targets_N, **SHAPES[shape])
    (got,) = torch.autograd.grad(weighted * 2.5, hidden_ND)
    (wanted,) = torch.autograd.grad(expected * 0.37 * 2.5, hidden_ND)
    assert float(total) == pytest.approx(expected.item(), rel=1e-12)
    assert weighted.item() == pytest.approx(0.37 * expected.item(), rel=1e-12)
    assert not nats_N.requires_grad and nats_N.shape == targets_N.shape
    assert float(wanted.abs().max()) > 1e-2
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_gradient_the_loss_is_the_same(shape: str) -> None:
    head, (hidden_ND, targets_N) = head_of(**SHAPES[shape]), rows()
    weighted, nats_N = head.loss(hidden_ND.detach(), targets_N)
    assert not weighted.requires_grad
    assert torch.equal(weighted, nats_N.sum()) and torch.equal(nats_N, head.loss(hidden_ND, targets_N)[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_positions_may_weigh_differently(shape: str, dtype: torch.dtype) -> None:
    head, (hidden_ND, targets_N) = head_of(dtype, **SHAPES[shape]), rows(dtype=dtype)
    weight_N = torch.tensor([0.25] * 5 + [2.0] * (ROWS - 5), dtype=torch.float64)
    together, _ = head.loss(hidden_ND, targets_N, weight_N)
    parts = [head.loss(hidden_ND[:5], targets_N[:5], 0.25)[0], head.loss(hidden_ND[5:], targets_N[5:], 2.0)[0]]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    assert float(together.detach()) == pytest.approx(float(sum(parts).detach()), rel=tolerance)
    (got,), (wanted,) = (torch.autograd.grad(loss, hidden_ND) for loss in (together, parts[0] + parts[1]))
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_labels_cost_nothing(shape: str, dtype: torch.dtype) -> None:
    head, (hidden_ND, targets_N) = head_of(dtype, **SHAPES[shape]), rows(0, dtype)
    weighted, nats_N = head.loss(hidden_ND, targets_N, 0.5)
    (gradient_ND,) = torch.autograd.grad(weighted, hidden_ND)
    assert weighted.item() == 0.0 and nats_N.shape == (0,) and gradient_ND.shape == (0, WIDTH)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_never_more_than_one_chunk_of_logits_is_alive(
    shape: str, dtype: torch.dtype, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "CHUNK_BYTES", 5 * WORDS * max(4, dtype.itemsize))
    head, (hidden_ND, targets_N) = head_of(dtype, **SHAPES[shape]), rows(dtype=dtype)
    counts: list[int] = []
    earlier: list[weakref.ref[torch.Tensor]] = []
    forward = head.output.forward

    def spy(hidden_CD: torch.Tensor) -> torch.Tensor:
        assert all(logits() is None for logits in earlier)
        logits_CV = forward(hidden_CD)
        counts.append(len(hidden_CD))
        earlier.append(weakref.ref(logits_CV))
        return logits_CV

    monkeypatch.setattr(head.output, "forward", spy)
    monkeypatch.setattr(Head, "is_plain", lambda *_: False)  # that path works in the same memory again: next test
    _, nats_N = head.loss(hidden_ND if gradient else hidden_ND.detach(), targets_N)
    assert all(logits() is None for logits in earlier)
    assert counts == [5, 5, 5, 5, 3] and bool((nats_N > 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_plain_chunks_equal_autograd_to_the_bit_and_share_one_scratch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "CHUNK_BYTES", 5 * WORDS * max(4, dtype.itemsize))
    head, (hidden_ND, targets_N) = head_of(dtype, **SHAPES["plain"]), rows(dtype=dtype)
    assert head.is_plain(hidden_ND)
    replica = copy.deepcopy(head)
    results = []
    for role, plain_path in ((head, True), (replica, True), (head, False)):
        monkeypatch.setattr(Head, "is_plain", lambda *_, plain_path=plain_path: plain_path)
        weighted, nats_N = role.loss(hidden_ND, targets_N, weight=0.037)
        results.append((nats_N.sum(), torch.autograd.grad(weighted, hidden_ND)[0]))
    (total, gradient), again, (other_total, other) = results
    assert torch.equal(gradient, other) and torch.equal(gradient, again[1])
    assert float(total) == pytest.approx(float(other_total), rel=1e-6)
    held = head.scratch._flat.values()
    assert head.scratch is replica.scratch and sum(flat.nbytes for flat in held) == 2 * 5 * WORDS * dtype.itemsize


@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_close(shape: str) -> None:
    head, (hidden_ND, targets_N) = head_of(torch.bfloat16, **SHAPES[shape]), rows(dtype=torch.bfloat16)
    loss, _ = head.loss(hidden_ND, targets_N)
    (got,) = torch.autograd.grad(loss, hidden_ND)
    wide_ND = hidden_ND.detach().double().requires_grad_()
    expected = plain(head.double(), wide_ND, targets_N, **SHAPES[shape])
    (wanted,) = torch.autograd.grad(expected, wide_ND)
    assert loss.dtype == torch.float32 and got.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 5e-2


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("gemma2", True), ("cohere", True)])
def test_heads_of_families_equal_their_own_logits(family: str, tied: bool) -> None:
    shard = Shard.cut(Checkpoint(checkpoint_folder(family)), 5, 6)
    head = shard.head
    assert head is not None and head.tied == tied
    generator = torch.Generator().manual_seed(3)
    hidden_ND = torch.randn(9, 32, generator=generator, dtype=torch.float64)
    targets_N = torch.randint(0, 61, (9,), generator=generator)
    expected = F.cross_entropy(head.logits(hidden_ND), targets_N, reduction="sum")
    assert float(head.loss(hidden_ND, targets_N)[1].sum()) == pytest.approx(float(expected), rel=1e-12)
