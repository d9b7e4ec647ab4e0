"""What the top has handed out of all that rounds average: that is what a run gives, whatever clients say at its end."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from splitllm.federated.factors import LowRank
from splitllm.federated.rounds import ADAPTER, FROZEN, A, Arithmetic, B, Tensors, grown


class Handed:
    """Of one run.

    Args:
        arithmetic: the rule.
        start: what holders start from, `adapter/NAME`, of the largest rank; under rules of any rank B is scaled.
    """

    def __init__(self, arithmetic: Arithmetic, start: Mapping[str, torch.Tensor]) -> None:
        self._arithmetic, self._adapter = arithmetic, dict(start)
        self._frozen: dict[str, dict[int, LowRank]] = {}

    def take(self, value: Mapping[str, torch.Tensor], due: int) -> None:
        """A round has ended with this; of a level below the highest, where the tree is one site of several.

        Args:
            value: the outcome.
            due: the highest level that averaged; what it freezes takes in what lower ones have frozen since its last.
        """
        value = {name: tensor.detach().to("cpu", copy=True) for name, tensor in value.items()}
        self._adapter |= self._adapters(value)
        for name in [name for name in value if name.startswith(FROZEN) and name.endswith(A)]:
            self._freeze(name.removeprefix(FROZEN).removesuffix(A), value, due)

    def adapter(self) -> Tensors:
        """By names in an adapter file, and `frozen/NAME` of what was frozen beside it."""
        found = {name.removeprefix(ADAPTER): tensor for name, tensor in self._adapter.items()}
        for module, levels in self._frozen.items():
            held = [levels[level] for level in sorted(levels)]
            found[FROZEN + module + A] = torch.cat([part.a_RD for part in held])
            found[FROZEN + module + B] = torch.cat([part.b_OR for part in held], 1)
        return found

    def state(self) -> Tensors:
        """All that a resumed run needs; what was frozen as `frozen/LEVEL/NAME`."""
        tensors = dict(self._adapter)
        for module, levels in self._frozen.items():
            for level, part in levels.items():
                tensors |= {f"{FROZEN}{level}/{module}{A}": part.a_RD, f"{FROZEN}{level}/{module}{B}": part.b_OR}
        return tensors

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as a `state()` tells."""
        self._adapter = {name: tensor.clone() for name, tensor in tensors.items() if name.startswith(ADAPTER)}
        self._frozen = {}
        for name in [name for name in tensors if name.startswith(FROZEN) and name.endswith(A)]:
            level, _, module = name.removeprefix(FROZEN).removesuffix(A).partition("/")
            part = LowRank(tensors[name].clone(), tensors[name.removesuffix(A) + B].clone())
            self._frozen.setdefault(module, {})[int(level)] = part

    def _adapters(self, value: Mapping[str, torch.Tensor]) -> Tensors:
        """What the largest holder takes over."""
        if not self._arithmetic.any_rank:
            return {name: tensor for name, tensor in value.items() if name.startswith(ADAPTER)}
        like = {n.removeprefix(ADAPTER): tensor for n, tensor in self._adapter.items()}
        return self._arithmetic.received(value, like, 1.0)

    def _freeze(self, module: str, value: Mapping[str, torch.Tensor], due: int) -> None:
        levels, now = self._frozen.get(module, {}), LowRank(value[FROZEN + module + A], value[FROZEN + module + B])
        higher = {level: part for level, part in levels.items() if level > due}
        self._frozen[module] = {**higher, due: grown(levels.get(due), now)}
        if ADAPTER + module + A not in value:  # it starts anew, and adds nothing
            self._adapter[ADAPTER + module + B] = torch.zeros_like(self._adapter[ADAPTER + module + B])
