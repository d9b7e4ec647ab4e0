"""`splitllm plan --memory`: the ledger of a recipe, worked out where nothing is loaded."""

from __future__ import annotations

import json
import sys

from rich.console import Console

from splitllm.deployment import client, server  # noqa: F401 (a role's imports are counted)
from splitllm.model.machine import available_bytes, give_back
from splitllm.policy.admission import MIB
from splitllm.preflight import prepare
from splitllm.recipe import Recipe
from splitllm.roles.fitting import apart_needs
from splitllm.running.memory import as_json as ledger_as_json
from splitllm.running.memory import show


def plan_memory(recipe: Recipe, *, as_json: bool = False, here: bool = False, console: Console | None = None) -> None:
    """Print what every role will hold, as a process of its own, and all of them in one.

    Args:
        recipe: what the user asks for.
        as_json: one JSON object in place of a table.
        here: whether all roles must fit on this machine as processes.
        console: where the table goes; default: standard output.

    Raises:
        RecipeError: the recipe cannot run, a role takes more than its tier is given, or there is no room.
    """
    plan, console = prepare(recipe, data=False, limits=False, here=here), console or Console()
    give_back()  # as a role does when it has checked its recipe
    free = available_bytes()
    if as_json:
        sys.stdout.write(json.dumps(ledger_as_json(plan.ledger, free)) + "\n")
    else:
        show(plan.ledger, console, f"memory of {recipe.model.base}, predicted:")
        left = "" if free is None else f"; {free / MIB:,.0f} MiB are free here"
        apart = plan.ledger.apart / MIB
        console.print(f"all roles as processes on one machine: {apart:,.0f} MiB{left}", soft_wrap=True, highlight=False)
    plan.refuse_beyond_limits()
    if here and free is not None:
        plan.refuse_unless(apart_needs(free, "memory of this machine"))
