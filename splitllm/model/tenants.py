"""Many adapters on one frozen base: the product with the base once for all tokens, the low-rank part by tenant.

A tenant is a client as its servers see it. Its rows of a batch use its own A and B; gradients reach nobody else's.
The low-rank products are those of S-LoRA and Punica (arXiv 2311.03285, 2310.18547), for training: adapters are stacked,
padded to the largest rank, and multiplied as one batched product over rows.

Shape suffixes: B rows, S padded length, D width in, O width out, R rank, K tenants in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from splitllm.model.dropout import dropped
from splitllm.model.joined import Rows
from splitllm.model.lora import ADAPTER, block_of, initial_a, peft_name, scaling_of
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
        return F.linear(F.linear(x_BSD, only.a_RD), only.b_OR) * only.scale
    rank = max(adapter.a_RD.shape[0] for adapter in distinct)
    a_KRD = torch.stack([F.pad(each.a_RD, (0, 0, 0, rank - each.a_RD.shape[0])) for each in distinct])
    b_KOR = torch.stack([F.pad(each.b_OR * each.scale, (0, rank - each.b_OR.shape[1])) for each in distinct])
    places = {id(adapter): place for place, adapter in enumerate(distinct)}
    of_rows = [places[id(a)] for a, member in zip(adapters, members, strict=True) for _ in member.lengths]
    if of_rows != list(range(len(distinct))):
        index_B = torch.tensor(of_rows, device=x_BSD.device)
        a_KRD, b_KOR = a_KRD.index_select(0, index_B), b_KOR.index_select(0, index_B)
    return torch.bmm(torch.bmm(x_BSD, a_KRD.transpose(1, 2)), b_KOR.transpose(1, 2))


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

    def remove(self, client: int) -> None:
        """Forget a tenant's adapter."""
        for layer in self._layers.values():
            layer.tenants.pop(client, None)

    def _parameters(self, client: int) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self._layers.items():
            if (adapter := layer.tenants.get(client)) is not None:
                yield from zip(_names(name), (adapter.a_RD, adapter.b_OR), strict=True)


def widths(layer: nn.Module) -> tuple[int, int]:
    """Width in and width out of a linear layer; GPT-2's Conv1D is stored transposed."""
    weight = layer.get_parameter("weight")
    rows, columns = weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def _names(module: str) -> tuple[str, str]:
    """A and B of a module in an adapter file."""
    return peft_name(f"{module}.lora_A.{ADAPTER}.weight"), peft_name(f"{module}.lora_B.{ADAPTER}.weight")
