"""Flower's processes on loopback: a SuperLink, SuperNodes, the edges beside them, and runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

from tests.processes import ROOT, free_port

APP = ROOT / "recipes" / "flower"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
CONNECTION = '[superlink]\ndefault = "cloud"\n[superlink.cloud]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
LINES = 25


@dataclass
class Flowers:
    """Flower for a test; all processes end with it.

    Args:
        folder: receives Flower's own files, sockets and logs.
    """

    folder: Path
    port: int = field(default_factory=free_port, init=False)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)

    def __enter__(self) -> Flowers:
        home = self.folder / "flwr"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(CONNECTION.format(port=self.port))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._env = os.environ | QUIET | {"FLWR_HOME": str(home), "PATH": path}
        self.start(
            "link", "flower-superlink", "--insecure", *self._at(self.port), "--disable-runtime-dependency-installation"
        )
        self.wait(lambda: "Uvicorn running" in self.log("link"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self.running):
            self.stop(name, signal.SIGKILL)
        for process in psutil.process_iter():  # a ServerApp may outlive its SuperLink
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FLWR_HOME") == self._env["FLWR_HOME"]:
                    process.kill()

    def edge(self, name: str, rounds: int, rule: str = "fedavg") -> None:
        """The process of an edge."""
        words = [self.address(name), name, str(rounds), str(self.result(name)), rule]
        self.start(name, sys.executable, "-m", "tests.federated.edge", *words)

    def site(self, name: str, verb: str, recipe: Path, words: Sequence[str]) -> None:
        """A whole run of a site, by `splitllm train` or `splitllm up`; its results lie in the folder of its name."""
        run = [sys.executable, "-m", "splitllm", verb, str(recipe), *words, "--output-dir", str(self.folder / name)]
        self.start(name, *run)

    def node(self, name: str, edge: str) -> None:
        """A SuperNode beside an edge."""
        config = f'edge="{edge}" exchange="{self.address(edge)}"'
        where = ["--superlink", f"127.0.0.1:{self.port}", *self._at(free_port())]
        self.start(name, "flower-supernode", "--insecure", *where, "--node-config", config)

    def run(self, name: str = "run", *words: str) -> None:
        """`flwr run`, with its log."""
        self.start(name, "flwr", "run", str(APP), "cloud", "--stream", *words)

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(command, cwd=ROOT, env=self._env, stdout=log, stderr=log)

    def stop(self, name: str, by: signal.Signals = signal.SIGTERM) -> int:
        """End a process; its exit status."""
        process = self.running.pop(name)
        process.send_signal(by)
        return process.wait(timeout=20)

    def address(self, edge: str) -> str:
        return f"unix:{self.folder / edge}.sock"

    def result(self, edge: str) -> Path:
        return self.folder / f"{edge}.safetensors"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait(self, until: Callable[[], bool], seconds: float = 120.0) -> None:
        """Until something is so; with the ends of all logs if it does not become so, or a process fails."""
        end = time.monotonic() + seconds
        while not until():
            failed = [name for name, process in self.running.items() if process.poll()]
            if failed or time.monotonic() > end:
                logs = sorted(self.folder.glob("*.log"))
                tails = ["\n".join([f"--- {each.stem}", *self.log(each.stem).splitlines()[-LINES:]]) for each in logs]
                raise AssertionError("\n".join([f"failed: {failed}, or not within {seconds:g} s", *tails]))
            time.sleep(0.1)

    def _at(self, port: int) -> list[str]:
        return ["--host", "127.0.0.1", "--port", str(port)]
