"""The whole job in one process per rank: check, load, train, save; reads from top to bottom.

Losses are mean cross-entropy in nats per predicted token.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from splitllm.checkpoint import TrainingState
from splitllm.errors import RecipeError, RunInterrupted
from splitllm.metrics import Metrics, Tracker
from splitllm.plan import refuse_without_room
from splitllm.preflight import prepare
from splitllm.recipe import Recipe, goes_by_rounds, intervals, level_due, rounds_line, what_leaves_the_device
from splitllm.roles.assembly import Assembly, Site, schedule_of
from splitllm.roles.client import StepReport
from splitllm.roles.elsewhere import opened
from splitllm.roles.server import Counts
from splitllm.running.base import open_base
from splitllm.running.interrupt import StopSignal
from splitllm.running.memory import announced
from splitllm.running.outcome import fingerprint, finish, keep_recipe, measure, restore, save, saved_state
from splitllm.running.results import log_round
from splitllm.running.state import Run
from splitllm.running.world import Processes, World, open_world, share_cores

STOP_SECONDS = 0.2  # between looks for Ctrl-C, while other sites are waited for


def train(recipe: Recipe, output_dir: str | os.PathLike[str], resume: bool = False) -> dict[str, Any]:
    """Fine-tune as the recipe says; every tier runs in this process, or is spread over those of `accelerate launch`.

    Args:
        recipe: from `load_recipe`.
        output_dir: receives recipe, metrics, checkpoints, adapter and summary, once all checks have passed.
        resume: go on from the newest checkpoint in `output_dir`.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        RecipeError: the recipe cannot run, with every reason; or `--resume` meets another recipe.
        CheckpointError: the base model or the checkpoint to resume from is not whole.
        RunInterrupted: the user stopped the run; a checkpoint was left.
    """
    run, saved = opened_run(recipe, Path(output_dir), resume)
    with run.metrics:
        restore(run, saved)
        _announce(run)
        with StopSignal() as stop:
            return _complete(carry_out(run, stop))


def opened_run(recipe: Recipe, directory: Path, resume: bool = False) -> tuple[Run, TrainingState | None]:
    """Check and load everything; the run, and the checkpoint that it goes on from.

    Raises:
        RecipeError, CheckpointError: as those of `train`.
    """
    saved = saved_state(recipe, directory, resume)
    if recipe.server.processes > 1:
        advice = "splitllm train spreads roles over train.processes; set it to 1"
        raise RecipeError([f"server.processes: {recipe.server.processes} is for a server started by itself; {advice}"])
    processes = Processes(recipe.train.processes, "train.processes")
    share_cores(recipe.train, processes)
    plan = prepare(recipe, here=True)
    refuse_without_room(plan)
    world = open_world(recipe.train, directory, processes)
    base = open_base(recipe, directory, world)
    data = fingerprint(plan.corpus, base, saved)
    schedule = schedule_of(recipe.train.schedule, recipe.train.steps)
    roles = Assembly(recipe, plan.corpus, base, plan.modules, plan.role_bounds, schedule, _site(world)).build()
    tracker = _tracker(world, recipe)
    metrics = Metrics(directory, steps=recipe.train.steps, enabled=world.rank == 0, tracker=tracker)
    return Run(plan, world, directory, roles, metrics, data), saved


def _complete(job: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Run to the end; in a notebook, whose own event loop is already running, on a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, job).result()


async def carry_out(run: Run, stop: StopSignal) -> dict[str, Any]:
    """Evaluate, train to the last step, evaluate, save."""
    recipe, summary = run.recipe.train, run.directory / "summary.json"
    if run.totals.loss_after is not None and summary.exists():
        run.metrics.say(f"{run.directory} is complete ({recipe.steps} of {recipe.steps} steps); nothing to do")
        told: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
        return told
    async with opened(run.roles.elsewhere):
        return await _train(run, stop)


async def _train(run: Run, stop: StopSignal) -> dict[str, Any]:
    recipe = run.recipe.train
    if run.totals.loss_before is None:
        run.totals.loss_before = await _evaluate(run)
    while run.step < recipe.steps:
        if run.world.any(stop.asked):
            raise RunInterrupted(_stopped(run, save(run)))
        await _step_with_others(run, stop)
        measure(run)
        last = run.step == recipe.steps
        if recipe.eval_every and run.step % recipe.eval_every == 0 and not last:
            await _evaluate(run)
        if run.step % recipe.checkpoint_every == 0 and not last:
            save(run)
    if run.totals.loss_after is None:
        run.totals.loss_after = await _evaluate(run)
        save(run)
    return finish(run)


async def _step_with_others(run: Run, stop: StopSignal) -> None:
    """The same as `_step`, which may end with a round of several sites: until that is held, nothing of it counts.

    Raises:
        RunInterrupted: the user does not wait for them any longer.
    """
    elsewhere = run.roles.elsewhere
    if elsewhere is None or level_due(run.recipe, run.step + 1) < len(intervals(run.recipe)):
        await _step(run)
        return
    before, step = save(run), asyncio.create_task(_step(run))
    try:
        while not step.done():
            await asyncio.wait({step}, timeout=STOP_SECONDS)
            if elsewhere.waits and stop.asked:
                raise RunInterrupted(_stopped(run, before))
        step.result()
    finally:
        step.cancel()


async def _step(run: Run) -> None:
    """One optimiser step of every role, and its line of metrics."""
    started = time.perf_counter()
    reports = await asyncio.gather(*(client.step(run.step) for client in run.roles.clients))
    seconds = time.perf_counter() - started
    now, then = run.roles.traffic(), run.crossed
    run.crossed, run.step = now, run.step + 1
    loss, labels, tokens, up, down = run.world.sum_numbers([*_sums(reports), now.up - then.up, now.down - then.down])
    run.totals.add(int(tokens), seconds, int(up), int(down))
    log_round(run.metrics, run.step, run.roles.reports)
    run.roles.reports.clear()
    if run.step % run.recipe.train.log_every and run.step < run.recipe.train.steps:
        return
    recent = run.totals.since_logged()
    recipe = run.recipe.train
    rate = recipe.optimizer.lr * run.roles.clients[0].schedule(run.step - 1)
    run.metrics.log(
        "train", step=run.step, loss=loss / labels, **recent, lr=rate, grad_norm=reports[0].norm, clients=_clients(run)
    )


async def _evaluate(run: Run) -> float:
    """Mean loss over every client's held-out rows."""
    reports = [await client.evaluate() for client in run.roles.clients]
    run.crossed = run.roles.traffic()  # what an evaluation sends is not training traffic
    loss, labels, tokens = run.world.sum_numbers(_sums(reports))
    run.metrics.log("eval", step=run.step, loss=loss / labels, tokens=int(tokens))
    return loss / labels


