"""Halls of a tiny model's rounds, whose disk is a dictionary and whose clock is moved by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from splitllm.federated.rounds import ADAPTER, Tensors
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import matched_modules
from splitllm.policy.participation import Rules
from splitllm.recipe import Recipe, children_of, clients_below, intervals
from splitllm.roles.book import Arrival, Book, Merged
from splitllm.roles.device import Inline
from splitllm.roles.hall import Hall
from splitllm.roles.participation import Lesson
from splitllm.roles.rounding import Rounding
from splitllm.roles.rounds import Rounds
from tests.families import recipe


class Disk:
    """Keeps what was written last."""

    def __init__(self) -> None:
        self.held: tuple[Tensors, dict[str, Any]] | None = None
        self.writes = 0

    def read(self) -> tuple[Tensors, dict[str, Any]] | None:
        return self.held

    def write(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        self.held, self.writes = (dict(tensors), dict(values)), self.writes + 1


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Above:
    """A server above that adds 1 to what it gets, and notes it."""

    asked: list[tuple[int, dict[int, float], int, Tensors]] = field(default_factory=list)

    async def merge(self, steps: int, weights: Mapping[int, float], version: int, value: Tensors) -> Merged:
        self.asked.append((steps, dict(weights), version, value))
        return Merged({name: tensor + 1 for name, tensor in value.items()}, version + 1)


def paced(clients: int = 4, edges: int = 1, **rounds: Any) -> Recipe:
    """Of clients at their own pace."""
    return recipe(
        "gpt2",
        [1, 3],
        "cloud",
        split={"tiers": {"client": clients, "edge": edges, "cloud": 1}},
        train={"steps": 8},
        lora={"adapters": "common"},
        server={"batching": "continuous"},
        rounds={"replicas": "local", "edge_every": 2, "cloud_every": 4, **rounds},
    )


def rounds_in(wanted: Recipe, name: str, level: int) -> Rounds:
    base = Checkpoint(wanted.model.base)
    modules = matched_modules(base.config, wanted.lora.targets)
    return Rounding(wanted, base.config, modules, lanes=True).in_hall(name, level)


def hall_of(
    wanted: Recipe,
    rules: Rules,
    disk: Disk | None = None,
    clock: Callable[[], float] | None = None,
    above: Above | None = None,
) -> Hall:
    """Of the edge, or of the first of several."""
    name = "edge" if wanted.split.tiers["edge"] == 1 else "edge-0"
    book = Book(rounds_in(wanted, name, 1), disk or Disk(), Inline(), 3, above or Above())
    members = {child: clients_below(wanted, child) for child in children_of(wanted, name)}
    every, steps = intervals(wanted)[0], wanted.train.steps
    return Hall(book, members, rules, every=every, steps=steps, seed=0, clock=clock or Clock())


def like(hall: Hall) -> Tensors:
    """What a client has at the beginning."""
    return hall.book.rounds.handed(2, 1)


def brought(hall: Hall, client: int, steps: int, value: float, weight: float = 1.0, **more: Any) -> Arrival:
    """A client whose tensors are all `value`."""
    tensors = {name: torch.full_like(tensor, value) for name, tensor in like(hall).items()}
    lesson = Lesson(1, value**2, 1.0)
    return Arrival(f"client-{client}", steps, tensors, {client: weight}, rows=3, lesson=lesson, **more)


def constant(tensors: Mapping[str, torch.Tensor] | None) -> float:
    """The one value of all."""
    assert tensors is not None and all(name.startswith(ADAPTER) for name in tensors)
    (found,) = {float(value) for tensor in tensors.values() for value in tensor.flatten()}
    return found
