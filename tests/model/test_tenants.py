"""Many adapters on one base: each row uses its tenant's, and each tenant gets its own gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from splitllm import Shard
from splitllm.model.joined import Joined, Rows
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import adapter_parameters, add_lora, matched_modules
from splitllm.model.quantizing import widths
from splitllm.model.randomness import DropoutKey, MicroBatchId
from splitllm.model.tenants import LowRank, TenantLinear, Tenants
from splitllm.recipe import LoraRecipe
from tests.families import CONFIGS, checkpoint_folder

IN, OUT, LONGEST = 6, 4, 5
CPU = torch.device("cpu")


def layer(ranks: list[int], bias: bool = True) -> TenantLinear:
    torch.manual_seed(1)
    module = TenantLinear(nn.Linear(IN, OUT, bias=bias).double().requires_grad_(False), "m", 0, DropoutKey(0))
    for client, rank in enumerate(ranks):
        a_RD, b_OR = (nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((rank, IN), (OUT, rank)))
        module.tenants[client] = LowRank(a_RD, b_OR, scale=0.5 + client, dropout=0.0)
    return module


def batch(module: TenantLinear, clients: list[tuple[int, int]]) -> torch.Tensor:
    """Of each (client, rows) in turn; returns its input."""
    members = [Rows(MicroBatchId(0, c, n), (LONGEST,) * rows) for n, (c, rows) in enumerate(clients)]
    module.key.begin(Joined(tuple(members)))
    rows = sum(rows for _, rows in clients)
    return torch.randn(rows, LONGEST, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


BATCHES = {
    "one tenant": [(1, 3)],
    "a row each": [(0, 1), (1, 1), (2, 1)],
    "rows of each": [(0, 2), (1, 3), (2, 1)],
    "one twice": [(0, 1), (2, 2), (0, 2)],
    "as many rows of each": [(0, 2), (1, 2), (2, 2)],
    "in turn": [(0, 1), (1, 1), (0, 1), (1, 1)],
}


@pytest.mark.parametrize("clients", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("ranks", [[2, 2, 2], [1, 4, 2]])
def test_every_row_is_that_of_its_tenant_alone_and_so_is_every_gradient(
    ranks: list[int], clients: list[tuple[int, int]]
) -> None:
    module = layer(ranks)
    x_BSD = batch(module, clients).requires_grad_()
    out_BSO = module(x_BSD)
    wanted, row = [], 0
    for client, rows in clients:
        own, part = module.tenants[client], x_BSD[row : row + rows]
        wanted.append(module.base_layer(part) + F.linear(F.linear(part, own.a_RD), own.b_OR) * own.scale)
        row += rows
    torch.testing.assert_close(out_BSO, torch.cat(wanted), rtol=1e-13, atol=1e-13)
    there = {client for client, _ in clients}
    leaves = [x_BSD, *(p for c in sorted(there) for p in (module.tenants[c].a_RD, module.tenants[c].b_OR))]
    found = torch.autograd.grad(out_BSO.sin().sum(), leaves)
    expected = torch.autograd.grad(torch.cat(wanted).sin().sum(), leaves)
    for got, known in zip(found, expected, strict=True):
        torch.testing.assert_close(got, known, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_what_one_tenant_sends_reaches_nobody_elses_rows_or_gradients(value: float) -> None:
    module = layer([2, 3, 2])
    x_BSD = batch(module, [(0, 2), (1, 1), (2, 2)])
    others = [module.tenants[client] for client in (0, 2)]
    leaves = [parameter for own in others for parameter in (own.a_RD, own.b_OR)]
    clean = torch.autograd.grad(module(x_BSD)[[0, 1, 3, 4]].square().sum(), leaves)
    x_BSD[2] = value
    out_BSO = module(x_BSD)
    spoiled = torch.autograd.grad(out_BSO.square().sum(), leaves)
    for tensor, other in zip(clean, spoiled, strict=True):
        torch.testing.assert_close(other, tensor, rtol=1e-13, atol=1e-13)


def test_half_precision_bases_have_fp32_adapters_and_give_their_own_dtype() -> None:
    module = TenantLinear(nn.Linear(IN, OUT).bfloat16().requires_grad_(False), "m", 0, DropoutKey(0))
    for client in range(2):
        module.tenants[client] = LowRank(nn.Parameter(torch.ones(2, IN)), nn.Parameter(torch.ones(OUT, 2)), 1.0, 0.0)
    x_BSD = batch(module, [(0, 1), (1, 1)]).bfloat16()
    assert module(x_BSD).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_tenant_starts_as_a_shared_adapter_does_and_has_its_names(family: str) -> None:
    modules = matched_modules(CONFIGS[family](), None)
    shards = [Shard.cut(Checkpoint(checkpoint_folder(family)), 2, 5) for _ in range(2)]
    add_lora(shards[0], LoraRecipe(rank=4), modules, seed=3)
    tenants = Tenants(shards[1], modules, range(6), seed=3)
    mine = tenants.add(0, 0, LoraRecipe(rank=4), torch.float64, CPU)
    theirs = adapter_parameters(shards[0])
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], parameter) for name, parameter in theirs.items())
    deeper = tenants.add(1, 3, LoraRecipe(rank=2), torch.float64, CPU)
    assert {int(name.split(".")[4]) for name in deeper} == {3, 4}
    assert {parameter.shape[0] for name, parameter in deeper.items() if ".lora_A." in name} == {2}


def test_only_blocks_that_are_tenants_own_are_replaced() -> None:
    shard = Shard.cut(Checkpoint(checkpoint_folder("llama")), 1, 5)
    Tenants(shard, matched_modules(CONFIGS["llama"](), None), range(3), seed=0)
    held = {int(name.split(".")[2]) for name, module in shard.model.named_modules() if isinstance(module, TenantLinear)}
    assert held == {1, 2}


def test_widths_of_gpt2s_transposed_layers() -> None:
    assert widths(nn.Linear(IN, OUT)) == widths(Conv1D(OUT, IN)) == (IN, OUT)


def test_one_who_is_lost_and_steps_meanwhile_changes_nobody_elses_gradient() -> None:
    module = layer([2, 3])
    x_BSD, mine = batch(module, [(0, 1), (1, 1)]).requires_grad_(), module.tenants[1]
    expected = torch.autograd.grad(module(x_BSD)[1].square().sum(), [x_BSD, mine.a_RD, mine.b_OR])
    out_BSO = module(x_BSD)
    with torch.no_grad():
        module.tenants[0].a_RD.add_(1.0)
        module.tenants[0].b_OR.mul_(2.0)
    found = torch.autograd.grad(out_BSO[1].square().sum(), [x_BSD, mine.a_RD, mine.b_OR])
    assert all(torch.equal(got, known) for got, known in zip(found, expected, strict=True))


def test_a_tenants_gradient_holds_no_memory_of_its_batch_mates() -> None:
    module = layer([2, 2, 2, 2])
    module(batch(module, [(client, 1) for client in range(4)])).sum().backward()
    for own in module.tenants.values():
        assert own.a_RD.grad is not None and own.b_OR.grad is not None
        assert own.a_RD.grad.untyped_storage().nbytes() == own.a_RD.nbytes
        assert own.b_OR.grad.untyped_storage().nbytes() == own.b_OR.nbytes
