"""What a server's children stand before: one gate for all of them, or a lane each; of an edge, or of the top."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from splitllm.deployment.board import Board, LaneRecord
from splitllm.deployment.bounds import allowed
from splitllm.deployment.halls import hall_of, merges_of
from splitllm.deployment.held import Held
from splitllm.deployment.journal import Journal
from splitllm.deployment.past import Past
from splitllm.deployment.record import Record
from splitllm.deployment.station import Station
from splitllm.metrics import Metrics
from splitllm.recipe import Recipe, children_of, clients_below, goes_by_lanes
from splitllm.roles.assembly import batching_of, entries_of
from splitllm.roles.buffered import BufferedHall
from splitllm.roles.gate import Gate
from splitllm.roles.generation import Summit
from splitllm.roles.hall import Hall
from splitllm.roles.lanes import Lanes
from splitllm.roles.rounds import Rounds
from splitllm.roles.runner import Batching
from splitllm.roles.server import Commit, Server
from splitllm.roles.together import Tensors
from splitllm.roles.worker import Worker
from splitllm.wire.uplink import RemoteLink

logger = logging.getLogger(__name__)
Door = Gate | Lanes
EVERYBODY = -1
"""The lane of a server that has only one, for all its clients."""


def journals_of(station: Station) -> dict[int, Journal]:
    """Of the lanes of a server: those of its clients, or one for everybody.

    Raises:
        CheckpointError: another process has one open, or it is that of another run.
    """
    if not goes_by_lanes(station.recipe):
        return {EVERYBODY: station.journal()}
    return {client: station.journal(f"client-{client}") for client in clients_below(station.recipe, station.name)}


def door_of(station: Station, journals: Mapping[int, Journal], worker: Worker, uplink: RemoteLink | None) -> Door:
    """The server with its door, of an edge or, where there is no uplink, of the top."""
    taken_in = station.plan.admissions.get(station.name)
    batching = batching_of(station.recipe, worker, station.device, taken_in.room if taken_in is not None else None)
    metrics = Metrics(station.options.directory, steps=station.recipe.train.steps, console=Console(quiet=True))
    if uplink is None:
        _say_what_is_left_out(station.recipe)
    if EVERYBODY in journals:
        record = Record(station, metrics) if uplink is None else None
        return _gate(station, journals[EVERYBODY], worker, batching, uplink, record)
    board = Board(station, metrics) if uplink is None else None
    held = _held(station, journals, worker)
    hall = hall_of(station, journals, held, uplink, None if board is None else board.averaged)
    gates = {}
    for client, journal in journals.items():
        lane = board.records[client] if board is not None else None
        gates[client] = _gate(station, journal, worker.lane(client), batching, uplink, lane, client, held, hall)
        if lane is not None and journal.finished:
            lane.put_back(journal.newest_values()["beside"])
            lane.board.has_ended(client)

    def over(client: int) -> None:
        journals[client].mark_over()
        if held is not None:
            held.over(client)
        if board is not None:
            board.over(client)

    lanes = Lanes(gates, batching, station.recipe.server.park_after, over, hall, merges_of(station, hall))
    for client in [client for client, journal in journals.items() if journal.over]:
        lanes.ended(client)
    if board is not None and all(journal.finished or journal.over for journal in journals.values()):
        board.done()
    return lanes


def _held(station: Station, journals: Mapping[int, Journal], worker: Worker) -> Held | None:
    """What all lanes train in common, as it was kept."""
    if worker.common is None:
        return None
    committed = {client: max(journal.steps(), default=0) for client, journal in journals.items()}
    return Held(worker.common, station.journal("common"), station.recipe.train.steps, committed)


def room_of(recipe: Recipe, under_way: int, clients: int) -> int:
    """Requests of one child that are answered at once: micro-batches, and what its clients do together or each."""
    return under_way * clients + (clients if goes_by_lanes(recipe) else 1)


def _gate(
    station: Station,
    journal: Journal,
    worker: Worker,
    batching: Batching,
    uplink: RemoteLink | None,
    record: Record | LaneRecord | None,
    client: int = EVERYBODY,
    held: Held | None = None,
    hall: Hall | BufferedHall | None = None,
) -> Gate:
    recipe, name = station.recipe, station.name
    kept = (record.values, record.put_back) if record is not None else ()
    entries = entries_of(recipe, name)
    assembly, lane = station.assembly(), None if client == EVERYBODY else client
    rounds = assembly.rounds(name, station.tier, worker, entries, lane)
    own: dict[str, Any] = {} if rounds is None else {"exported": _exported(rounds, hall), "scaled": rounds.scaled}
    past = Past(station, journal, worker, *kept, held=held, speaks_for=batching.runner.worker, **own)
    children = children_of(recipe, name)
    if client != EVERYBODY:
        children = [child for child in children if client in clients_below(recipe, child)]
    server = Server(
        name,
        children,
        worker,
        uplink=uplink,
        top=assembly.top(record.stepped, record.averaged) if record is not None else None,
        summed=assembly.summed(worker),
        entries=entries,
        local=assembly.rounding.local(entries),
        rounds=rounds,
        lane=lane is not None,
        hall=hall if isinstance(hall, Hall) and station.tier == 1 else None,
        schedule=station.schedule,
        batching=batching,
        traffic=uplink.of_client[client] if uplink is not None and client != EVERYBODY else None,
        device=station.device,
        commit=past.committing if record is not None else _said(past, client),
    )
    return Gate(
        server,
        past,
        allowed(station.plan, name, lane),
        summit=_summit(record, past) if record is not None else None,
        patience=_patience(station),
        finished_at=recipe.train.steps if journal.finished else None,
        lane=max(client, 0),
    )


def _exported(rounds: Rounds, hall: Hall | BufferedHall | None) -> Callable[[], Tensors]:
    """A role's part of the adapter; of a lane of the top with what its hall has made of all that rounds average."""
    return rounds.adapter if hall is None else lambda: rounds.adapter() | hall.rounds.decided()


def _said(past: Past, client: int) -> Commit:
    """What a server below the top does at each commit: it is the top that tells more of it."""

    def commit(step: int, generation: int) -> Callable[[], None]:
        write = past.committing(step, generation)

        def say() -> None:
            write()
            lane = {} if client == EVERYBODY else {"client": client}
            logger.info("step", extra={"fields": {"step": step, **lane}})

        return say

    return commit


def _summit(record: Record | LaneRecord, past: Past) -> Summit:
    """Generations are numbered by the clock, and on from the last that committed a step, should the clock go back."""
    committed = [int(origin) for step, origin in past.standing().states if step]
    first = max([time.time_ns() // 1_000_000, *committed])
    return Summit(record.begun, record.evaluated, record.finish, first=first)


def _say_what_is_left_out(recipe: Recipe) -> None:
    """A deployment has no place that holds all rows, or the whole base: what needs them is for `splitllm train`."""
    for key, wanted in (("verify_adapter", recipe.train.verify_adapter), ("trackers", recipe.train.trackers)):
        if wanted:
            logger.info("left out", extra={"fields": {"key": f"train.{key}", "reason": "only splitllm train does it"}})


def _patience(station: Station) -> float | None:
    """Servers further up wait longer, so that those below them have decided first."""
    wire = station.recipe.wire
    return wire.drop_after * station.tier if wire.absent == "drop" else None
