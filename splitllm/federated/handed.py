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
        self._arithmetic, self._tensors = arithmetic, dict(start)

    def take(self, value: Mapping[str, torch.Tensor]) -> None:
        """A round of the top has ended with this."""
        value = {name: tensor.detach().to("cpu", copy=True) for name, tensor in value.items()}
        self._tensors |= self._adapters(value)
        for module in [name.removesuffix(A) for name in value if name.startswith(FROZEN) and name.endswith(A)]:
            self._freeze(module.removeprefix(FROZEN), value)

    def adapter(self) -> Tensors:
        """By names in an adapter file, and `frozen/NAME` of what was frozen beside it."""
        return {name.removeprefix(ADAPTER): tensor for name, tensor in self._tensors.items()}

    def state(self) -> Tensors:
        """All that a resumed run needs."""
        return dict(self._tensors)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as a `state()` tells."""
        self._tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def _adapters(self, value: Mapping[str, torch.Tensor]) -> Tensors:
        """What the largest holder takes over."""
        if not self._arithmetic.any_rank:
            return {name: tensor for name, tensor in value.items() if name.startswith(ADAPTER)}
        like = {n.removeprefix(ADAPTER): tensor for n, tensor in self._tensors.items() if n.startswith(ADAPTER)}
        return self._arithmetic.received(value, like, 1.0)

    def _freeze(self, module: str, value: Mapping[str, torch.Tensor]) -> None:
        now, before = LowRank(value[FROZEN + module + A], value[FROZEN + module + B]), None
        if FROZEN + module + A in self._tensors:
            before = LowRank(self._tensors[FROZEN + module + A], self._tensors[FROZEN + module + B])
        whole = grown(before, now)
        self._tensors |= {FROZEN + module + A: whole.a_RD, FROZEN + module + B: whole.b_OR}
        if ADAPTER + module + A not in value:  # it starts anew, and adds nothing
            self._tensors[ADAPTER + module + B] = torch.zeros_like(self._tensors[ADAPTER + module + B])
