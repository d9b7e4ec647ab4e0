"""A server of a recipe, edge or cloud, as a process of its own; reads from top to bottom."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from splitllm.deployment import admission
from splitllm.deployment.above import Told, tell_above
from splitllm.deployment.bounds import in_flight, limits
from splitllm.deployment.door import Door, door_of, journals_of, room_of
from splitllm.deployment.observe import Metered, Observer
from splitllm.deployment.quota import Quotas, limits_of, metered
from splitllm.deployment.ranks import follow
from splitllm.deployment.reach import say_who_is_missing
from splitllm.deployment.station import Options, Station, open_station
from splitllm.deployment.stop import Stop
from splitllm.errors import DivergedError, RankError, RunInterrupted, SplitLLMError
from splitllm.ranks.follower import LEADER
from splitllm.recipe import Recipe, children_of, client_names, clients_below, goes_by_lanes
from splitllm.roles.assembly import coding_of
from splitllm.roles.elsewhere import opened
from splitllm.roles.lanes import Lanes
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
        RankError: another process of this server is gone.
        RunInterrupted: SIGTERM or Ctrl-C; the same command goes on where the run is.
    """
    station = open_station(recipe, options, client=None)
    if station.peers is None or station.peers.rank == LEADER:
        asyncio.run(_lead(station))
    else:
        follow(station)


async def _lead(station: Station) -> None:
    """Serve; however that ends, the other ranks end with it."""
    try:
        await _serve(station)
    finally:
        await station.let_go()
    logger.info("complete")


async def _serve(station: Station) -> None:
    journals, stop, address = journals_of(station), Stop(), station.address()
    finished = all(journal.finished or journal.over for journal in journals.values())
    if finished:
        logger.info("the run was complete already", extra={"fields": {"seconds to stay": LINGER_SECONDS}})
    uplink = station.uplink() if station.tier + 1 < len(station.recipe.split.tiers) else None
    told: Told | None = None
    if uplink is not None and not finished:  # nobody may be up there any more once the run is complete
        told = await stop.unless_asked(station.welcomed(uplink))
    door = door_of(station, journals, await stop.unless_asked(station.load(told)), uplink)
    trouble: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    recipe = station.recipe
    lanes = clients_below(recipe, station.name) if goes_by_lanes(recipe) else []
    observer = Observer(recipe.train.batch_size, lanes)
    sessions = Sessions(observer.watched(_reception(station, door, trouble, told)))
    stop_metrics = observer.serve(station.options.metrics, sessions)
    streams = 2 * len(door.children) + SPARE_STREAMS
    listener = Listener(address, sessions.serve, station.credentials, station.recipe.wire.keepalive, streams)
    port = await listener.start()
    logger.info("listening", extra={"fields": {"port": port, "tls": station.credentials is not None}})
    watch = asyncio.create_task(say_who_is_missing(door.missing))
    try:
        async with opened(None if isinstance(door, Lanes) or finished else door.server.elsewhere):
            await _until_complete(door, trouble, uplink, stop)
    except (RunInterrupted, RankError):
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
            await uplink.close(goodbye=door.finished.is_set() and not finished)
        stop_metrics()


async def _until_complete(door: Door, trouble: asyncio.Future[None], uplink: RemoteLink | None, stop: Stop) -> None:
    """Until every child has its last answer; raises what ends the run before that."""
    finished, asked = asyncio.create_task(door.finished.wait()), asyncio.create_task(stop.asked.wait())
    failures = {trouble, uplink.failed} if uplink is not None else {trouble}
    try:
        ends: list[asyncio.Future[Any]] = [finished, asked, *failures]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        finished.cancel()
        asked.cancel()
    if door.finished.is_set():
        await _linger(door, stop)
        return
    for failure in failures:
        if failure.done():
            failure.result()
    raise RunInterrupted("stopped; start it again with the same command to go on where the run is")


async def _linger(door: Door, stop: Stop) -> None:
    """Stay for children that were lost at the very end, and come back to hear that it was."""
    ends = {asyncio.create_task(event.wait()) for event in (door.all_left, stop.asked)}
    await asyncio.wait(ends, timeout=LINGER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    if not door.all_left.is_set():
        logger.warning("some children never said goodbye; if one comes back, start this role again")


def _reception(station: Station, door: Door, trouble: asyncio.Future[None], told: Told | None) -> Reception:
    recipe = station.recipe
    under_way = in_flight(station.plan, station.name)
    if under_way < recipe.train.in_flight:
        fields = {"in flight": under_way, "wire.memory_mib": recipe.wire.memory_mib}
        logger.info("memory limits micro-batches in flight", extra={"fields": fields})
    if told is not None:
        under_way = min(under_way, told.in_flight)
    taken_in = station.plan.admissions.get(station.name)
    admission.say(recipe, taken_in)
    assert door.batching is not None, "a role of a deployment has a shard"
    account, clients = door.batching.runner.account, client_names(recipe)

    def fatal(error: BaseException) -> None:
        if isinstance(door, Lanes) and isinstance(error, DivergedError):
            logger.warning("a lane is over", extra={"fields": {"reason": str(error)}})
        elif not trouble.done():
            trouble.set_exception(error)

    return Metered(
        admit=lambda hello, identity: _admit(station, hello, identity, under_way),
        answer=metered(
            door.handle, Quotas(limits_of(station.plan, station.name)), account, coding_of(recipe, station.name)
        ),
        check=admission.checked(door.check, taken_in),
        room=lambda child: room_of(recipe, under_way, len(clients_below(recipe, child))),
        coding=lambda: coding_of(recipe, station.name),
        limits=limits(station.plan, station.plan.role_bounds[station.name][0]),
        back=door.back,
        away=door.away,
        left=door.left,
        fatal=fatal,
        account=account,
        occupancy=station.device.occupancy,
        tenants={client: clients[client] for client in clients_below(recipe, station.name)},
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
    start, stop = station.plan.role_bounds[name]
    return name, {
        "name": station.name,
        "shard": [start, stop],
        "batch_size": admission.rows_for(recipe, station.plan.admissions.get(station.name), name),
        "accumulate": recipe.train.accumulate,
        "in_flight": under_way,
        "lora": recipe.lora.model_dump(mode="json", exclude={"start_from"}),
    }
