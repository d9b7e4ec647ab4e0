"""Many adapters on one frozen base: the product with the base once for all tokens, the low-rank part by tenant.

A tenant is a client as its servers see it. Its rows of a batch use its own A and B; gradients reach nobody else's.
The low-rank products are those of S-LoRA and Punica (arXiv 2311.03285, 2310.18547), for training: adapters are stacked,
padded to the largest rank, and multiplied as one batched product over rows.

Shape suffixes: B rows, S padded length, D width in, O width out, R rank, K tenants in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from splitllm.model.dropout import dropped
from splitllm.model.joined import Rows
from splitllm.model.lora import ADAPTER, block_of, initial_a, peft_name, scaling_of
from splitllm.model.quantizing import widths
from splitllm.model.randomness import DropoutKey
from splitllm.model.shard import Shard
from splitllm.recipe import LoraRecipe


@dataclass(frozen=True)
class LowRank:
    """One tenant's adapter of one module: A [R, D] and B [O, R], its scale and its dropout rate."""

    a_RD: nn.Parameter
    b_OR: nn.Parameter
    scale: float
    dropout: float


class TenantLinear(nn.Module):
    """A frozen linear layer with a low-rank part for every tenant.

    Args:
        base_layer: the frozen layer.
        name: of the module in the whole model.
        layer: its global block.
        key: of the shard; says whose rows are in the batch.
    """

    def __init__(self, base_layer: nn.Module, name: str, layer: int, key: DropoutKey) -> None:
        super().__init__()
        self.base_layer, self.name, self.layer, self.key = base_layer, name, layer, key
        self.tenants: dict[int, LowRank] = {}

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """The base's product, and each tenant's own on its rows."""
        out_BSO: torch.Tensor = self.base_layer(x_BSD)
        assert self.key.joined is not None, "whose rows are in the batch is set before the blocks run"
        members = self.key.joined.at(self.layer)
        adapters = [self.tenants[member.micro_batch.client] for member in members]
        x_BSD = x_BSD.to(adapters[0].a_RD.dtype)
        if self.training:
            x_BSD = dropped(x_BSD, members, lambda client: self.tenants[client].dropout, self.key.seed, self.name)
        return (out_BSO + low_rank(x_BSD, members, adapters)).to(out_BSO.dtype)


def low_rank(x_BSD: torch.Tensor, members: Sequence[Rows], adapters: Sequence[LowRank]) -> torch.Tensor:
    """Every member's x A^T B^T, scaled, on its rows.

    Args:
        x_BSD: the rows of the members, one after another.
        members: whose they are.
        adapters: of each member; of one tenant the same object.
    """
    distinct = list({id(adapter): adapter for adapter in adapters}.values())
    if len(distinct) == 1:
        (only,) = distinct
        return F.linear(F.linear(x_BSD, only.a_RD) * only.scale, only.b_OR)
    places = {id(adapter): place for place, adapter in enumerate(distinct)}
    of_rows = [places[id(a)] for a, member in zip(adapters, members, strict=True) for _ in member.lengths]
    parameters = [*(each.a_RD for each in distinct), *(each.b_OR for each in distinct)]
    groups = _Groups(tuple(each.scale for each in distinct), tuple(of_rows))
    out_BSO: torch.Tensor = _Stacked.apply(x_BSD, groups, *parameters)  # type: ignore[no-untyped-call]
    return out_BSO


