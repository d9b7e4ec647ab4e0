"""An adapter that is trained by itself: what of it goes into a round, and how it goes on from the outcome."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from splitllm.federated.factors import LowRank, stacked
from splitllm.federated.rounds import ADAPTER, FROZEN, A, Arithmetic, B, Tensors, grown
from splitllm.model.frozen import Frozen
from splitllm.model.lora import initial_a
from splitllm.model.trainable import Trainable

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Holder:
    """An adapter that is trained by itself.

    Attributes:
        sender: whose it is: a role, or the client that a server trains it for.
        trainable: the adapter.
        scale: of its products.
        client: the number of that client; None: all that the role serves.
        frozen: what rounds have frozen beside it; None: nothing, or not here.
    """

    sender: str
    trainable: Trainable
    scale: float
    client: int | None = None
    frozen: Frozen | None = None

    def adapter(self) -> Tensors:
        """Its tensors by their names in an adapter file."""
        return {name: parameter.detach() for name, parameter in self.trainable.parameters.items()}

    def value(self, arithmetic: Arithmetic, averaged: Collection[str], due: int, *, moments: bool) -> Tensors:
        """What it brings to a round.

        Args:
            arithmetic: of the rule.
            averaged: names of the tensors that others have, too.
            due: the highest level that averages.
            moments: whether those of the optimiser are averaged.
        """
        trains = self.trainable.parameters.items()
        adapter = {name: p.detach() for name, p in trains if p.requires_grad and name in averaged}
        value = arithmetic.sent(adapter, self.scale)
        if moments:
            state = self.trainable.state()
            value |= {key: t for key, t in state.items() if key.partition("/")[2] in adapter and _is_moment(key)}
        for module in [] if self.frozen is None else self.frozen.modules:
            if module + A in adapter and (added := self._added(module, due)) is not None:
                value |= {FROZEN + module + A: added.a_RD, FROZEN + module + B: added.b_OR}
        return value

    def renew(
        self, arithmetic: Arithmetic, value: Mapping[str, torch.Tensor], due: int, anew: tuple[int, str], *, reset: bool
    ) -> None:
        """Go on from an outcome.

        Args:
            arithmetic: of the rule.
            value: the outcome.
            due: the highest level that averaged.
            anew: seed, and what beside the name keys an A that is drawn anew.
            reset: forget the optimiser's moments.
        """
        parameters = self.trainable.parameters
        taken = arithmetic.received(value, self.adapter(), self.scale)
        moments = {k: t for k, t in value.items() if _is_moment(k) and k.partition("/")[2] in parameters}
        begun = self._begun(value, anew)
        self.trainable.renew({**taken, **moments, **begun}, reset=reset or bool(begun))
        for module in [] if self.frozen is None else self.frozen.modules:
            if FROZEN + module + A in value:
                self._freeze(module, LowRank(value[FROZEN + module + A], value[FROZEN + module + B]), due)

    def _added(self, module: str, due: int) -> LowRank | None:
        """What lower levels have frozen since the last round of the one that is due."""
        assert self.frozen is not None
        parts = [LowRank(*factors) for factors in self.frozen.below(module, due)]
        return stacked(parts, [1.0] * len(parts)) if parts else None

    def _begun(self, value: Mapping[str, torch.Tensor], anew: tuple[int, str]) -> Tensors:
        """Where all went into the frozen part: a new A, and B is 0."""
        tensors: Tensors = {}
        for name, parameter in self.trainable.parameters.items():
            if not name.endswith(A) or ADAPTER + name in value or FROZEN + name not in value:
                continue
            drawn, b_name = initial_a(name + anew[1], parameter.shape, anew[0]), name.removesuffix(A) + B
            tensors[ADAPTER + name] = drawn.to(parameter.device, parameter.dtype)
            tensors[ADAPTER + b_name] = torch.zeros_like(self.trainable.parameters[b_name])
        return tensors

    def _freeze(self, module: str, now: LowRank, due: int) -> None:
        assert self.frozen is not None
        before = self.frozen.of(module, due)
        whole = grown(None if before is None else LowRank(*before), now)
        self.frozen.put(module, due, (whole.a_RD, whole.b_OR))


def _is_moment(key: str) -> bool:
    return not key.startswith((ADAPTER, FROZEN)) and key.partition("/")[0] in MOMENTS
