"""The folder of `splitllm up`: what lies there at the start, and what is copied to its top at the end."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from splitllm.errors import CheckpointError, RecipeError
from splitllm.metrics import replace_text
from splitllm.recipe import Recipe, changed_keys, dump_recipe, load_recipe, role_names
from splitllm.recipe.digest import LOCAL_KEYS
from splitllm.running.places import ADAPTER
from splitllm.wire.issuing import issue

RECIPE, DEPLOYMENT, CERTIFICATES = "recipe.yaml", "deployment.yaml", "certs"
SUMMARY = "summary.json"
RESULTS = ("metrics.jsonl", ADAPTER, SUMMARY)  # in this order: the summary says that all is there
HARMLESS = frozenset(key for key in LOCAL_KEYS if key.startswith(("train.", "wire.")))
LOOPBACK = "127.0.0.1"
PORTS = range(20_000, 32_000)  # below those that the system gives to connections that go out


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make the folder if need be, and keep it to this process.

    Raises:
        RecipeError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RecipeError([f"--output-dir: another splitllm up runs in {directory}; name a new folder"]) from None
    finally:
        os.close(lock)


def check_use(recipe: Recipe, directory: Path, resume: bool) -> None:
    """Refuse a folder that is in use, or holds another run.

    Raises:
        RecipeError: it is a file, holds a run and `resume` was not asked for, or something else, or the recipe changed.
        CheckpointError: there is nothing to resume.
    """
    if directory.exists() and not directory.is_dir():
        raise RecipeError([f"--output-dir: {directory} is a file; name a folder"])
    there = (directory / RECIPE).exists()
    if not resume:
        if there and any(directory.glob("*/journal/*")):
            raise RecipeError(
                [f"--output-dir: {directory} holds a run; add --resume to go on with it, or name a new folder"]
            )
        if directory.exists() and {path.name for path in directory.iterdir()} - _own_names(recipe):
            raise RecipeError([f"--output-dir: {directory} is not empty; name a new folder"])
        return
    if not there:
        raise CheckpointError(f"--resume: {directory} holds no run; start it without --resume")
    changed = changed_keys(load_recipe(directory / RECIPE), recipe)
    harmful = [line for line in changed if line.partition(":")[0] not in HARMLESS]
    if harmful:
        raise RecipeError([f"--resume: the recipe is not that of {directory}: {line}" for line in harmful])


def prepare(recipe: Recipe, directory: Path, threads: int) -> Path:
    """Write the recipe, and the same with what this rehearsal adds: certificates, addresses and threads.

    Args:
        recipe: what the user asks for.
        directory: of the rehearsal.
        threads: of each role.

    Returns:
        The recipe for the roles.

    Raises:
        CertificateError: the folder's certificates are broken or expired.
    """
    names = [name for tier in role_names(recipe).values() for name in tier]
    replace_text(directory / RECIPE, dump_recipe(recipe))
    certificates = recipe.wire.certificates
    if certificates is None:
        issue(directory / CERTIFICATES, names)
        certificates = str((directory / CERTIFICATES).absolute())
    addresses = {name: _free_address() for tier in list(role_names(recipe).values())[1:] for name in tier}
    wire = recipe.wire.model_copy(update={"certificates": certificates, "addresses": addresses})
    train = recipe.train.model_copy(update={"threads": threads})
    deployed = recipe.model_copy(update={"wire": wire, "train": train})
    replace_text(directory / DEPLOYMENT, dump_recipe(deployed))
    return directory / DEPLOYMENT


def collect(top: Path, directory: Path) -> dict[str, Any]:
    """Copy what the run has left from the top's folder; returns the summary.

    Raises:
        OSError: something is missing, or cannot be written.
    """
    for name in RESULTS:
        _copy(top / name, directory / name)
    summary: dict[str, Any] = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
    return summary


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, temporary)
        shutil.rmtree(target, ignore_errors=True)
    else:
        shutil.copy2(source, temporary)
    os.replace(temporary, target)


def _own_names(recipe: Recipe) -> set[str]:
    """What a start that failed may have left."""
    names = [name for tier in role_names(recipe).values() for name in tier]
    own = {RECIPE, DEPLOYMENT, CERTIFICATES, *names, *(f"{name}.log" for name in names)}
    return own | {f".{name}.writing" for name in (RECIPE, DEPLOYMENT)}


def _free_address() -> str:
    for port in random.SystemRandom().sample(PORTS, 100):
        with closing(socket.socket()) as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return f"{LOOPBACK}:{port}"
    raise OSError(f"no free port on {LOOPBACK} in {PORTS.start} to {PORTS.stop - 1}")