@dataclass(frozen=True)
class _Groups:
    """Which rows are multiplied as one product: all of a tenant where all have equally many in a line, else each.

    Attributes:
        scales: of each tenant.
        of_rows: the tenant of each row.
    """

    scales: tuple[float, ...]
    of_rows: tuple[int, ...]

    def index(self, device: torch.device) -> torch.Tensor | None:
        """The tenant of each product; None where each tenant has one."""
        tenants, rows = len(self.scales), len(self.of_rows)
        if rows % tenants == 0 and self.of_rows == tuple(row * tenants // rows for row in range(rows)):
            return None
        return torch.tensor(self.of_rows, device=device)

    def stacks(self, parameters: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A [G, R, D], B [G, O, R] and scale [G, 1, 1] of every product, from all A and then all B."""
        a_K, b_K = parameters[: len(self.scales)], parameters[len(self.scales) :]
        rank = max(a_RD.shape[0] for a_RD in a_K)
        a_KRD = torch.stack([_padded(a_RD, (0, 0, 0, rank - a_RD.shape[0])) for a_RD in a_K])
        b_KOR = torch.stack([_padded(b_OR, (0, rank - b_OR.shape[1])) for b_OR in b_K])
        scale_K11 = torch.tensor(self.scales, dtype=a_KRD.dtype, device=a_KRD.device).reshape(-1, 1, 1)
        index_G = self.index(a_KRD.device)
        return (a_KRD, b_KOR, scale_K11) if index_G is None else (a_KRD[index_G], b_KOR[index_G], scale_K11[index_G])

    def by_tenant(self, gradient_GXX: torch.Tensor) -> Sequence[torch.Tensor]:
        """The sums over the products of each tenant."""
        index_G = self.index(gradient_GXX.device)
        if index_G is not None:
            wide = torch.promote_types(gradient_GXX.dtype, torch.float32)
            zeros_KXX = gradient_GXX.new_zeros(len(self.scales), *gradient_GXX.shape[1:], dtype=wide)
            gradient_GXX = zeros_KXX.index_add_(0, index_G, gradient_GXX.to(wide))
        return gradient_GXX.unbind()


class _Stacked(torch.autograd.Function):
    """The products of several tenants. The stacks of their adapters are made again in the backward, not kept for it.

    Between the two nobody steps whose gradient is still to come. One who was lost in between may have begun anew and
    stepped; its rows have gradient 0, and its newer values do no harm.

    Shape suffixes: G products, P positions of one.
    """

    @staticmethod
    def forward(ctx: Any, x_BSD: torch.Tensor, groups: _Groups, *parameters: nn.Parameter) -> torch.Tensor:
        a_GRD, b_GOR, scale_G11 = groups.stacks(parameters)
        x_GPD = x_BSD.reshape(a_GRD.shape[0], -1, x_BSD.shape[2])
        inner_GPR = torch.bmm(x_GPD, a_GRD.transpose(1, 2))
        inner_GPR = (inner_GPR * scale_G11).to(inner_GPR.dtype)
        ctx.save_for_backward(x_BSD, inner_GPR, *(parameter.data for parameter in parameters))
        ctx.groups = groups
        return torch.bmm(inner_GPR, b_GOR.transpose(1, 2)).reshape(*x_BSD.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_BSD, inner_GPR, *parameters = ctx.saved_tensors
        products, positions, _ = inner_GPR.shape
        a_GRD, b_GOR, scale_G11 = ctx.groups.stacks(parameters)
        a_GRD, b_GOR = a_GRD.to(inner_GPR.dtype), b_GOR.to(inner_GPR.dtype)
        x_GPD = x_BSD.reshape(products, positions, -1).to(inner_GPR.dtype)
        upper_GPO = gradients[0].reshape(products, positions, -1)
        middle_GPR = (torch.bmm(upper_GPO, b_GOR) * scale_G11).to(inner_GPR.dtype)
        lower_BSD = (
            torch.bmm(middle_GPR, a_GRD).reshape(x_BSD.shape).to(x_BSD.dtype) if ctx.needs_input_grad[0] else None
        )
        of_a = ctx.groups.by_tenant(torch.bmm(middle_GPR.transpose(1, 2), x_GPD))
        of_b = ctx.groups.by_tenant(torch.bmm(upper_GPO.transpose(1, 2), inner_GPR))
        pairs = zip(parameters, (*of_a, *of_b), strict=True)
        return lower_BSD, None, *(_as_large_as(parameter, gradient) for parameter, gradient in pairs)


def _padded(matrix: torch.Tensor, missing: Sequence[int]) -> torch.Tensor:
    return F.pad(matrix, missing) if any(missing) else matrix


def _as_large_as(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Without the rank that it was padded to, and in memory of its own: a tenant's gradient outlives the batch."""
    rows, columns = parameter.shape
    return gradient[:rows, :columns].to(parameter.dtype, copy=True).contiguous()


class Tenants:
    """The adapters of all tenants of one shard, in the blocks whose adapter is each tenant's own.

    Args:
        shard: its adapted modules are replaced by `TenantLinear`; it must hold no adapter in these blocks yet.
        modules: global names of the modules that are adapted, of the whole model.
        blocks: the global blocks whose adapter is each tenant's own.
        seed: with each parameter's global name it draws the initial A, so that every cut and tenant starts alike.
    """

    def __init__(self, shard: Shard, modules: Sequence[str], blocks: range, seed: int) -> None:
        config = shard.model.config
        self._seed, self._layers = seed, dict[str, TenantLinear]()
        held = range(max(blocks.start, shard.start), min(blocks.stop, shard.stop))
        for name in modules:
            if (layer := block_of(config, name)) in held:
                module = TenantLinear(shard.model.get_submodule(name), name, layer, shard.key)
                self._layers[name] = module.train(shard.training)
                shard.model.set_submodule(name, module)

    def add(
        self, client: int, entry: int, lora: LoraRecipe, dtype: torch.dtype, device: torch.device
    ) -> dict[str, nn.Parameter]:
        """Let a tenant in.

        Args:
            client: its number.
            entry: its cut layer; the blocks below it are the client's.
            lora: its rank, alpha and dropout.
            dtype: of its adapter.
            device: where it trains.

        Returns:
            Its parameters, by their names in an adapter file.
        """
        assert not lora.dora, "DoRA scales the base's product: it is refused for adapters of their own"
        for name, layer in self._layers.items():
            if layer.layer < entry:
                continue
            wide, narrow = widths(layer.base_layer)
            a_RD = initial_a(_names(name)[0], (lora.rank, wide), self._seed).to(device, dtype)
            b_OR = torch.zeros(narrow, lora.rank, dtype=dtype, device=device)
            layer.tenants[client] = LowRank(nn.Parameter(a_RD), nn.Parameter(b_OR), scaling_of(lora), lora.dropout)
        return dict(self._parameters(client))

    def _parameters(self, client: int) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self._layers.items():
            if (adapter := layer.tenants.get(client)) is not None:
                yield from zip(_names(name), (adapter.a_RD, adapter.b_OR), strict=True)


def _names(module: str) -> tuple[str, str]:
    """A and B of a module in an adapter file."""
    return peft_name(f"{module}.lora_A.{ADAPTER}.weight"), peft_name(f"{module}.lora_B.{ADAPTER}.weight")