def _sums(reports: Sequence[StepReport]) -> list[float]:
    return [sum(r.loss for r in reports), sum(r.labels for r in reports), sum(r.tokens for r in reports)]


def _clients(run: Run) -> int:
    return next(iter(run.recipe.split.tiers.values()))


def _announce(run: Run) -> None:
    """The run's header; on rank 0 this is the first thing written."""
    if run.world.rank == 0:
        keep_recipe(run)
    run.metrics.say(f"{run.recipe.model.base} cut into {' | '.join(run.plan.tier_lines())}")
    run.metrics.say(f"leaves the device: {what_leaves_the_device(run.recipe)}")
    if goes_by_rounds(run.recipe):
        run.metrics.say(f"rounds: {rounds_line(run.recipe)}")
    for line in announced(run.plan.ledger):
        run.metrics.say(line)
    for share in run.plan.corpus.shares:
        groups = f" ({', '.join(share.groups)})" if share.groups else ""
        run.metrics.say(f"{share.client}: {share.examples} rows, {share.tokens} tokens{groups}")


def _stopped(run: Run, folder: Path) -> str:
    return (
        f"stopped after step {run.step} of {run.recipe.train.steps}, which is saved in {folder}; "
        f"run the same command with --resume to go on"
    )


def _site(world: World) -> Site:
    def all_counts(counts: Counts) -> Counts:
        if world.size == 1:
            return counts
        width = max(len(labels) for labels in counts.values())
        clients = int(world.sum_numbers([len(counts)])[0])
        flat = [0.0] * (clients * width)
        for client, labels in counts.items():
            flat[client * width : client * width + len(labels)] = labels
        summed = [int(value) for value in world.sum_numbers(flat)]
        return {client: summed[client * width : (client + 1) * width] for client in range(clients)}

    return Site(world.rank, world.size, world.device, world.autocast, all_counts, world.sum_tensors)


def _tracker(world: World, recipe: Recipe) -> Tracker | None:
    if not recipe.train.trackers:
        return None
    world.accelerator.init_trackers("tensorboard")
    return lambda values, step: world.accelerator.log(values, step=step)
