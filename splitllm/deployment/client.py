"""A client of a recipe as a process of its own, beside its text; reads from top to bottom."""

from __future__ import annotations

import asyncio
import logging
import time

from splitllm.data.batching import BatchStream, eval_batches
from splitllm.deployment.above import Told, tell_above
from splitllm.deployment.past import Past
from splitllm.deployment.station import Options, Station, open_station
from splitllm.deployment.stop import Stop
from splitllm.errors import DivergedError, RejoinError, RunInterrupted
from splitllm.recipe import Recipe, tier_of, what_leaves_in_a_deployment
from splitllm.roles.assembly import names_rows
from splitllm.roles.client import Client, StepReport
from splitllm.roles.generation import Begun
from splitllm.roles.rounds import Rounds
from splitllm.roles.together import state_in
from splitllm.wire.uplink import RemoteLink

logger = logging.getLogger(__name__)
STOP_SECONDS = 10.0


def attend(recipe: Recipe, options: Options) -> None:
    """Train on this client's rows until the run is complete.

    Args:
        recipe: the run; the same for all its roles.
        options: of this process.

    Raises:
        RecipeError: the recipe cannot run here.
        PeerError: the server refuses this client.
        RunInterrupted: SIGTERM or Ctrl-C; the same command goes on where the run is.
    """
    station = open_station(recipe, options, client=tier_of(recipe, options.name)[1])
    asyncio.run(_attend(station))


async def _attend(station: Station) -> None:
    journal, stop = station.journal(), Stop()
    if journal.finished:
        logger.info("the run was complete already")
        return
    logger.info("leaves the device", extra={"fields": {"what": what_leaves_in_a_deployment(station.recipe)}})
    uplink, complete = station.uplink(), False
    try:
        told = await stop.unless_asked(station.welcomed(uplink))
        blocks = f"{told.shard[0]}..{told.shard[1] - 1}"
        logger.info("cut", extra={"fields": {"blocks": blocks, "batch size": told.batch_size}})
        worker = await stop.unless_asked(station.load(told))
        rounds = station.assembly().rounds(station.name, 0, worker, {})
        past = Past(station, journal, worker, exported=None if rounds is None else rounds.adapter)
        client = _client(station, past, uplink, told, rounds)
        await _until_complete(Member(station, client, past, stop), past, stop)
        complete = True
    except DivergedError as error:
        await tell_above(uplink, station.name, error, tier_of(station.recipe, station.name)[1])
        raise
    finally:
        await uplink.close(goodbye=complete)
    logger.info("complete")


async def _until_complete(member: Member, past: Past, stop: Stop) -> None:
    """Work until the run is complete; when the user asks to stop, the step under way may come to its end."""
    work, asked = asyncio.create_task(_work(member, past)), asyncio.create_task(stop.asked.wait())
    try:
        await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done() and member.in_step:
            await asyncio.wait({work}, timeout=STOP_SECONDS)
        if not work.done():
            raise RunInterrupted(member.stopped())
        work.result()
    finally:
        work.cancel()
        asked.cancel()


async def _work(member: Member, past: Past) -> None:
    while True:
        try:
            await member.take_part()
            break
        except RejoinError as error:
            logger.info("rejoining", extra={"fields": {"reason": str(error)}})
    past.mark_finished()


class Member:
    """A client between its first join and the end of the run.

    Attributes:
        in_step: whether a step is under way.
    """

    def __init__(self, station: Station, client: Client, past: Past, stop: Stop) -> None:
        self._recipe, self._client, self._past, self._stop = station.recipe, client, past, stop
        self._device, self.in_step = station.device, False

    async def take_part(self) -> None:
        """Join, go back to the step that the top names, train to the last one, and finish.

        Raises:
            RejoinError: the generation is over.
            RunInterrupted: the user stopped this client between two steps.
        """
        self.in_step = False
        begun = await self._join()
        train, step = self._recipe.train, begun.decision.step
        if self._evaluates(step) and not begun.evaluated:
            await self._evaluate(step)
        while step < train.steps:
            if self._stop.asked.is_set():
                raise RunInterrupted(f"stopped after step {step} of {train.steps}; start it again to go on")
            started = time.perf_counter()
            self.in_step = True
            report = await self._client.step(step)
            self.in_step = False
            step += 1
            self._say(step, report, time.perf_counter() - started)
            if self._evaluates(step):
                await self._evaluate(step)
        await self._finish()

    def stopped(self) -> str:
        """What is said when the user stopped this client before a step came to its end, or while it waits."""
        what = "in the middle of a step, which will be run again" if self.in_step else "between two steps"
        return f"{self._client.name}: stopped {what}; start it again to go on"

    async def _join(self) -> Begun:
        standing = await self._device.run(self._past.standing)
        header = {"standings": {self._client.name: standing.to_json()}}
        place = (0, self._client.index, 0)
        reply = await self._client.uplink.request(self._client.message("join", place, header))
        begun = Begun.from_reply(reply)
        decision, name = begun.decision, self._client.name
        self._client.generation = begun.number
        if name not in decision.lacking:
            await self._device.run(lambda: self._past.restore(decision.step))
        if decision.lacking:
            given = self._past.state() if name in decision.donors.values() else {}
            reply = await self._client.uplink.request(self._client.message("share", place, {}, given))
            if name in decision.lacking:
                state = state_in(reply, self._past.adapter())
                await self._device.run(lambda: self._past.adopt(decision.step, decision.origin, state))
        logger.info("joined", extra={"fields": {"step": decision.step, "generation": begun.number}})
        return begun

    def _evaluates(self, step: int) -> bool:
        every, last = self._recipe.train.eval_every, self._recipe.train.steps
        return step in (0, last) or (every is not None and step % every == 0)

    async def _evaluate(self, step: int) -> None:
        report = await self._client.evaluate()
        losses = {self._client.index: report.sums()}
        await self._client.uplink.request(
            self._client.message("evaluated", (step, self._client.index, 0), {"losses": losses})
        )

    async def _finish(self) -> None:
        words = {self._client.name: self._past.closing_words()}
        place = (self._recipe.train.steps, self._client.index, 0)
        await self._client.uplink.request(self._client.message("finish", place, {"roles": words}, self._past.adapter()))

    def _say(self, step: int, report: StepReport, seconds: float) -> None:
        traffic = self._client.uplink.traffic
        fields = {
            "step": step,
            "loss": report.loss / report.labels if report.labels else None,
            "tokens": report.tokens,
            "seconds": seconds,
        }
        logger.info("step", extra={"fields": {**fields, "bytes_up": traffic.up, "bytes_down": traffic.down}})


def _client(station: Station, past: Past, uplink: RemoteLink, told: Told, rounds: Rounds | None) -> Client:
    recipe, index = station.recipe, tier_of(station.recipe, station.name)[1]
    corpus, batch_size = station.plan.corpus, told.batch_size
    return Client(
        station.name,
        index,
        past.worker,
        uplink,
        BatchStream(corpus.train[index], batch_size, recipe.seed, index),
        eval_batches(corpus.eval[index], batch_size),
        whole=False,
        summed=station.assembly().summed(past.worker),
        accumulate=told.accumulate,
        in_flight=told.in_flight,
        schedule=station.schedule,
        name_rows=names_rows(recipe),
        local=station.assembly().rounding.local({}),
        rounds=rounds,
        device=station.device,
        commit=past.commit,
    )
