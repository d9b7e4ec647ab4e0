"""What is remembered of the clients of rounds: how much they can still teach, and how long they take.

The *pacer* of Oort (Lai et al., OSDI 2021) moves the percentile of seconds beyond which a client counts as slow: up
when utility has become flat, to let slower clients in, down when it changes fast.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

_LARGEST = 1e100  # of what is reported: sums of it stay finite


@dataclass(frozen=True)
class Seen:
    """Of one client that was asked.

    Attributes:
        utility: of its last update; None if none has come yet.
        seconds: that it took, or for which it was at least waited.
        last: round in which it was last asked.
        times: that it has taken part.
    """

    utility: float | None
    seconds: float
    last: int
    times: int = 0


@dataclass(frozen=True)
class History:
    """All that is remembered, to be kept in a journal (`to_json`).

    Attributes:
        clients: that were asked.
        percentile: of seconds; slower clients are worth less. 100 and above: none is.
        recent: mean utility of the updates of each round, of the last two windows.
        number: of the last round that was recorded.
    """

    clients: Mapping[str, Seen] = field(default_factory=dict)
    percentile: float = 10.0
    recent: tuple[float, ...] = ()
    number: int = 0


@dataclass(frozen=True)
class Report:
    """Of an update that came: its client's `utility`, and the seconds from being asked to its arrival."""

    utility: float
    seconds: float


def utility(examples: int, mean_square: float) -> float:
    """What a client's data can still teach: examples x sqrt(mean of the squared loss of each), 0 if not finite."""
    value = examples * math.sqrt(mean_square) if mean_square >= 0 else 0.0
    return value if math.isfinite(value) else 0.0


def recorded(
    history: History,
    number: int,
    reports: Mapping[str, Report],
    missing: Collection[str] = (),
    waited: float = 0.0,
    window: int = 20,
    pace: float = 5.0,
) -> History:
    """The history after a round that was closed; the same if it has been recorded before.

    Args:
        history: before.
        number: of the round, from 1.
        reports: of those whose updates are in the average.
        missing: who was asked, and is not in it.
        waited: seconds, for those.
        window: rounds that the pacer compares with as many before.
        pace: percentage points that it adds or takes.
    """
    if number <= history.number:
        return history
    clients = dict(history.clients)
    for client in missing:
        before = clients.get(client, Seen(None, 0.0, number))
        clients[client] = replace(before, seconds=max(before.seconds, waited), last=number)
    for client, report in reports.items():
        times = clients[client].times + 1 if client in clients else 1
        clients[client] = Seen(_finite(report.utility), _finite(report.seconds), number, times)
    mean = math.fsum(_finite(report.utility) for report in reports.values()) / max(1, len(reports))
    return _paced(replace(history, clients=clients, number=number, recent=(*history.recent, mean)), window, pace)


def to_json(history: History) -> dict[str, Any]:
    """For a journal."""
    return asdict(history)


def from_json(plain: Mapping[str, Any]) -> History:
    """Of `to_json`."""
    clients = {client: Seen(**one) for client, one in plain["clients"].items()}
    return History(clients, plain["percentile"], tuple(plain["recent"]), plain["number"])


def _paced(history: History, window: int, pace: float) -> History:
    """The percentile moves once a window, by the sums of utility of the last and of the one before it."""
    recent = history.recent[-2 * window :]
    history = replace(history, recent=recent)
    if len(recent) < 2 * window or history.number % window:
        return history
    before, now = sum(recent[:window]), sum(recent[window:])
    if abs(now - before) <= 0.1 * before:
        return replace(history, percentile=min(100.0, history.percentile + pace))
    if abs(now - before) >= 5 * before:
        return replace(history, percentile=max(pace, history.percentile - pace))
    return history


def _finite(value: float) -> float:
    return min(value, _LARGEST) if math.isfinite(value) and value > 0 else 0.0
