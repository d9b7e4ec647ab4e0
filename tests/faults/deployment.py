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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from splitllm.metrics import read_records
from splitllm.recipe import Recipe, load_recipe, role_names, tier_of
from splitllm.wire.issuing import issue

ROOT = Path(__file__).resolve().parents[2]
PORTS = range(7500, 7900)  # below those that the system gives to outgoing connections: a restarted server finds it free
COMMANDS = ("client", "edge", "cloud")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["splitllm.cli", "splitllm.deployment.run", "transformers.models.gpt2.modeling_gpt2"])
TAIL = 8
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
ADAPTER = Path("adapter/adapter_model.safetensors")


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

    Attributes:
        since: bytes that were in `out` before.
    """

    def __init__(self, words: list[str], out: Path, err: Path) -> None:
        self.since = out.stat().st_size if out.exists() else 0
        self._process = FORKS.Process(target=_splitllm, args=(words, str(out), str(err)), daemon=True)
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


def _splitllm(words: list[str], out: str, err: str) -> None:
    """In the process of a role."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(ROOT)
    sys.argv = ["splitllm", *words]
    from splitllm.cli import main

    main()


@dataclass
class Deployment:
    """The processes of one run.

    Args:
        path: of the recipe.
        folder: receives a folder and two logs a role.
        overrides: of the recipe.
    """

    path: Path
    folder: Path
    overrides: tuple[str, ...] = ()
    recipe: Recipe = field(init=False)
    running: dict[str, Process] = field(default_factory=dict, init=False)
    relays: dict[str, Relay] = field(default_factory=dict, init=False)
    since: dict[str, int] = field(default_factory=dict, init=False)
    killed: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.recipe = load_recipe(self.path, self.overrides)
        self.names = [name for tier in role_names(self.recipe).values() for name in tier]
        self.servers = [name for name in self.names if tier_of(self.recipe, name)[0] > 0]
        self.top = self.names[-1]
        self._held = [reserved_port() for _ in range(2 * len(self.servers))]
        ports = [held.getsockname()[1] for held in self._held]
        self._ports = dict(zip(self.servers, ports, strict=False))
        issue(self.folder / "certificates", self.names)
        for name in self.servers:
            front = self._ports[f"{name} relayed"] = ports.pop()
            self.relays[name] = Relay(front, self._ports[name])

    def start(self, *names: str, more: tuple[str, ...] = (), directory: str | None = None) -> None:
        """Start roles, or all."""
        for name in names or self.names:
            assert name not in self.running, name
            self.running[name] = self.spawn(name, more=more, directory=directory)
            self.since[name] = self.running[name].since

    def spawn(self, name: str, *, more: tuple[str, ...] = (), directory: str | None = None) -> Process:
        """A process of a role, beside the one that there may be."""
        label = directory or name
        addresses = ", ".join(f"{server}: 127.0.0.1:{self._ports[f'{server} relayed']}" for server in self.servers)
        wire = [f"wire.addresses={{{addresses}}}", f"wire.certificates={self.folder / 'certificates'}"]
        place = "cloud" if name == self.top else COMMANDS[min(1, tier_of(self.recipe, name)[0])]
        listen = ["--listen", f"127.0.0.1:{self._ports[name]}"] if name in self.servers else []
        words = ["--name", name, "--output-dir", str(self.folder / label), *listen]
        words = [place, str(self.path), *self.overrides, *wire, *more, *words]
        return Process(words, self.log_of(label), self.log_of(label, "err"))

    def log_of(self, name: str, suffix: str = "log") -> Path:
        return self.folder / f"{name}.{suffix}"

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

    def events(self, name: str, since: int = 0) -> list[dict[str, Any]]:
        """What a role logged, over all its starts, or from a byte of its log on."""
        path = self.log_of(name)
        *lines, _half = path.read_bytes()[since:].split(b"\n") if path.exists() else [b""]
        return [json.loads(line) for line in lines if line.startswith(b"{")]

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

    def complaints(self, name: str) -> str:
        return self.log_of(name, "err").read_text()

    def step(self) -> int:
        """The last step in the top's metrics."""
        path = self.folder / self.top / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 1000))
            lines = file.read().split(b"\n")[1:-1]
        steps = [record["step"] for record in map(json.loads, lines) if record["event"] == "train"]
        return steps[-1] if steps else 0

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

    def tails(self) -> str:
        """The last lines of every log, and where each process that hangs is, if py-spy is there to tell."""
        parts = []
        for name in self.names:
            log = self.log_of(name)
            lines = log.read_text(errors="replace").splitlines()[-TAIL:] if log.exists() else []
            error = self.log_of(name, "err")
            lines += error.read_text(errors="replace").splitlines()[-TAIL:] if error.exists() else []
            parts.append("\n".join([f"--- {name} ({'runs' if name in self.running else 'is not there'})", *lines]))
        return "\n".join(parts)

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
    """Event, step, loss, tokens of every line of a run's metrics."""
    records = read_records(folder / "metrics.jsonl")
    return [(record["event"], record["step"], record["loss"], record.get("tokens")) for record in records]
