"""What a role steps by between rounds: the gradients of the mean loss of those whom each of its blocks serves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from splitllm.model.trainable import Tensors, clip_factor, squared_norms
from splitllm.roles.worker import Worker


@dataclass(frozen=True)
class LocalStep:
    """One step of a role's own.

    Attributes:
        gradients: by name.
        norm: theirs, before clipping.
        factor: clips them; None: they are not finite, and no step is taken.
    """

    gradients: Tensors
    norm: float
    factor: float | None


@dataclass(frozen=True)
class Local:
    """How a role steps by itself.

    Attributes:
        block: adapter tensor -> global index of its block.
        entries: client -> the first block that it runs here, of those that do not run all.
        clip_norm: the largest norm, or None.
    """

    block: Callable[[str], int]
    entries: Mapping[int, int]
    clip_norm: float | None

    def step_of(self, worker: Worker, shares: Mapping[int, float]) -> LocalStep:
        """From the gradients that the worker has summed up; a block that serves nobody in this step does not step.

        Args:
            worker: of the role.
            shares: client that takes part in the step -> its part of the step's loss over all clients.
        """
        gradients = worker.trainable.gradients()
        scaled = {n: g * self._scale(n, shares) for n, g in gradients.items() if self._served(n, shares)}
        norm = math.sqrt(math.fsum(squared_norms(scaled).values()))
        return LocalStep(scaled, norm, clip_factor(norm, self.clip_norm) if math.isfinite(norm) else None)

    def _scale(self, name: str, shares: Mapping[int, float]) -> float:
        """What makes the mean over the clients that a block serves of their weighted sum over all clients."""
        served = math.fsum(self._served(name, shares))
        return 1.0 / served if served else 1.0

    def _served(self, name: str, shares: Mapping[int, float]) -> list[float]:
        """The shares of the clients that a tensor's block serves."""
        block = self.block(name)
        return [share for client, share in shares.items() if self.entries.get(client, 0) <= block]
