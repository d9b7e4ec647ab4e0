"""What harnesses of real processes share: ports, command lines, and what is seen of roles from outside."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitllm.recipe import Recipe, command_of, load_recipe, role_names, tier_of
from splitllm.wire.issuing import issue

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = Path("adapter/adapter_model.safetensors")
TAIL = 12


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def events_in(log: Path, since: int = 0) -> list[dict[str, Any]]:
    """The whole JSON lines of a log, from a byte of it on; none where there is no log."""
    *lines, _half = log.read_bytes()[since:].split(b"\n") if log.exists() else [b""]
    return [json.loads(line) for line in lines if line.startswith(b"{")]


def last_step(run: Path) -> int:
    """The last step in the metrics of a run, of which only the end is read."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1000))
        lines = file.read().split(b"\n")[:-1]
    steps = [json.loads(line)["step"] for line in lines if line.startswith(b"{") and b'"train"' in line]
    return int(steps[-1]) if steps else 0


@dataclass
class RolesOfRecipe:
    """The roles of a recipe on this machine, with mutual TLS; whoever inherits this starts and stops their processes.

    Args:
        path: of the recipe.
        folder: receives certificates, and of each role a folder and two logs: `.log` and `.err`.
        overrides: of the recipe.

    Attributes:
        names: of all roles, bottom-up.
        servers: those that listen.
        top: the last.
        running: role -> its process.
    """

    path: Path
    folder: Path
    overrides: tuple[str, ...] = ()
    recipe: Recipe = field(init=False)
    running: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.recipe = load_recipe(self.path, self.overrides)
        self.names = [name for tier in role_names(self.recipe).values() for name in tier]
        self.servers = [name for name in self.names if tier_of(self.recipe, name)[0] > 0]
        self.top = self.names[-1]
        issue(self.folder / "certificates", self.names)

    def words_of(
        self,
        name: str,
        listen: Mapping[str, int],
        reached: Mapping[str, int],
        *more: str,
        directory: str | None = None,
    ) -> list[str]:
        """The words after `splitllm` that run a role.

        Args:
            name: of the role.
            listen: server -> port where it listens.
            reached: server -> port that its children dial.
            more: overrides and options.
            directory: in place of the role's own folder.
        """
        addresses = ", ".join(f"{server}: 127.0.0.1:{port}" for server, port in reached.items())
        wire = [f"wire.addresses={{{addresses}}}", f"wire.certificates={self.folder / 'certificates'}"]
        options = ["--name", name, "--output-dir", str(self.folder / (directory or name))]
        if name in listen:
            options += ["--listen", f"127.0.0.1:{listen[name]}"]
        return [command_of(self.recipe, name), str(self.path), *self.overrides, *wire, *more, *options]

    def log_of(self, name: str, suffix: str = "log") -> Path:
        return self.folder / f"{name}.{suffix}"

    def events(self, name: str, since: int = 0) -> list[dict[str, Any]]:
        """What a role logged, over all its starts, or from a byte of its log on."""
        return events_in(self.log_of(name), since)

    def complaints(self, name: str) -> str:
        return self.log_of(name, "err").read_text()

    def step(self) -> int:
        """The last step in the top's metrics."""
        return last_step(self.folder / self.top)

    def tails(self) -> str:
        """The last lines of every log."""
        parts = []
        for name in self.names:
            logs = [log for log in (self.log_of(name), self.log_of(name, "err")) if log.exists()]
            lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()[-TAIL:]]
            parts.append("\n".join([f"--- {name} ({'runs' if name in self.running else 'is not there'})", *lines]))
        return "\n".join(parts)
