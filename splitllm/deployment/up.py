"""A whole deployment as local processes over real gRPC, the rehearsal of production; reads from top to bottom."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from splitllm.deployment.child import Child
from splitllm.deployment.crew import Crew
from splitllm.deployment.folder import SUMMARY, check_use, collect, held, prepare
from splitllm.deployment.leash import Leash
from splitllm.deployment.table import Overview, Screen
from splitllm.errors import RecipeError, RunInterrupted
from splitllm.metrics import human_bytes
from splitllm.recipe import Recipe, command_of, dump_recipe, goes_by_lanes, role_names
from splitllm.running.interrupt import StopSignal
from splitllm.running.places import adapter_folders, where_next

WRONG = 2  # exit status of a command whose recipe is wrong
REASON = re.compile(r"(memory of |[a-z_]+(\.[\w-]+)*: )")  # how its lines begin, and libraries' warnings do not


def up(recipe: Recipe, directory: Path, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run every role of a recipe as a process of its own on this machine, with mutual TLS, until the run is complete.

    Args:
        recipe: the run, with at least two tiers.
        directory: receives a log and a folder for every role, and at the end what a run leaves.
        resume: go on with the run in `directory`.
        console: where the table goes; default: standard output.

    Returns:
        The summary of the run.

    Raises:
        RecipeError: the recipe cannot be rehearsed, or the folder is in use.
        CheckpointError: there is nothing to resume.
        PeerError: a role failed in a way that starting it again does not mend.
        RunInterrupted: SIGTERM or Ctrl-C; every process has ended, and the message says how to go on.
    """
    if len(recipe.split.tiers) < 2:
        raise RecipeError(["split.tiers: a deployment needs at least two tiers; use splitllm train"])
    if recipe.server.processes > 1:
        advice = "start each role by itself, its servers with accelerate launch, or set it to 1"
        raise RecipeError([f"server.processes: {recipe.server.processes}, but up starts one process a role; {advice}"])
    tiers = list(role_names(recipe).values())
    [top] = tiers[-1]
    console = console or Console()
    check_use(recipe, directory, resume)
    with held(directory):
        if not (directory / top / SUMMARY).exists():
            threads = recipe.train.threads or max(1, _cores() // sum(map(len, tiers)))
            _check_room(recipe, console)
            _run(prepare(recipe, directory, threads), tiers, recipe, console, fresh=not resume)
        summary = collect(directory / top, directory)
    for line in _closing_lines(recipe, directory, summary):
        console.print(Text(line), soft_wrap=True)
    return summary


def _run(deployment: Path, tiers: list[list[str]], recipe: Recipe, console: Console, *, fresh: bool) -> None:
    names = [name for tier in reversed(tiers) for name in tier]
    overview = Overview(names, recipe.train.steps, recipe.train.eval_every)
    leash = Leash()
    children = [[_child(deployment, command_of(recipe, name), name, leash) for name in tier] for tier in tiers]
    summary, alone = deployment.parent / names[0] / SUMMARY, goes_by_lanes(recipe) or recipe.wire.absent == "drop"
    crew = Crew(children, overview, Screen(overview, console), summary, alone=alone)
    with StopSignal() as stop:
        try:
            crew.start(fresh)
            crew.attend(stop)
        finally:
            crew.stop()
            leash.close()
    if not crew.is_complete():
        step, last = overview.rows[names[0]].step or 0, recipe.train.steps
        raise RunInterrupted(
            f"stopped after step {step} of {last}, which is kept in {deployment.parent}; "
            "go on with the same command and --resume"
        )


def _check_room(recipe: Recipe, console: Console) -> None:
    """Say what all roles will hold, worked out in a process of its own, so that this one loads nothing.

    Raises:
        RecipeError: a role, or all of them on this machine, have no room.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(dump_recipe(recipe))
        file.flush()
        words = [sys.executable, "-m", "splitllm", "plan", file.name, "--memory", "--here"]
        planned = subprocess.run(words, capture_output=True, text=True, check=False)
    for line in planned.stdout.splitlines():
        console.print(Text(line), soft_wrap=True)
    if planned.returncode == WRONG:
        raise RecipeError([line for line in planned.stderr.splitlines() if REASON.match(line)])


def _child(deployment: Path, command: str, name: str, leash: Leash) -> Child:
    directory = deployment.parent
    words = [sys.executable, "-m", "splitllm", command, str(deployment), "--name", name]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **leash.environment()}
    log = directory / f"{name}.log"
    return Child(name, [*words, "--output-dir", str(directory / name)], log, environment, [leash.child_end])


def _closing_lines(recipe: Recipe, directory: Path, summary: dict[str, Any]) -> list[str]:
    adapter = next(folder for folder in adapter_folders(recipe, directory) if folder.exists())
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    lines = [
        f"held-out loss: {summary['eval_loss_before']:.4f} before, {summary['eval_loss_after']:.4f} after (split run)",
        f"over the wire: {human_bytes(summary['wire_bytes_up'])} up, {human_bytes(summary['wire_bytes_down'])} down; "
        f"{summary['train_tokens']} tokens at {summary['tokens_per_second']:.0f} tokens/s",
    ]
    for role, held_mib in summary["held_mib"].items():
        parts = ", ".join(f"{name} {value:.1f}" for name, value in held_mib.items())
        lines.append(f"peak memory of {role}: {sum(held_mib.values()):.1f} MiB of tensors ({parts})")
    resident = ", ".join(_resident(name, summary) for name in summary["peak_rss_mib"])
    return [
        *lines,
        f"peak resident memory: {resident}",
        *where_next(recipe, directory, base),
    ]


def _resident(name: str, summary: Mapping[str, Any]) -> str:
    predicted = summary.get("predicted_mib", {}).get(name)
    beside = "" if predicted is None else f" ({predicted:.0f} predicted)"
    return f"{name} {summary['peak_rss_mib'][name]:.0f} MiB{beside}"


def _cores() -> int:
    return len(os.sched_getaffinity(0))
