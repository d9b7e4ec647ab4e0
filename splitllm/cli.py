"""The command line: parsing only. Exit status: 0 done, 1 the run failed, 2 the recipe or the command line is wrong."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from splitllm import __version__
from splitllm.errors import DivergedError, PeerError, RankError, RecipeError, RunInterrupted, SplitLLMError

FIRST_SPEAKS = 20.0
"""Seconds that rank 0 has to say what is wrong: a launcher ends all ranks when the first of them ends."""

app = typer.Typer(
    name="splitllm",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Changes to the recipe; values in YAML.", show_default=False),
]
OutputDir = Annotated[Path, typer.Option("--output-dir", help="The folder to write.", show_default=False)]
AverageRule = Literal["fedavg", "fedex", "flora", "ffa", "rolora", "flexlora", "hetlora", "trimmed_mean", "median"]
EXACT = 1e-6
"""Errors of an average below this are those of rounding."""


def main() -> None:
    """Run the command line of this process."""
    app()


def _examples(*commands: str) -> str:
    """Text for the end of a command's help, which click must not rewrap (its mark for that is a backspace)."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"splitllm {__version__}")
        raise typer.Exit


@app.callback(
    epilog=_examples(
        "splitllm train recipes/quickstart.yaml --output-dir out/quickstart",
        "splitllm up recipes/quickstart.yaml --output-dir out/rehearsal",
    )
)
def _splitllm(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune a transformer split over client, edge and cloud; a PEFT adapter comes out."""


@app.command(
    epilog=_examples(
        "splitllm train recipes/quickstart.yaml --output-dir out/quickstart",
        "splitllm train recipes/quickstart.yaml train.steps=50 'split.cuts=[1, 3]' --output-dir out/short",
        "splitllm train recipes/quickstart.yaml --output-dir out/quickstart --resume",
    )
)
def train(
    recipe: RecipePath,
    output_dir: OutputDir,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output-dir.")] = False,
) -> None:
    """Run every tier of a recipe on this machine."""
    with _errors_as_lines():
        from splitllm.recipe import load_recipe

        wanted = load_recipe(recipe, overrides or ())
        from splitllm.train import train as run

        gc.freeze()  # what imports leave is never garbage
        run(wanted, output_dir=output_dir, resume=resume)


@app.command(
    epilog=_examples(
        "splitllm validate recipes/quickstart.yaml train.steps=50",
    )
)
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe, its model and its data; say what leaves the device."""
    with _errors_as_lines():
        from splitllm.recipe import load_recipe

        wanted = load_recipe(recipe, overrides or ())
        from splitllm.plan import describe
        from splitllm.preflight import prepare

        for line in describe(prepare(wanted)):
            typer.echo(line)


@app.command(
    epilog=_examples(
        "splitllm plan recipes/quickstart.yaml --memory",
        "splitllm plan --memory recipes/gpt2-e2e.yaml train.batch_size=2 --json",
    )
)
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    memory: Annotated[bool, typer.Option("--memory", help="What every role will hold, part by part, in MiB.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    here: Annotated[bool, typer.Option("--here", help="Fail unless all roles fit here as processes.")] = False,
) -> None:
    """Work out what a recipe needs, before anything is loaded."""
    with _errors_as_lines():
        if not memory:
            raise RecipeError(["plan: say what of; --memory is all there is so far"])
        from splitllm.recipe import load_recipe

        wanted = load_recipe(recipe, overrides or ())
        from splitllm.deployment.plan import plan_memory

        plan_memory(wanted, as_json=as_json, here=here)


@app.command(
    epilog=_examples(
        "splitllm merge out/quickstart/adapter --base recipes/quickstart-base --output-dir out/merged",
    )
)
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder.", show_default=False)],
    base: Annotated[str, typer.Option("--base", help="The unsplit base: a folder or a hub name.", show_default=False)],
    output_dir: OutputDir,
) -> None:
    """Merge an adapter into its base: a plain Hugging Face model."""
    with _errors_as_lines():
        from splitllm.model.export import merge as run

        run(adapter, base, output_dir)
        typer.echo(f"merged model, in the base's own dtype: {output_dir}")


@app.command(
    epilog=_examples(
        "splitllm average out/tenants/adapter/client-* --output-dir out/tenants/average",
        "splitllm average a b --weight 300 --weight 100 --rule flora --output-dir average",
    )
)
def average(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Adapter folders.", show_default=False)],
    output_dir: OutputDir,
    rule: Annotated[
        AverageRule,
        typer.Option("--rule", help="Exact are fedex, flora, ffa and rolora; the others are not."),
    ] = "fedex",
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", help="Of each adapter, in their order, such as its rows. By default all equal."),
    ] = None,
) -> None:
    """Average the adapters of several clients: one adapter of their base."""
    with _errors_as_lines():
        from splitllm.federated.files import average as run

        made = run(adapters, rule, output_dir, weight)
        off = "exact to rounding" if made["error"] < EXACT else f"{100 * made['error']:.2g} % off the exact average"
        typer.echo(f"average of {len(adapters)} adapters by {rule}, of rank {made['rank']}, {off}: {output_dir}")


