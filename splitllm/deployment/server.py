"""A server of a recipe, edge or cloud, as a process of its own; reads from top to bottom."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from splitllm.deployment.bounds import allowed, in_flight, limits
from splitllm.deployment.journal import Journal
from splitllm.deployment.observe import Observer
from splitllm.deployment.reach import say_who_is_missing
from splitllm.deployment.record import Record
from splitllm.deployment.station import Options, Past, Station, Stop, Told, open_station, tell_above
from splitllm.errors import DivergedError, RunInterrupted, SplitLLMError
from splitllm.metrics import Metrics
from splitllm.recipe import Recipe, children_of, clients_below
from splitllm.roles.assembly import coding_of
from splitllm.roles.gate import Gate
from splitllm.roles.generation import Summit
from splitllm.roles.server import Server
from splitllm.roles.worker import Worker
from splitllm.wire.remote import Listener
from splitllm.wire.sessions import Reception, Sessions
from splitllm.wire.stream import Refused
from splitllm.wire.uplink import RemoteLink

logger = logging.getLogger(__name__)
LINGER_SECONDS = 30.0
GRACE_SECONDS = 2.0
SPARE_STREAMS = 16


def serve(recipe: Recipe, options: Options) -> None:
    """Serve one edge or the cloud until its run is complete.

    Args:
        recipe: the run; the same for all its roles.
        options: of this process.

    Raises:
        RecipeError: the recipe cannot run here.
        PeerError: the role above refuses this one.
        RunInterrupted: SIGTERM or Ctrl-C; the same command goes on where the run is.
    """
    station = open_station(recipe, options, client=None)
    asyncio.run(_serve(station))


async def _serve(station: Station) -> None:
    journal, stop, address = station.journal(), Stop(), station.address()
    finished_at = station.recipe.train.steps if journal.finished else None
    if finished_at is not None:
        logger.info("the run was complete already", extra={"fields": {"seconds to stay": LINGER_SECONDS}})
    uplink = station.uplink() if station.tier + 1 < len(station.recipe.split.tiers) else None
    told: Told | None = None
    if uplink is not None and finished_at is None:  # nobody may be up there any more once the run is complete
        told = await stop.unless_asked(station.welcomed(uplink))
    gate = _gate(station, journal, await stop.unless_asked(station.load(told)), uplink, finished_at)
    trouble: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    observer = Observer(station.recipe.train.batch_size)
    sessions = Sessions(observer.watched(_reception(station, gate, trouble, told)))
    stop_metrics = observer.serve(station.options.metrics, sessions)
    streams = 2 * len(gate.children) + SPARE_STREAMS
    listener = Listener(address, sessions.serve, station.credentials, station.recipe.wire.keepalive, streams)
    port = await listener.start()
    logger.info("listening", extra={"fields": {"port": port, "tls": station.credentials is not None}})
    watch = asyncio.create_task(say_who_is_missing(gate.missing))
    try:
        await _until_complete(gate, trouble, uplink, stop)
    except RunInterrupted:
        raise  # to be started again: the others wait
    except SplitLLMError as error:
        sessions.tell_all(error)
        if uplink is not None and isinstance(error, DivergedError):
            await tell_above(uplink, station.name, error)
        raise
    finally:
        watch.cancel()
        # First, so that no child hears how the questions end that are under way above.
        await listener.stop(GRACE_SECONDS)
        if uplink is not None:
            await uplink.close(goodbye=gate.finished.is_set() and finished_at is None)
        stop_metrics()
    logger.info("complete")


async def _until_complete(gate: Gate, trouble: asyncio.Future[None], uplink: RemoteLink | None, stop: Stop) -> None:
    """Until every child has its last answer; raises what ends the run before that."""
    finished, asked = asyncio.create_task(gate.finished.wait()), asyncio.create_task(stop.asked.wait())
    failures = {trouble, uplink.failed} if uplink is not None else {trouble}
    try:
        ends: list[asyncio.Future[Any]] = [finished, asked, *failures]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        finished.cancel()
        asked.cancel()
    if gate.finished.is_set():
        await _linger(gate, stop)
        return
    for failure in failures:
        if failure.done():
            failure.result()
    raise RunInterrupted("stopped; start it again with the same command to go on where the run is")


async def _linger(gate: Gate, stop: Stop) -> None:
    """Stay for children that were lost at the very end, and come back to hear that it was."""
    ends = {asyncio.create_task(event.wait()) for event in (gate.all_left, stop.asked)}
    await asyncio.wait(ends, timeout=LINGER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    if not gate.all_left.is_set():
        logger.warning("some children never said goodbye; if one comes back, start this role again")


def _gate(
    station: Station, journal: Journal, worker: Worker, uplink: RemoteLink | None, finished_at: int | None
) -> Gate:
    """The server with its door, of an edge or, where there is no uplink, of the top."""
    summit = None
    if uplink is not None:
        past = Past(station, journal, worker)
        server = _edge(station, past, uplink)
    else:
        metrics = Metrics(station.options.directory, steps=station.recipe.train.steps, console=Console(quiet=True))
        record = Record(station, metrics)
        _say_what_is_left_out(station.recipe)
        past = Past(station, journal, worker, record.values, record.put_back)
        server, summit = _cloud(station, past, record), _summit(record, past)
    bounds = allowed(station.plan, station.name)
    return Gate(server, past, bounds, summit=summit, patience=_patience(station), finished_at=finished_at)


def _say_what_is_left_out(recipe: Recipe) -> None:
    """A deployment has no place that holds all rows, or the whole base: what needs them is for `splitllm train`."""
    for key, wanted in (("verify_adapter", recipe.train.verify_adapter), ("trackers", recipe.train.trackers)):
        if wanted:
            logger.info("left out", extra={"fields": {"key": f"train.{key}", "reason": "only splitllm train does it"}})


def _edge(station: Station, past: Past, uplink: RemoteLink) -> Server:
    def commit(step: int, generation: int) -> None:
        past.commit(step, generation)
        logger.info("step", extra={"fields": {"step": step}})

    return Server(
        station.name,
        children_of(station.recipe, station.name),
        past.worker,
        uplink=uplink,
        replicas=station.replicas,
        schedule=station.schedule,
        device=station.device,
        commit=commit,
    )


def _cloud(station: Station, past: Past, record: Record) -> Server:
    return Server(
        station.name,
        children_of(station.recipe, station.name),
        past.worker,
        top=station.assembly().top(record.stepped),
        schedule=station.schedule,
        device=station.device,
        commit=past.commit,
    )


def _summit(record: Record, past: Past) -> Summit:
    """Generations are numbered by the clock, and on from the last that committed a step, should the clock go back."""
    committed = [int(origin) for step, origin in past.standing().states if step]
    first = max([time.time_ns() // 1_000_000, *committed])
    return Summit(record.begun, record.evaluated, record.finish, first=first)


def _reception(station: Station, gate: Gate, trouble: asyncio.Future[None], told: Told | None) -> Reception:
    recipe = station.recipe
    under_way = in_flight(station.plan, station.name)
    if under_way < recipe.train.in_flight:
        fields = {"in flight": under_way, "wire.memory_mib": recipe.wire.memory_mib}
        logger.info("memory limits micro-batches in flight", extra={"fields": fields})
    if told is not None:
        under_way = min(under_way, told.in_flight)

    def fatal(error: BaseException) -> None:
        if not trouble.done():
            trouble.set_exception(error)

    return Reception(
        admit=lambda hello, identity: _admit(station, hello, identity, under_way),
        answer=gate.handle,
        check=gate.allowed.check,
        room=lambda child: under_way * len(clients_below(recipe, child)) + 1,
        coding=lambda: coding_of(recipe, station.name),
        limits=limits(station.plan),
        back=gate.back,
        away=gate.away,
        left=gate.left,
        fatal=fatal,
    )


def _admit(
    station: Station, hello: Mapping[str, Any], identity: str | None, under_way: int
) -> tuple[str, dict[str, Any]]:
    """Who may come in, and what it is told: its cut, batch size and adapter."""
    recipe, name = station.recipe, str(hello.get("name"))[:80]
    if identity is not None and identity != name:
        raise Refused("identity", f"the certificate is that of {identity}, but the process says that it is {name}")
    children = children_of(recipe, station.name)
    if name not in children:
        raise Refused("mismatch", f"{name} does not belong to {station.name} (its children: {', '.join(children[:8])})")
    for key, what in (("recipe", "recipe"), ("model", "base model")):
        if hello.get(key) != station.identity[key]:
            raise Refused(
                "mismatch", f"{name} has another {what} than {station.name}: give both the same and start it again"
            )
    start, stop = station.plan.bounds[station.tier - 1]
    return name, {
        "name": station.name,
        "shard": [start, stop],
        "batch_size": recipe.train.batch_size,
        "accumulate": recipe.train.accumulate,
        "in_flight": under_way,
        "lora": recipe.lora.model_dump(mode="json", exclude={"start_from"}),
    }


def _patience(station: Station) -> float | None:
    """Servers further up wait longer, so that those below them have decided first."""
    wire = station.recipe.wire
    return wire.drop_after * station.tier if wire.absent == "drop" else None
