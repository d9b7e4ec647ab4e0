"""A run under way: what the functions around the training loop share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from splitllm.metrics import Metrics
from splitllm.plan import Plan
from splitllm.recipe import Recipe
from splitllm.roles.assembly import Roles
from splitllm.running.world import World
from splitllm.wire.link import Traffic


@dataclass
class Totals:
    """Running sums over a run, across interruptions: real tokens, seconds of steps, bytes over all cuts, losses."""

    tokens: int = 0
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    logged: tuple[int, float, int, int] = field(default=(0, 0.0, 0, 0))

    def add(self, tokens: int, seconds: float, up: int, down: int) -> None:
        """Count one step."""
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.bytes_up, self.bytes_down = self.bytes_up + up, self.bytes_down + down

    def since_logged(self) -> dict[str, float]:
        """What was counted since this was last asked."""
        now = (self.tokens, self.seconds, self.bytes_up, self.bytes_down)
        recent = [new - old for new, old in zip(now, self.logged, strict=True)]
        self.logged = now
        return dict(zip(("tokens", "seconds", "bytes_up", "bytes_down"), recent, strict=True))


@dataclass
class Run:
    """A run under way.

    Attributes:
        plan: recipe, configuration, corpus and matched modules.
        world: the processes.
        directory: what is written goes here.
        roles: those of this process.
        metrics: writes on rank 0 only.
        data: fingerprint of the rows and of the base model.
        step: optimiser steps done.
        totals: sums over the run.
        crossed: traffic counted so far.
    """

    plan: Plan
    world: World
    directory: Path
    roles: Roles
    metrics: Metrics
    data: str
    step: int = 0
    totals: Totals = field(default_factory=Totals)
    crossed: Traffic = field(default_factory=Traffic)

    @property
    def recipe(self) -> Recipe:
        """What the user asked for."""
        return self.plan.recipe