RoleName = Annotated[str | None, typer.Option("--name", help="The role, such as edge-1.", show_default=False)]
RoleDir = Annotated[Path, typer.Option("--output-dir", help="The folder of this role's journal.", show_default=False)]
Listen = Annotated[
    str | None, typer.Option("--listen", metavar="HOST:PORT", help="Where to listen, if not at wire.addresses.")
]
MetricsAddress = Annotated[
    str | None, typer.Option("--metrics", metavar="[HOST:]PORT", help="Where to answer Prometheus; off by default.")
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow plain TCP beyond this machine.")]


@app.command(
    epilog=_examples(
        "splitllm cloud recipes/deployment.yaml --output-dir out/cloud",
        "splitllm cloud recipes/deployment.yaml --output-dir out/cloud --listen 0.0.0.0:7000 --metrics 9100",
    )
)
def cloud(
    recipe: RecipePath,
    output_dir: RoleDir,
    overrides: Overrides = None,
    name: RoleName = None,
    listen: Listen = None,
    metrics: MetricsAddress = None,
    insecure: Insecure = False,
) -> None:
    """Serve the top tier of a deployment; what the run leaves is written here."""
    _role("top", recipe, overrides, name, output_dir, listen, metrics, insecure)


@app.command(
    epilog=_examples(
        "splitllm edge recipes/deployment.yaml --output-dir out/edge",
    )
)
def edge(
    recipe: RecipePath,
    output_dir: RoleDir,
    overrides: Overrides = None,
    name: RoleName = None,
    listen: Listen = None,
    metrics: MetricsAddress = None,
    insecure: Insecure = False,
) -> None:
    """Serve one edge of a deployment."""
    _role("middle", recipe, overrides, name, output_dir, listen, metrics, insecure)


@app.command(
    epilog=_examples(
        "splitllm client recipes/deployment.yaml --name client-0 --output-dir out/client-0",
    )
)
def client(
    recipe: RecipePath,
    output_dir: RoleDir,
    overrides: Overrides = None,
    name: RoleName = None,
    insecure: Insecure = False,
) -> None:
    """Train one client's rows in a deployment."""
    _role("bottom", recipe, overrides, name, output_dir, None, None, insecure)


@app.command(
    epilog=_examples(
        "splitllm up recipes/quickstart.yaml --output-dir out/rehearsal",
        "splitllm up recipes/quickstart.yaml train.steps=20 train.threads=1 --output-dir out/short",
        "splitllm up recipes/quickstart.yaml --output-dir out/rehearsal --resume",
    )
)
def up(
    recipe: RecipePath,
    output_dir: OutputDir,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output-dir.")] = False,
) -> None:
    """Rehearse a deployment: every role of a recipe as a process on this machine, with mutual TLS."""
    with _errors_as_lines():
        from splitllm.recipe import load_recipe

        wanted = load_recipe(recipe, overrides or ())
        from splitllm.deployment.up import up as run

        run(wanted, output_dir, resume=resume)


@app.command(
    epilog=_examples(
        "splitllm certs certs recipes/deployment.yaml",
        "splitllm certs certs recipes/deployment.yaml --days 90 --renew edge",
    )
)
def certs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.", show_default=False)],
    recipe: RecipePath,
    overrides: Overrides = None,
    days: Annotated[int, typer.Option("--days", help="How long new certificates are valid.")] = 365,
    renew: Annotated[
        list[str] | None, typer.Option("--renew", metavar="NAME", help="Replace that of a role; may be repeated.")
    ] = None,
    renew_all: Annotated[bool, typer.Option("--renew-all", help="Replace those of all roles.")] = False,
) -> None:
    """Make a private authority and a certificate for every role: what mutual TLS needs."""
    with _errors_as_lines():
        from splitllm.recipe import load_recipe, role_names, tier_of

        wanted = load_recipe(recipe, overrides or ())
        names = [name for tier in role_names(wanted).values() for name in tier]
        for name in renew or ():
            tier_of(wanted, name)
        from splitllm.wire.issuing import AUTHORITY_KEY, issue

        renewed = names if renew_all else renew
        issued = issue(directory, renewed or names, days=days, renew=bool(renewed))
        for name in issued:
            typer.echo(f"issued: {directory / name}, for the machine of {name}")
        if kept := [name for name in names if name not in issued]:
            typer.echo(f"left as they are: {', '.join(kept)}")
        typer.echo(f"keep {directory / AUTHORITY_KEY} here: whoever has it can pass for any role")


