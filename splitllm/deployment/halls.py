"""Where the rounds of a server are held whose clients go at their own pace: from its station."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from splitllm.deployment.bounds import allowed
from splitllm.deployment.held import Held
from splitllm.deployment.journal import Journal
from splitllm.deployment.station import Station
from splitllm.errors import CheckpointError
from splitllm.model.trainable import Tensors
from splitllm.policy.participation import Rules
from splitllm.recipe import Recipe, children_of, clients_below, goes_by_rounds, intervals
from splitllm.roles.book import Book
from splitllm.roles.buffered import BufferedHall
from splitllm.roles.convening import Reports
from splitllm.roles.hall import Hall
from splitllm.roles.merging import MergeDoor, Upward
from splitllm.wire.uplink import RemoteLink

Observe = Callable[[int, Reports], None]


class KeptRounds:
    """What a hall remembers, in a journal of its own.

    Args:
        journal: of this alone; its steps count what was written.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._written = max(journal.steps(), default=0)

    def read(self) -> tuple[Tensors, dict[str, Any]] | None:
        """What was written last; None: nothing.

        Raises:
            CheckpointError: it is damaged.
        """
        return self._journal.read(self._written) if self._written else None

    def write(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Keep these; when this returns they are on disk."""
        self._written += 1
        self._journal.write(self._written, tensors, values)


def hall_of(
    station: Station,
    journals: Mapping[int, Journal],
    held: Held | None,
    uplink: RemoteLink | None,
    observe: Observe | None,
) -> Hall | BufferedHall | None:
    """Where members of rounds come; None where there are none.

    Raises:
        CheckpointError: lanes have committed steps after rounds of which its journal knows nothing.
    """
    recipe, name, level = station.recipe, station.name, station.tier
    if not goes_by_rounds(recipe):
        return None
    rounds, keep = station.assembly().rounding.in_hall(name, level), KeptRounds(station.journal("rounds"))
    members = {child: clients_below(recipe, child) for child in children_of(recipe, name)}
    every, buffered = intervals(recipe), recipe.rounds.buffer.size is not None
    if buffered and level == len(every):
        assert observe is not None, "the top has somebody to tell"
        _check(math.inf if keep.read() is not None else 0, journals, every[-1])
        return BufferedHall(rounds, members, keep, station.device, observe)
    above = Upward(uplink, name, rounds.arithmetic) if uplink is not None and level < len(every) else None
    shared, stop = held if above is not None else None, station.plan.role_bounds[name][1]
    differences = buffered and level == len(every) - 1
    book = Book(rounds, keep, station.device, stop, above, shared, differences=differences)
    _check(book.number, journals, every[level - 1])
    told = observe if level > 1 else None  # right above clients their lanes tell
    steps, seed = recipe.train.steps, recipe.seed
    return Hall(book, members, _rules(recipe, level), every=every[level - 1], steps=steps, seed=seed, observe=told)


def _check(number: float, journals: Mapping[int, Journal], every: int) -> None:
    """Lanes go on from what rounds have made: none of them may be further than the rounds are."""
    for client, journal in journals.items():
        held = max(journal.steps(), default=0) // every
        if held > number:
            found = f"{number:g} rounds, and client {client} has gone on from {held}"
            raise CheckpointError(
                f"{journal.folder.parent}: its folder `rounds` holds {found}; give a new --output-dir"
            )


def merges_of(station: Station, hall: Hall | BufferedHall | None) -> MergeDoor | None:
    """What a server does with rounds that others bring."""
    if hall is None or station.tier == 1:
        return None
    return MergeDoor(station.name, hall, allowed(station.plan, station.name, None).check, hall.rounds.concerns)


def _rules(recipe: Recipe, level: int) -> Rules:
    """Servers are all waited for; clients as the recipe says."""
    some = recipe.rounds.participation
    if level > 1:
        return Rules()
    deadline = math.inf if some.deadline is None else some.deadline
    return Rules(some.policy, some.share, some.count, some.over, some.minimum, deadline)
