"""Whoever averages: looks at what came before it counts, and remembers what it gave out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import torch

from splitllm.errors import AverageError
from splitllm.federated.handed import Handed
from splitllm.federated.outer import Outer, outer_step
from splitllm.federated.rounds import ADAPTER, Arithmetic, Combined, Tensors, Update

GIVEN, HANDED = "given/", "handed/"
NOT_FINITE, SQUARES = "not finite", "exp_avg_sq/"
LARGEST_VALUE = 1e15
"""Of an update: products of what is larger leave fp32, and no adapter that has not diverged comes near."""


@dataclass(frozen=True)
class Limits:
    """What is done with updates that change a lot.

    Attributes:
        clip: the largest norm of a change; longer ones are shortened to it. None: any.
        reject_beyond: a change of so many times the median norm is left out; of an even number of changes the lower of
            the two in the middle counts, so that of two one can be left out. None: only what is not finite is.
    """

    clip: float | None = None
    reject_beyond: float | None = None


class Averager:
    """One server's part of all rounds of a run.

    Args:
        arithmetic: the rule.
        limits: of changes.
        outer: at the top, how it steps; None: it takes the average.
        start: what all holders below start from, `adapter/NAME`; needed where changes are looked at, and kept where it
            is there.
        handed: at the top, what comes out of the run; None further down.
    """

    def __init__(
        self,
        arithmetic: Arithmetic,
        limits: Limits,
        outer: Outer | None,
        start: Mapping[str, torch.Tensor],
        handed: Handed | None = None,
    ) -> None:
        self.arithmetic, self.limits, self.outer, self.handed = arithmetic, limits, outer, handed
        self._given = {name: tensor.clone() for name, tensor in start.items()}
        self._moments: Tensors = {}

    def combine(self, updates: Sequence[Update]) -> tuple[Combined, dict[str, str]]:
        """What stands for all updates that can be used.

        Returns:
            That, and who was left out -> why.

        Raises:
            AverageError: none can be used, or the rule does not fit them.
        """
        rejected = {u.sender: why for u in updates if (why := _unusable(u)) is not None}
        rejected |= self._too_large([u for u in updates if u.sender not in rejected])
        left = [update for update in updates if update.sender not in rejected]
        if not left:
            why = "; ".join(f"{sender}: {reason}" for sender, reason in rejected.items())
            raise AverageError(f"nothing is left to average ({why}); lower the learning rate, or reject less")
        norms = self._norms(left) if self.limits.clip is not None else {}
        return self.arithmetic.combine([self._clipped(update, norms) for update in left]), rejected

    def settle(self, value: Tensors) -> Tensors:
        """At the level whose round it is: what is handed out for an average."""
        if self.outer is None:
            return value
        mine = {name: tensor for name, tensor in value.items() if name in self._given}
        return value | outer_step(self.outer, self._given, mine, self._moments)

    def handed_out(self, value: Mapping[str, torch.Tensor]) -> None:
        """This is what all holders below go on from."""
        for name in self._given.keys() & value.keys():
            self._given[name] = value[name].detach().clone()
        if self.handed is not None:
            self.handed.take(value)

    def given(self) -> Tensors:
        """What was handed out last."""
        return dict(self._given)

    def state(self) -> Tensors:
        """All that a resumed run needs."""
        handed = {} if self.handed is None else self.handed.state()
        return _behind(GIVEN, self._given) | _behind(HANDED, handed) | self._moments

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as a `state()` tells."""
        self._given = {n.removeprefix(GIVEN): t.clone() for n, t in tensors.items() if n.startswith(GIVEN)}
        self._moments = {n: t.clone() for n, t in tensors.items() if not n.startswith((GIVEN, HANDED))}
        if self.handed is not None:
            self.handed.load({n.removeprefix(HANDED): t for n, t in tensors.items() if n.startswith(HANDED)})

    def _too_large(self, updates: Sequence[Update]) -> dict[str, str]:
        factor = self.limits.reject_beyond
        if factor is None:
            return {}
        norms = self._norms(updates)
        usual = median_low(norms.values()) if norms else 0.0
        words = "a change of norm {:.3g}, where {:.3g} is the median"
        return {s: words.format(norm, usual) for s, norm in norms.items() if norm > factor * usual}

    def _norms(self, updates: Sequence[Update]) -> dict[str, float]:
        """Of each holder's change, which may come in parts of different weight."""
        norms: dict[str, float] = {}
        for update in updates:
            norms[update.sender] = math.hypot(norms.get(update.sender, 0.0), self._change(update))
        return norms

    def _change(self, update: Update) -> float:
        changes = [self._from(name, t) for name, t in update.tensors.items() if name in self._given]
        return math.sqrt(math.fsum(float(change.square().sum()) for change in changes))

    def _from(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() - self._given[name].to(tensor.device).double()

    def _clipped(self, update: Update, norms: Mapping[str, float]) -> Update:
        """Drawn back to what was handed out last, along the change of all that its holder brings."""
        norm = norms.get(update.sender, 0.0)
        if self.limits.clip is None or norm <= self.limits.clip:
            return update
        tensors = dict(update.tensors)
        for name in tensors.keys() & self._given.keys():
            before = self._given[name].to(tensors[name].device).double()
            tensors[name] = (before + self._from(name, tensors[name]) * (self.limits.clip / norm)).to(
                tensors[name].dtype
            )
        return Update(update.sender, update.weight, tensors)


def _unusable(update: Update) -> str | None:
    """Why no rule can count with it; None: all can."""
    if not (math.isfinite(update.weight) and is_finite(update.tensors)):
        return NOT_FINITE
    largest = max((float(tensor.abs().max()) for tensor in update.tensors.values() if tensor.numel()), default=0.0)
    if largest > LARGEST_VALUE:
        return f"a value of {largest:.3g}"
    squares = (tensor for name, tensor in update.tensors.items() if name.startswith(SQUARES))
    return "a square below 0" if any(bool((tensor < 0).any()) for tensor in squares) else None


def _behind(place: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {place + name: tensor for name, tensor in tensors.items()}


def is_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all values are."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def starting(adapter: Mapping[str, torch.Tensor]) -> Tensors:
    """An adapter as `start` of an averager."""
    return {ADAPTER + name: tensor for name, tensor in adapter.items()}
