"""Roles of a recipe as real processes over mutual TLS, for the long runs: started, watched and waited for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from splitllm.metrics import read_records
from splitllm.wire.certificates import Credentials, load_credentials
from tests.processes import ROOT, RolesOfRecipe, free_port

WAIT_SECONDS = 240.0


@dataclass
class Roles(RolesOfRecipe):
    """The processes of one run.

    Attributes:
        port: server -> port where it listens.
        via: server -> port that its children dial, where that is not its own.
    """

    via: dict[str, int] = field(default_factory=dict, init=False)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.port = {name: free_port() for name in self.servers}

    def credentials(self, name: str) -> Credentials:
        return load_credentials(self.folder / "certificates", name)

    def start(self, name: str, *more: str) -> None:
        command = [sys.executable, "-m", "splitllm", *self.words_of(name, self.port, self.port | self.via, *more)]
        with self.log_of(name).open("wb") as log, self.log_of(name, "err").open("wb") as errors:
            self.running[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=errors)

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

    def steps(self) -> list[dict[str, Any]]:
        """The steps in the top's metrics."""
        path = self.folder / self.top / "metrics.jsonl"
        found = read_records(path) if path.exists() else []
        return [record for record in found if record["event"] == "train"]

    def close(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()
