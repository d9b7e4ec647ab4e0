"""The roles of a tiny recipe as real processes over mutual TLS: killed, paused and cut off from one another."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from splitllm.metrics import read_records
from tests.processes import ADAPTER, ROOT, RolesOfRecipe

PORTS = range(7500, 7900)  # below those that the system gives to outgoing connections: a restarted server finds it free
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["splitllm.cli", "splitllm.deployment.run", "transformers.models.gpt2.modeling_gpt2"])
DOING = {
    "listening": "starts",
    "leaves the device": "starts",
    "uplink": "connects",
    "cut": "joins",
    "rejoining": "joins",
    "generation over": "joins",
    "generation begins": "evaluates",
    "joined": "evaluates",
    "step": "trains",
    "evaluation": "trains",
    "done": "is done",
    "complete": "has ended",
    "the run was complete already": "is done",
}
"""Last event of a log -> what its role is about."""
WAIT_SECONDS = 120.0  # no wait takes so long unless something hangs, even on a machine that is busy with other things


class Stuck(AssertionError):
    """A wait took too long; says what every role logged last."""


def reserved_port() -> socket.socket:
    """A free TCP port: it stays reserved, against others who ask here, while its UDP namesake is held open."""
    for port in random.sample(PORTS, len(PORTS)):
        held = socket.socket(type=socket.SOCK_DGRAM)
        try:
            held.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            held.close()
            continue
        return held
    raise OSError(f"no free port in {PORTS}")


class Relay:
    """`scripts/relay.py` before one server."""

    def __init__(self, port: int, to: int) -> None:
        self._words = ["--listen", f"127.0.0.1:{port}", "--to", f"127.0.0.1:{to}"]
        self.process = self._start()

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def renew(self) -> None:
        """Lose all connections, and the bytes under way; new ones are accepted."""
        self.close()
        self.process = self._start()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [sys.executable, "scripts/relay.py", *self._words]
        process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening")
        return process


class Process:
    """One start of one role: the command `splitllm`, forked where all is imported already, which takes seconds.

    Args:
        words: of the command line.
        out, err: files that standard output and error are appended to.
        env: added to its environment.

    Attributes:
        since: bytes that were in `out` before.
    """

    def __init__(self, words: list[str], out: Path, err: Path, env: Mapping[str, str] | None = None) -> None:
        self.since = out.stat().st_size if out.exists() else 0
        self._process = FORKS.Process(target=_splitllm, args=(words, str(out), str(err), env or {}), daemon=True)
        self._process.start()

    def signal(self, number: signal.Signals) -> None:
        if self.status is None:
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _splitllm(words: list[str], out: str, err: str, env: Mapping[str, str]) -> None:
    """In the process of a role."""
    os.environ.update(env)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(ROOT)
    sys.argv = ["splitllm", *words]
    from splitllm.cli import main

    main()


@dataclass
class Deployment(RolesOfRecipe):
    """The processes of one run, with a relay before every server."""

    running: dict[str, Process] = field(default_factory=dict, init=False)
    relays: dict[str, Relay] = field(default_factory=dict, init=False)
    since: dict[str, int] = field(default_factory=dict, init=False)
    killed: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._held = [reserved_port() for _ in range(2 * len(self.servers))]
        ports = [held.getsockname()[1] for held in self._held]
        self._listen = dict(zip(self.servers, ports, strict=False))
        self._relayed = dict(zip(self.servers, ports[len(self.servers) :], strict=True))
        self.relays = {name: Relay(self._relayed[name], self._listen[name]) for name in self.servers}

    def start(self, *names: str, more: tuple[str, ...] = (), directory: str | None = None) -> None:
        """Start roles, or all."""
        for name in names or self.names:
            assert name not in self.running, name
            self.running[name] = self.spawn(name, more=more, directory=directory)
            self.since[name] = self.running[name].since

    def spawn(
        self,
        name: str,
        *,
        more: tuple[str, ...] = (),
        directory: str | None = None,
        label: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """A process of a role, beside the one that there may be."""
        words = self.words_of(name, self._listen, self._relayed, *more, directory=directory)
        label = label or directory or name
        return Process(words, self.log_of(label), self.log_of(label, "err"), env)

    def command_of(self, name: str, *more: str) -> list[str]:
        """The words after `splitllm` that run a role."""
        return self.words_of(name, self._listen, self._relayed, *more)

    # Faults.

    def kill(self, *names: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Kill roles at once, or stop them cleanly, and wait until they are gone."""
        for name in names:
            self.running[name].signal(number)
        self.killed.update(name for name in names if self.exit_of(name) == -number)

    def exit_of(self, name: str, seconds: float = WAIT_SECONDS) -> int:
        """Wait for a role to end."""
        running = self.running[name]
        self.until(lambda: running.status is not None, f"{name} to end", seconds)
        del self.running[name]
        assert running.status is not None
        return running.status

    def pause(self, *names: str) -> None:
        for name in names:
            self.running[name].signal(signal.SIGSTOP)

    def resume(self, *names: str) -> None:
        for name in names:
            self.running[name].signal(signal.SIGCONT)

    # What can be seen from outside.

    def said(self, name: str, event: str) -> list[dict[str, Any]]:
        return [record for record in self.events(name) if record["event"] == event]

    def doing(self, name: str) -> str:
        """What a role is about, or was about when it was killed."""
        if self.is_committing(name):
            return "commits"
        events = self.events(name, self.since[name])
        return DOING.get(events[-1]["event"], "is connected") if events else "starts"

    def is_committing(self, name: str) -> bool:
        """Whether a role is writing its journal, or was when it was killed."""
        return any((self.folder / name / "journal").glob(".*.writing"))

    def until(self, done: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS, every: float = 0.001) -> None:
        """Wait; a wait that takes too long tells what every role logged last."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise Stuck(f"waited {seconds:g} s for {what}\n{self.tails()}")
            time.sleep(every)

    def until_step(self, step: int, seconds: float = WAIT_SECONDS) -> None:
        self.until(lambda: self.step() >= step or self.all_ended(), f"step {step}", seconds)

    def sleep_until_step(self, step: int, seconds: float) -> None:
        """Sleep, but no longer than until the top has logged a step."""
        deadline = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= deadline or self.step() >= step, f"step {step}")

    def until_commit(self, name: str, seconds: float = WAIT_SECONDS) -> None:
        """Until a role writes its journal, or has ended."""
        running = self.running[name]
        self.until(lambda: self.is_committing(name) or running.status is not None, f"{name} to commit", seconds, 0.0)

    def all_ended(self) -> bool:
        return all(running.status is not None for running in self.running.values())

    def finish(self, seconds: float = WAIT_SECONDS) -> dict[str, int]:
        """Wait until every role that runs has ended; exit status by role."""
        self.until(self.all_ended, "the end of the run", seconds)
        return {name: self.exit_of(name) for name in list(self.running)}

    # What a run leaves.

    def adapter(self) -> bytes:
        return (self.folder / self.top / ADAPTER).read_bytes()

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / self.top / "summary.json").read_text())
        return found

    def lines(self) -> list[tuple[Any, ...]]:
        """What the metrics say of every step and evaluation, but for times and bytes."""
        return counted(self.folder / self.top)

    def applied(self) -> dict[str, set[int]]:
        """How often every role's optimiser says it has stepped, after the newest step in its journal."""
        found = {}
        for name in self.names:
            tensors = load_file(self.folder / name / "journal" / f"step-{self.committed(name)}.safetensors")
            found[name] = {int(tensor) for key, tensor in tensors.items() if key.startswith("step/")}
        return found

    def journaled(self) -> dict[str, list[int]]:
        """The steps in every role's journal."""
        found = {}
        for name in self.names:
            files = (self.folder / name / "journal").glob("step-*.safetensors")
            found[name] = sorted(int(file.stem.partition("-")[2]) for file in files)
        return found

    def committed(self, name: str) -> int:
        """The newest step in a role's journal."""
        return max(self.journaled()[name])

    def close(self) -> None:
        for running in self.running.values():
            running.end()
        for relay in self.relays.values():
            relay.close()
        for held in self._held:
            held.close()
        self.running.clear()


@contextmanager
def deployed(path: Path, folder: Path, *overrides: str) -> Iterator[Deployment]:
    """A deployment whose processes are gone afterwards."""
    deployment = Deployment(path, folder, overrides)
    try:
        yield deployment
    finally:
        deployment.close()


def counted(folder: Path) -> list[tuple[Any, ...]]:
    """Event, step, loss, tokens of every line of a run's metrics that has them."""
    records = read_records(folder / "metrics.jsonl")
    return [
        (record["event"], record["step"], record["loss"], record.get("tokens"))
        for record in records
        if "loss" in record
    ]
