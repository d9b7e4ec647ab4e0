"""Rounds that another engine runs: what it must know of the recipe, and its averages by the same arithmetic."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from splitllm.errors import AverageError, PeerError
from splitllm.federated.averager import Averager, Limits
from splitllm.federated.outer import Outer
from splitllm.federated.rounds import Arithmetic, Tensors, Update

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Rules:
    """By which rounds average; from the recipe of the edges.

    Attributes:
        arithmetic: the rule and its numbers.
        limits: of changes.
        outer: how the top steps; None: it takes the average.
    """

    arithmetic: Arithmetic
    limits: Limits = field(default_factory=Limits)
    outer: Outer | None = None

    @property
    def look_at_changes(self) -> bool:
        """Whether the engine must know what the edges start from."""
        return self.outer is not None or self.limits != Limits()

    def text(self) -> str:
        """As it travels."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, text: str) -> Rules:
        """From what `text` made.

        Raises:
            PeerError: it is something else.
        """
        try:
            found = json.loads(text)
            outer = (
                None if found["outer"] is None else Outer(**{**found["outer"], "betas": tuple(found["outer"]["betas"])})
            )
            return cls(Arithmetic(**found["arithmetic"]), Limits(**found["limits"]), outer)
        except (ValueError, TypeError, KeyError) as error:
            raise PeerError(f"rules: {text[:100]!r} cannot be read; use the same splitllm everywhere") from error


@dataclass(frozen=True)
class Offer:
    """What an edge brings into a round.

    Attributes:
        step: the steps that it has done.
        weight: how much it counts.
        last: whether this is the last round of the run.
        rules: `Rules.text()` of its recipe.
        arrays: its value.
        bfloat16: names of those that are views of bfloat16.
    """

    step: int
    weight: float
    last: bool
    rules: str
    arrays: Arrays
    bfloat16: Collection[str]


class Pooling:
    """All rounds of a run, as the top of the hierarchy averages them."""

    def __init__(self) -> None:
        self._rules: str | None = None
        self._averager: Averager | None = None

    def outcomes(self, offers: Mapping[str, Offer]) -> tuple[dict[str, tuple[Arrays, list[str]]], str]:
        """What each edge goes on from.

        Args:
            offers: of all edges, by name; they are added in the order of their numbers.

        Returns:
            By edge its arrays and the names of those that are views of bfloat16; and what there is to tell.

        Raises:
            AverageError: the edges have different recipes, nothing is left to average, or the rule does not fit.
            PeerError: an offer cannot be read.
        """
        rules = self._agreed(offers)
        updates = [
            Update(edge, offer.weight, unviewed(_tensors(offer.arrays), offer.bfloat16))
            for edge, offer in sorted(offers.items(), key=lambda item: (len(item[0]), item[0]))
        ]
        count = [update for update in updates if update.weight > 0 and update.tensors]
        if not count:
            return {update.sender: ({}, []) for update in updates}, "void, as nobody counted"
        if all(offer.step == 0 for offer in offers.values()):
            value, told = self._start(rules, count), "what all start from"
        else:
            value, told = self._round(rules, count)
        return {update.sender: _arrays(_concerning(value, update.tensors)) for update in updates}, told

    def _start(self, rules: Rules, updates: Sequence[Update]) -> Tensors:
        value = Averager(rules.arithmetic, Limits(), None, {}).combine(updates)[0].value
        self._averager = Averager(rules.arithmetic, rules.limits, rules.outer, value)
        return value

    def _round(self, rules: Rules, updates: Sequence[Update]) -> tuple[Tensors, str]:
        if self._averager is None:
            if rules.look_at_changes:
                raise AverageError(
                    "these rules look at changes, and nobody told what the edges started from; start anew"
                )
            self._averager = Averager(rules.arithmetic, rules.limits, rules.outer, {})
        combined, rejected = self._averager.combine(updates)
        value = self._averager.settle(combined.value)
        self._averager.handed_out(value)
        without = "".join(f", without {edge} ({why})" for edge, why in rejected.items())
        return value, f"error {combined.error:.3g}{without}"

    def _agreed(self, offers: Mapping[str, Offer]) -> Rules:
        found = {offer.rules for offer in offers.values()} | ({self._rules} if self._rules else set())
        if len(found) > 1:
            raise AverageError(f"{', '.join(sorted(offers))} have different rules; use one recipe everywhere")
        (self._rules,) = found
        return Rules.of(self._rules)


def viewed(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, list[str]]:
    """Tensors on the CPU that NumPy knows, and the names of those that are bfloat16 behind it."""
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    bfloat16 = sorted(name for name, tensor in here.items() if tensor.dtype == torch.bfloat16)
    return {**here, **{name: here[name].view(torch.uint16) for name in bfloat16}}, bfloat16


def unviewed(tensors: Mapping[str, torch.Tensor], bfloat16: Collection[str]) -> Tensors:
    """What `viewed` was given.

    Raises:
        PeerError: one that is named is not there, or is no such view.
    """
    if isinstance(bfloat16, str) or not isinstance(bfloat16, Collection):
        raise PeerError(f"bfloat16 is {bfloat16!r}; expected a list of names")
    for name in bfloat16:
        if name not in tensors or tensors[name].dtype != torch.uint16:
            raise PeerError(f"bfloat16 names {name!r}, which is not there as uint16")
    return {name: tensor.view(torch.bfloat16) if name in bfloat16 else tensor for name, tensor in tensors.items()}


def _tensors(arrays: Arrays) -> Tensors:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _arrays(tensors: Tensors) -> tuple[Arrays, list[str]]:
    views, bfloat16 = viewed(tensors)
    return {name: tensor.numpy() for name, tensor in views.items()}, bfloat16


def _concerning(value: Tensors, sent: Mapping[str, torch.Tensor]) -> Tensors:
    """Of an outcome what is of the adapter tensors that were sent."""
    bare = {name.partition("/")[2] for name in sent}
    return {name: tensor for name, tensor in value.items() if name.partition("/")[2] in bare}
