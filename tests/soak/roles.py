"""Roles of a recipe as real processes over mutual TLS, for the long runs: started, watched and waited for."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitllm.metrics import read_records
from splitllm.recipe import Recipe, load_recipe, role_names, tier_of
from splitllm.wire.certificates import Credentials, load_credentials
from splitllm.wire.issuing import issue

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("client", "edge", "cloud")
WAIT_SECONDS = 240.0


@dataclass
class Roles:
    """The processes of one run.

    Args:
        path: of the recipe.
        folder: receives certificates, and of each role a folder and its log.
        via: server -> port that its children dial, where that is not its own.
    """

    path: Path
    folder: Path
    via: dict[str, int] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.recipe: Recipe = load_recipe(self.path, ())
        self.names = [name for tier in role_names(self.recipe).values() for name in tier]
        self.top = self.names[-1]
        self.port = {name: free_port() for name in self.names if tier_of(self.recipe, name)[0] > 0}
        issue(self.folder / "certificates", self.names)

    def credentials(self, name: str) -> Credentials:
        return load_credentials(self.folder / "certificates", name)

    def start(self, name: str, *words: str) -> None:
        tier = tier_of(self.recipe, name)[0]
        command = COMMANDS[2 if name == self.top else min(1, tier)]
        addresses = ", ".join(f"{role}: 127.0.0.1:{self.via.get(role, port)}" for role, port in self.port.items())
        wire = [f"wire.addresses={{{addresses}}}", f"wire.certificates={self.folder / 'certificates'}"]
        listen = ["--listen", f"127.0.0.1:{self.port[name]}"] if name in self.port else []
        more = ["--name", name, "--output-dir", str(self.folder / name), *listen, *words]
        with self._log(name).open("wb") as log, self._log(name, "err").open("wb") as errors:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "splitllm", command, str(self.path), *wire, *more],
                cwd=ROOT,
                stdout=log,
                stderr=errors,
            )

    async def until(self, done: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not done():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"waited {seconds:g} s for {what}\n{self.tails()}") from None

    async def ends(self, *names: str) -> dict[str, int | None]:
        """Wait for roles to end; their exit statuses."""
        wanted = names or tuple(self.running)
        ended = lambda: all(self.running[name].poll() is not None for name in wanted)  # noqa: E731
        await self.until(ended, f"the end of {', '.join(wanted)}")
        return {name: self.running[name].returncode for name in wanted}

    def events(self, name: str) -> list[dict[str, Any]]:
        """What a role logged."""
        *lines, _half = self._log(name).read_bytes().split(b"\n")
        return [json.loads(line) for line in lines]

    def complaints(self, name: str) -> str:
        return self._log(name, "err").read_text()

    def steps(self) -> list[dict[str, Any]]:
        """The steps in the top's metrics."""
        path = self.folder / self.top / "metrics.jsonl"
        found = read_records(path) if path.exists() else []
        return [record for record in found if record["event"] == "train"]

    def step(self) -> int:
        """The last of them, cheaply."""
        path = self.folder / self.top / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 1000))
            lines = file.read().split(b"\n")[:-1]
        steps = [json.loads(line)["step"] for line in lines if line.startswith(b"{") and b'"train"' in line]
        return int(steps[-1]) if steps else 0

    def tails(self) -> str:
        """The end of what every role said."""
        parts = []
        for name in self.running:
            said = [self._log(name, suffix).read_text(errors="replace")[-1500:] for suffix in ("log", "err")]
            parts.append("\n".join([f"--- {name}", *said]))
        return "\n".join(parts)

    def close(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()

    def _log(self, name: str, suffix: str = "log") -> Path:
        return self.folder / f"{name}.{suffix}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
