"""The arithmetic of a round: from what the holders of some weights have to what all of them go on from.

A *holder* has trained an adapter of its own: a client, a server, or a server for one of its clients. What holders send
up, and what comes down, is a *value*, tensors by these names:

| name | of a module |
|---|---|
| `adapter/MODULE.lora_A.weight`, `...lora_B.weight` | its adapter, or the one that stands for a group |
| `frozen/MODULE.lora_A.weight`, `...lora_B.weight` | what is to be frozen beside its weight: B A |
| `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME` | moments of an adapter tensor, where those are averaged |

A value of a group is combined like one of a holder, so any number of tiers average by the same function. Under rules
that take any rank B is multiplied by its scale before it is sent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch

from splitllm.federated.aggregate import RULES, Average, Rule, error_of, middle, trimmed, trimmed_mean, weighted
from splitllm.federated.factors import LowRank, padded, stacked, truncated

Tensors = dict[str, torch.Tensor]
A, B = ".lora_A.weight", ".lora_B.weight"
ADAPTER, FROZEN, STEP = "adapter/", "frozen/", "step/"
ANY_RANK = frozenset({"flora", "flexlora", "hetlora"})
NEGLIGIBLE = 1e-12
"""Of the largest singular value: directions with less are rounding, and are not carried on."""


@dataclass(frozen=True)
class Update:
    """What one holder, or a group of them, brings to a round.

    Attributes:
        sender: who that is.
        weight: how much it counts.
        tensors: its value.
    """

    sender: str
    weight: float
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Combined:
    """What stands for all updates.

    Attributes:
        value: by the names above.
        error: how far the rule's outcome is from the exact average (Frobenius norms, as a share of that), the mean
            over modules.
    """

    value: Tensors
    error: float


@dataclass(frozen=True)
class Arithmetic:
    """A rule with its numbers.

    Attributes:
        rule: a name in `RULES`.
        scale: of all adapters, of rules that need one scale.
        trim: of `trimmed_mean`.
    """

    rule: str
    scale: float = 1.0
    trim: float = 0.1

    @property
    def any_rank(self) -> bool:
        """Whether holders may differ in rank, and multiply B by its scale before they send it."""
        return self.rule in ANY_RANK

    def combine(self, updates: Sequence[Update]) -> Combined:
        """Average, weight by weight over those who hold it.

        Raises:
            AverageError: the rule does not fit the adapters.
        """
        modules = sorted({key.partition("/")[2].removesuffix(A) for u in updates for key in u.tensors if _is_a(key)})
        value, errors = Tensors(), []
        for module in modules:
            holders = [update for update in updates if _has_pair(module, update)]
            if holders:
                errors.append(self._module(module, holders, value))
        done = {module for module in modules if any(_has_pair(module, update) for update in updates)}
        for key in sorted({key for update in updates for key in update.tensors if not _is_of(key, done)}):
            alike = [update for update in updates if key in update.tensors]
            value[key] = self._reduced(key, [each.tensors[key] for each in alike], _shares(alike))
        return Combined(value, fmean(errors) if errors else 0.0)

    def _module(self, module: str, holders: Sequence[Update], value: Tensors) -> float:
        """One module by the rule: the outcome for the group is put into the value; its error."""
        trained = [u for u in holders if {ADAPTER + module + A, ADAPTER + module + B} <= u.tensors.keys()]
        added, error = self._frozen_mean(module, holders), 0.0
        if trained:
            share = math.fsum(_share for _share in _shares(holders, trained))
            shares, adapters = _shares(trained), [self._adapter(module, each) for each in trained]
            average = self._rule()(adapters, shares)
            error = error_of(average, adapters, shares)
            group = self._group(average, adapters, shares)
            if group is not None:
                value[ADAPTER + module + A], value[ADAPTER + module + B] = group.a_RD, group.b_OR
            parts = [(added, 1.0), (average.frozen, share)]
            there = [(part, weight) for part, weight in parts if part is not None]
            added = stacked([part for part, _ in there], [weight for _, weight in there]) if there else None
        if added is not None:
            frozen = compact(added)
            value[FROZEN + module + A], value[FROZEN + module + B] = frozen.a_RD, frozen.b_OR
        return error

    def _frozen_mean(self, module: str, holders: Sequence[Update]) -> LowRank | None:
        """What is frozen already, on average; what all have alike stays as it is."""
        parts = [_frozen(module, each) for each in holders]
        known = [part for part in parts if part is not None]
        if not known:
            return None
        whole = [_nothing(known[0]) if part is None else part for part in parts]
        return whole[0] if all(_same(whole[0], other) for other in whole[1:]) else stacked(whole, _shares(holders))

    def _group(self, average: Average, adapters: Sequence[LowRank], shares: Sequence[float]) -> LowRank | None:
        """The adapter that stands for the group."""
        if self.rule == "flexlora":
            return compact(stacked(adapters, shares))
        if average.adapters is None:
            return None
        return max(average.adapters, key=lambda each: each.rank)

    def _adapter(self, module: str, update: Update) -> LowRank:
        scale = 1.0 if self.any_rank else self.scale
        return LowRank(update.tensors[ADAPTER + module + A], update.tensors[ADAPTER + module + B], scale)

    def _rule(self) -> Rule:
        return partial(trimmed_mean, trim=self.trim) if self.rule == "trimmed_mean" else RULES[self.rule]

    def _reduced(self, key: str, tensors: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
        """What is no pair of A and B: the one of them that trains alone, moments, DoRA's magnitudes."""
        if key.startswith(STEP):
            return torch.stack(list(tensors)).amax(0)
        if self.rule == "median":
            return middle(torch.stack(list(tensors)))
        if self.rule == "trimmed_mean":
            return trimmed(torch.stack(list(tensors)), self.trim)
        return weighted(tensors, shares)

    def sent(self, adapter: Mapping[str, torch.Tensor], scale: float) -> Tensors:
        """A holder's adapter as a value.

        Args:
            adapter: by its names in an adapter file.
            scale: of this holder's products.
        """
        factor = {B: scale} if self.any_rank and scale != 1.0 else {}
        return {
            ADAPTER + name: tensor * factor[B] if name.endswith(B) and factor else tensor
            for name, tensor in adapter.items()
        }

    def received(self, value: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor], scale: float) -> Tensors:
        """A value as one holder goes on from it: by the rank and scale of its adapter.

        Args:
            value: of the round.
            like: the holder's adapter, by its names in an adapter file.
            scale: of its products.

        Returns:
            `adapter/NAME` of what it takes over; nothing of it where it starts anew.
        """
        if not self.any_rank:
            return {ADAPTER + name: value[ADAPTER + name] for name in like if ADAPTER + name in value}
        taken: Tensors = {}
        for name in like:
            module = name.removesuffix(A)
            if not name.endswith(A) or ADAPTER + name not in value:
                continue
            whole = LowRank(value[ADAPTER + module + A], value[ADAPTER + module + B])
            mine = fitted(self.rule, whole, like[name].shape[0], scale)
            taken[ADAPTER + module + A], taken[ADAPTER + module + B] = mine.a_RD, mine.b_OR
        return taken


