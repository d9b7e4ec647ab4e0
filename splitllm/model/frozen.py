"""What rounds have added to frozen weights, as low-rank factors beside them: a base that others share stays as it is.

It is kept by level: what was added by rounds of a level since the last round of a higher one, which replaces it.
Shape suffixes: B rows, S padded length, D width in, O width out, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from splitllm.model.lora import peft_name
from splitllm.model.shard import Shard

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [R, D] and B [O, R]; what they add to the weight is B A."""
FROZEN = "frozen/"


class Widened(nn.Module):
    """A frozen linear layer with a frozen low-rank part.

    Args:
        base_layer: the layer.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.factors: Factors | None = None

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """The sum of both products, in the layer's dtype."""
        out_BSO: torch.Tensor = self.base_layer(x_BSD)
        if self.factors is None:
            return out_BSO
        a_RD, b_OR = self.factors
        return (out_BSO + F.linear(F.linear(x_BSD.to(a_RD.dtype), a_RD), b_OR)).to(out_BSO.dtype)


class Frozen:
    """The frozen parts of one shard.

    Args:
        shard: holds its adapter already; the layers below that are widened.
        modules: global names of the adapted modules of the whole model.
        device: where it computes.
    """

    def __init__(self, shard: Shard, modules: Sequence[str], device: torch.device) -> None:
        self._device, self._layers = device, dict[str, Widened]()
        self._by_level: dict[str, dict[int, Factors]] = {}
        for name in modules:
            layer = _adapted(shard, name)
            if layer is not None:
                widened = Widened(layer.get_submodule("base_layer"))
                layer.set_submodule("base_layer", widened)
                self._layers[peft_name(name)] = widened
                self._by_level[peft_name(name)] = {}

    @property
    def modules(self) -> list[str]:
        """By their names in an adapter file."""
        return list(self._layers)

    def below(self, module: str, level: int) -> list[Factors]:
        """What rounds of lower levels have added since the last of this one."""
        return [factors for lower, factors in sorted(self._by_level[module].items()) if lower < level]

    def of(self, module: str, level: int) -> Factors | None:
        """What rounds of one level have added since the last of a higher one."""
        return self._by_level[module].get(level)

    def put(self, module: str, level: int, factors: Factors | None) -> None:
        """From now on rounds of a level have added this, and lower ones nothing."""
        levels = {other: held for other, held in self._by_level[module].items() if other > level}
        if factors is not None:
            a_RD, b_OR = (factor.to(self._device, copy=True) for factor in factors)
            levels[level] = a_RD, b_OR
        self._by_level[module] = levels
        self._join(module)

    def state(self) -> dict[str, torch.Tensor]:
        """`frozen/LEVEL/MODULE.lora_A.weight` and B of each."""
        tensors = {}
        for module, levels in self._by_level.items():
            for level, factors in levels.items():
                for side, factor in zip("AB", factors, strict=True):
                    tensors[f"{FROZEN}{level}/{module}.lora_{side}.weight"] = factor
        return tensors

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as a `state()` tells."""
        for module in self._layers:
            self._by_level[module] = {}
            for key, a_RD in tensors.items():
                if key.startswith(FROZEN) and key.endswith(f"/{module}.lora_A.weight"):
                    level = int(key.removeprefix(FROZEN).partition("/")[0])
                    b_OR = tensors[f"{FROZEN}{level}/{module}.lora_B.weight"]
                    self._by_level[module][level] = a_RD.to(self._device), b_OR.to(self._device)
            self._join(module)

    def whole(self) -> dict[str, torch.Tensor]:
        """All that was added, `frozen/MODULE.lora_A.weight` and B of each."""
        tensors = {}
        for module, layer in self._layers.items():
            for side, factor in zip("AB", layer.factors or (), strict=False):
                tensors[f"{FROZEN}{module}.lora_{side}.weight"] = factor
        return tensors

    def _join(self, module: str) -> None:
        levels = self._by_level[module]
        held = [levels[level] for level in sorted(levels)]
        joined = (torch.cat([a for a, _ in held]), torch.cat([b for _, b in held], 1)) if held else None
        self._layers[module].factors = joined


def _adapted(shard: Shard, name: str) -> nn.Module | None:
    """The layer of PEFT's around a module, where this shard holds it."""
    try:
        layer = shard.model.get_submodule(name)
    except AttributeError:
        return None
    return layer if hasattr(layer, "base_layer") else None