def _role(
    place: str,
    recipe: Path,
    overrides: list[str] | None,
    name: str | None,
    output_dir: Path,
    listen: str | None,
    metrics: str | None,
    insecure: bool,
) -> None:
    from splitllm.deployment.leash import wear

    wear()
    with _errors_as_lines(apart=True):
        from splitllm.recipe import load_recipe, role_in_tier

        wanted = load_recipe(recipe, overrides or ())
        role = role_in_tier(wanted, place, name)
        metrics = _metrics_address(metrics)
        from splitllm.deployment.logs import log_to_stdout

        log_to_stdout(role)
        from splitllm.deployment.run import run_role

        run_role(wanted, role, output_dir, listen=listen, metrics=metrics, insecure=insecure)


def _metrics_address(text: str | None) -> str | None:
    """A port alone is one of this machine."""
    from splitllm.recipe import host_and_port

    address = f"127.0.0.1:{text}" if text is not None and text.isdecimal() else text
    try:
        if address is not None:
            host_and_port(address)
    except ValueError as error:
        raise RecipeError([f"--metrics: {error}; give PORT for this machine alone, or HOST:PORT"]) from None
    return address


@contextmanager
def _errors_as_lines(*, apart: bool = False) -> Iterator[None]:
    """Turns expected errors into lines on stderr and an exit status; a defect keeps its traceback.

    Args:
        apart: whether ranks may be on machines of their own, each with something else that is wrong.
    """
    try:
        yield
    except RunInterrupted as error:
        _fail(str(error), status=1)
    except KeyboardInterrupt:
        _fail("interrupted", status=1)
    except RecipeError as error:
        _fail(str(error), status=2, every_rank=apart)
    except SplitLLMError as error:
        _fail(str(error), status=1 if isinstance(error, PeerError | DivergedError | RankError) else 2, every_rank=True)
    except OSError as error:
        _fail(_os_error_line(error), status=1, every_rank=True)


def _fail(message: str, *, status: int, every_rank: bool = False) -> None:
    """Ends the command. Of several ranks (`accelerate launch`) the first speaks or, for trouble of its own, each."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        typer.echo(message, err=True)
    elif every_rank:
        typer.echo(f"rank {rank}: {message}", err=True)
    elif status == 2:
        time.sleep(FIRST_SPEAKS)
    raise typer.Exit(status)


def _os_error_line(error: OSError) -> str:
    text = " ".join(str(error).split()) if error.strerror is None else error.strerror
    return f"{error.filename}: {text}" if error.filename is not None else text or type(error).__name__
