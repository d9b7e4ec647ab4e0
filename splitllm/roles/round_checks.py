"""What a child may send in a round, and of its adapter at the end of a run with rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from splitllm.federated.rounds import ADAPTER, FROZEN, A, B
from splitllm.roles.holding import MOMENTS
from splitllm.roles.outcomes import fits
from splitllm.roles.together import is_number

FLOATS = (torch.float32, torch.bfloat16, torch.float64)
MOST_REPORTS, LONGEST_REASON, LARGEST_WEIGHT = 1 << 12, 300, 1e15
MOST_EXAMPLES = 10**9
"""Rows that a client is believed to have: what it counts, in many rounds together, stays below the largest weight."""
Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class RoundBounds:
    """What a recipe says of its rounds.

    Attributes:
        levels: that average.
        level: of the server that is asked.
        due: steps done -> the highest level that averages then, or 0.
        side: step -> the one of the matrices A and B that trains in it; None: both.
        any_rank: whether holders may differ in rank.
        frozen: whether averages add to frozen weights.
        anew: whether that is all that is left of an average, and adapters start anew.
        moments: whether the optimiser's moments travel.
        words: of what clients add to a sum, instead of values; None: they send values.
        lanes: whether clients go at their own pace, so that servers average apart from their steps.
    """

    levels: int
    level: int
    due: Callable[[int], int]
    side: Callable[[int], str | None]
    any_rank: bool
    frozen: bool
    anew: bool
    moments: bool
    words: torch.dtype | None = None
    lanes: bool = False

    @property
    def counted(self) -> str:
        """What children say of each client: rows that it has, or further up what it counts at each level."""
        return "examples" if self.level == 1 else "weights"

    def value_fault(self, steps: int, tensors: Mapping[str, torch.Tensor], averaged: Shapes) -> str | None:
        """What is wrong with a value, in words that follow `sent round with`; None: nothing.

        Args:
            steps: done.
            tensors: the value.
            averaged: adapter tensors of the child that are averaged -> shape.
        """
        due, side = self.due(steps), self.side(steps - 1)
        wanted = {n: s for n, s in averaged.items() if side is None or f".lora_{side}." in n}
        if self.words is not None:
            return self._words_fault(tensors, wanted)
        if self.level > due:
            return f"{len(tensors)} tensors, where only weights are due" if tensors else None
        for key, tensor in tensors.items():
            if (fault := self._tensor_fault(key, tensor, wanted)) is not None:
                return fault
        return self._missing(tensors, wanted)

    def _words_fault(self, tensors: Mapping[str, torch.Tensor], wanted: Shapes) -> str | None:
        """All words, or none of one that takes no part or has sent them before."""
        due = sum(shape.numel() for shape in wanted.values())
        if tensors.keys() - {"words"}:
            return f"{sorted(tensors)[0][:200]!r}, where words are due"
        words = tensors.get("words")
        if words is not None and (words.dtype != self.words or list(words.shape) != [due]):
            return f"words of {words.dtype} {list(words.shape)}, where [{due}] are due"
        return None

    def adapter_fault(self, tensors: Mapping[str, torch.Tensor], held: Shapes) -> str | None:
        """What is wrong with the adapter at the end of the run, in the same words."""
        named = {k if k.startswith(FROZEN) else ADAPTER + k: tensor for k, tensor in tensors.items()}
        for key, tensor in named.items():
            if key.partition("/")[0] in MOMENTS:
                return f"{key}, where the adapter is due"
            if (fault := self._tensor_fault(key, tensor, held)) is not None:
                return fault
        missing = sorted(name for name in held if ADAPTER + name not in named)
        return f"no {missing[0]}" if missing else _unmatched(named)

    def _tensor_fault(self, key: str, tensor: torch.Tensor, wanted: Shapes) -> str | None:
        place, _, name = key.partition("/")
        like = wanted.get(name)
        known = f"{place}/" == ADAPTER or (self.frozen and f"{place}/" == FROZEN) or (self.moments and place in MOMENTS)
        if like is None or not known:
            return f"{key[:200]!r}, which is not due"
        if tensor.dtype not in FLOATS or not fits(key, tensor.shape, like, any_rank=self.any_rank):
            return f"{key} of {tensor.dtype} {list(tensor.shape)}"
        return None

    def _missing(self, tensors: Mapping[str, torch.Tensor], wanted: Shapes) -> str | None:
        """Every adapter tensor is due, or what it was frozen into; A and B go together."""
        instead = {n for n in wanted if self.anew and FROZEN + n in tensors}
        missing = sorted(n for n in wanted if ADAPTER + n not in tensors and n not in instead)
        return f"no {missing[0]}" if missing else _unmatched(tensors)


def _unmatched(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """A and B of a product whose ranks differ, or one without the other where both should be."""
    for key, tensor in tensors.items():
        if key.startswith((ADAPTER, FROZEN)) and key.endswith(A):
            other = tensors.get(key.removesuffix(A) + B)
            if other is not None and tensor.dim() == other.dim() == 2 and tensor.shape[0] != other.shape[1]:
                return f"{key} of rank {tensor.shape[0]}, whose B is of rank {other.shape[1]}"
            if other is None and key.startswith(FROZEN):
                return f"{key} without its B"
    return None


def are_weights(value: Any, levels: int) -> bool:
    """Whether it is what a client counts at each level."""
    fits = isinstance(value, list) and len(value) == levels
    return fits and all(is_number(each) and 0 <= each <= LARGEST_WEIGHT for each in value)


def are_reports(value: Any) -> bool:
    """Whether it is what servers tell of their averages."""
    return isinstance(value, list) and len(value) <= MOST_REPORTS and all(_is_report(each) for each in value)


def _is_report(value: Any) -> bool:
    keys = {"role", "level", "updates", "error", "frozen_rank", "rejected", "void", "epsilon"}
    if not isinstance(value, dict) or value.keys() != keys or not _is_line(value["role"]):
        return False
    rejected = value["rejected"]
    void = value["void"] is None or _is_line(value["void"])
    said = void and isinstance(rejected, dict) and all(_is_line(n) and _is_line(why) for n, why in rejected.items())
    return (
        said
        and all(is_number(value[key]) for key in ("level", "updates", "frozen_rank"))
        and all(value[key] is None or is_number(value[key]) for key in ("error", "epsilon"))
    )


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= LONGEST_REASON and value.isprintable()
