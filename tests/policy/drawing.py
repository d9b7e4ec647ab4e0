"""A schedule as a drawing: who sends what at which tick, and what the device runs.

One column a tick; a batch takes one. A cell names a request by a letter and gives the length of its one row: `A4` are
activations, `a4` is the gradient that ends what `A` began. `:7` after that are the bytes that it holds. The device's
cells hold the requests of a batch in the order of their rows, `-` where it waits although something is ready, `.` where
nothing is. In the row `more`, `y` says that other requests are expected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from splitllm.policy.batching import Budget, Request, Run, compose

CELL = re.compile(r"(?P<name>[A-Za-z])(?P<length>\d+)(:(?P<bytes>\d+))?")
PLAIN = Budget(tokens=1000, bytes=1000, wait=0, starve=math.inf)


def device_of(drawing: str, budget: Budget, weights: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """What the device runs by the policy, and what is drawn."""
    rows = {cells[0]: cells[1:] for cells in map(str.split, drawing.strip().splitlines())}
    drawn, more = rows.pop("device"), rows.pop("more", [])
    rows.pop("tick", None)
    waiting: dict[int, tuple[str, Request]] = {}
    held: dict[str, int] = {}
    ran, number = [], 0
    for tick in range(len(drawn)):
        for tenant, cells in rows.items():
            if tick < len(cells) and (cell := CELL.fullmatch(cells[tick])):
                waiting[number] = cell["name"], _request(number, tenant, cell, tick)
                number += 1
        ready = [request for _, request in waiting.values()]
        free = replace(budget, bytes=budget.bytes - sum(held.values()))
        decision = compose(ready, tick, free, weights, tick < len(more) and more[tick] == "y")
        if isinstance(decision, Run):
            batch = [waiting.pop(one) for one in decision.ids]
            for name, request in batch:
                held[name.upper()] = 0 if request.urgent else request.bytes
            ran.append("".join(name for name, _ in batch))
        else:
            ran.append("-" if ready else ".")
    return ran, drawn


def _request(number: int, tenant: str, cell: re.Match[str], tick: int) -> Request:
    name, length, held = cell["name"], int(cell["length"]), int(cell["bytes"] or 1)
    return Request(number, tenant, name.islower(), (length,), 0, tick, held, (0, 0, number))
