"""What a role's process takes of memory: predicted when it starts, measured once it has stepped, told at the end."""

from __future__ import annotations

import logging

import torch

from splitllm.model.machine import one_arena, peak_bytes, return_at_once
from splitllm.policy.admission import MIB
from splitllm.recipe import Recipe
from splitllm.roles.ledger import Parts
from splitllm.roles.worker import Worker
from splitllm.running.memory import AFTER_STEPS, mib_of, total_mib

logger = logging.getLogger(__name__)


def settle_allocator(recipe: Recipe, name: str) -> None:
    """Before any thread starts: one arena for all; and where memory is limited nothing that is freed is kept."""
    one_arena()
    if recipe.memory_of(name) is not None:
        return_at_once()


class Footprint:
    """Of one role.

    Args:
        predicted: what it will hold.
        rank: of this process, where a server has several.
    """

    def __init__(self, predicted: Parts, rank: int | None = None) -> None:
        self.predicted, self._steps = predicted, 0
        self._which = {} if rank is None else {"rank": rank}

    def announce(self) -> None:
        """Log what will be held, part by part."""
        parts = mib_of(self.predicted)
        logger.info("memory", extra={"fields": {**self._which, "predicted_mib": parts.pop("total"), **parts}})

    def stepped(self, worker: Worker) -> None:
        """A step was committed; after the first of them it is logged what is held."""
        self._steps += 1
        if self._steps == AFTER_STEPS:
            held = {name: round(size / MIB, 2) for name, size in worker.peak().items()}
            predicted = self.words()["predicted_mib"]
            logger.info("memory", extra={"fields": {"measured_mib": measured(), "predicted": predicted, **held}})

    def words(self) -> dict[str, float]:
        """For the summary."""
        return {"predicted_mib": total_mib(self.predicted)}


def measured() -> float:
    """The peak of this process's resident set, in MiB."""
    return round(peak_bytes() / MIB, 1)


def gpu_mib(device: torch.device) -> dict[str, float]:
    """The peak on a GPU, in MiB, for closing words; nothing of a CPU."""
    return {"gpu_mib": round(torch.cuda.max_memory_allocated(device) / MIB, 1)} if device.type == "cuda" else {}