def fitted(rule: str, whole: LowRank, rank: int, scale: float) -> LowRank:
    """What a holder of a rank takes of the value of a group: the best of it by SVD, or its first rows."""
    if rule == "flexlora":
        return truncated(whole, rank, scale)
    cut = LowRank(whole.a_RD[:rank], whole.b_OR[:, :rank] / scale, scale)
    return padded(cut, rank)


def compact(part: LowRank) -> LowRank:
    """The same product, by as few factors as it needs."""
    most = min(part.rank, part.a_RD.shape[1], part.b_OR.shape[0])
    best = truncated(part, most)
    sizes = best.b_OR.double().norm(dim=0)
    kept = int((sizes > NEGLIGIBLE * sizes.max()).sum()) if most else 0
    return LowRank(best.a_RD[:kept], best.b_OR[:, :kept])


def grown(before: LowRank | None, now: LowRank) -> LowRank:
    """What is frozen, with what a round adds to it."""
    whole = now if before is None else stacked([before, now], [1.0, 1.0])
    return compact(whole) if whole.rank > min(whole.a_RD.shape[1], whole.b_OR.shape[0]) else whole


def modules_in(names: Mapping[str, torch.Tensor]) -> list[str]:
    """Those with both A and B among the names of an adapter file."""
    return [name.removesuffix(A) for name in names if name.endswith(A) and name.removesuffix(A) + B in names]


def _shares(updates: Sequence[Update], of: Sequence[Update] | None = None) -> list[float]:
    """Of some of these updates, by default of all, their part of the weight of all."""
    total = math.fsum(update.weight for update in updates)
    return [update.weight / total if total else 1.0 / len(updates) for update in (updates if of is None else of)]


def _is_a(key: str) -> bool:
    return key.startswith((ADAPTER, FROZEN)) and key.endswith(A)


def _has_pair(module: str, update: Update) -> bool:
    places = (ADAPTER, FROZEN)
    return any({place + module + A, place + module + B} <= update.tensors.keys() for place in places)


def _is_of(key: str, modules: Collection[str]) -> bool:
    place, _, name = key.partition("/")
    return (
        f"{place}/" in (ADAPTER, FROZEN) and name.endswith((A, B)) and name.removesuffix(A).removesuffix(B) in modules
    )


def _frozen(module: str, update: Update) -> LowRank | None:
    if FROZEN + module + A not in update.tensors:
        return None
    return LowRank(update.tensors[FROZEN + module + A], update.tensors[FROZEN + module + B])


def _nothing(like: LowRank) -> LowRank:
    return LowRank(like.a_RD[:0], like.b_OR[:, :0])


def _same(one: LowRank, other: LowRank) -> bool:
    return torch.equal(one.a_RD, other.a_RD) and torch.equal(one.b_OR, other.b_OR)
