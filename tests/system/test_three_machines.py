"""docs/deployment.md as an operator follows it: three machines, each with its own folder, and a cable that is pulled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from splitllm.recipe import load_recipe
from splitllm.train import train

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "deployment.yaml"
ADAPTER = Path("adapter/adapter_model.safetensors")
ROLES = {"cloud": ("cloud",), "edge": ("edge",), "client": ("client-0", "client-1")}
"""Machine -> its roles; the folders of these and of no others are copied to it."""
SHORT = ("train.steps=10", "train.threads=1", "train.eval_every=10", "train.schedule.warmup_steps=2", "data.limit=400")
PORT = 7000
SECONDS_WITHOUT_LINK = 5.0
LISTENING, TCP = "0A", ("/proc/net/tcp", "/proc/net/tcp6")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


class Loopback:
    """Three addresses of one machine."""

    can_unplug = False

    def address(self, machine: str) -> str:
        return f"127.0.0.{list(ROLES).index(machine) + 1}"

    def prefix(self, machine: str) -> list[str]:
        return []


class Namespaces:
    """A switch and three machines with one cable each; `ip netns` names are those of this process."""

    can_unplug = True

    def __init__(self) -> None:
        self._switch, self._machines = f"splt{os.getpid()}", list(ROLES)

    def address(self, machine: str) -> str:
        return f"10.77.0.{self._machines.index(machine) + 1}"

    def prefix(self, machine: str) -> list[str]:
        return ["ip", "netns", "exec", self._name(machine)]

    def build(self) -> None:
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        ip("-n", self._switch, "link", "set", "switch", "up")
        for machine in self._machines:
            name = self._name(machine)
            ip("netns", "add", name)
            ip("-n", self._switch, "link", "add", machine, "type", "veth", "peer", "name", "cable", "netns", name)
            ip("-n", self._switch, "link", "set", machine, "master", "switch", "up")
            ip("-n", name, "address", "add", f"{self.address(machine)}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")

    def remove(self) -> None:
        for name in [self._switch, *map(self._name, self._machines)]:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=10)

    def plug(self, machine: str, state: str) -> None:
        """`down` pulls the cable, `up` puts it back."""
        ip("-n", self._name(machine), "link", "set", "cable", state)

    def listening(self, machine: str) -> set[tuple[str, int]]:
        """Address and port of every TCP socket that waits for connections; the address in hexadecimal, as /proc has it."""
        command = [*self.prefix(machine), "cat", *TCP]
        table = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
        rows = [line.split() for line in table.splitlines() if ":" in line.split()[1]]
        ends = [row[1].split(":") for row in rows if row[3] == LISTENING]
        return {(host, int(port, 16)) for host, port in ends}

    def _name(self, machine: str) -> str:
        return f"{self._switch}-{machine}"


@pytest.fixture
def network() -> Iterator[Namespaces | Loopback]:
    """Network namespaces, or three loopback addresses where they cannot be made."""
    namespaces = Namespaces()
    try:
        namespaces.build()
    except (OSError, subprocess.SubprocessError):
        namespaces.remove()
        yield Loopback()
        return
    try:
        yield namespaces
    finally:
        namespaces.remove()


@dataclass
class Machines:
    """The processes of the run, each in the folder of its machine."""

    network: Namespaces | Loopback
    folder: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, machine: str, role: str, *more: str) -> None:
        home = self.folder / machine
        addresses = ", ".join(f'{server}: "{self.network.address(server)}:{PORT}"' for server in ("cloud", "edge"))
        words = [
            f"wire.addresses={{{addresses}}}",
            "wire.certificates=certs",
            f"model.base={ROOT / 'recipes/quickstart-base'}",
        ]
        command = [sys.executable, "-m", "splitllm", machine, "deployment.yaml", *SHORT, *words, *more]
        command += ["--name", role, "--output-dir", f"out/{role}"]
        with (home / f"{role}.log").open("wb") as log, (home / f"{role}.errors").open("wb") as errors:
            self.running[role] = subprocess.Popen(
                [*self.network.prefix(machine), *command], cwd=home, stdout=log, stderr=errors, env=self._environment()
            )

    def events(self, machine: str, role: str, event: str) -> list[dict[str, Any]]:
        lines = (self.folder / machine / f"{role}.log").read_text(encoding="utf-8").splitlines(keepends=True)
        said = [json.loads(line) for line in lines if line.endswith("\n")]
        return [entry for entry in said if entry["event"] == event]

    def wait(self, until: Callable[[], bool], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, self.told()
            assert all(process.poll() in (None, 0) for process in self.running.values()), self.told()
            time.sleep(0.05)

    def told(self) -> str:
        """The end of what every role said."""
        files = sorted(self.folder.glob("*/*.log")) + sorted(self.folder.glob("*/*.errors"))
        return "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in files)

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()

    @staticmethod
    def _environment() -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def installed(network: Namespaces | Loopback, folder: Path) -> Iterator[Machines]:
    """Certificates are made in one place; each machine gets the recipe and the folders of its roles."""
    made = folder / "made"
    subprocess.run(
        [sys.executable, "-m", "splitllm", "certs", str(made), str(RECIPE)], check=True, capture_output=True, cwd=ROOT
    )
    for machine, roles in ROLES.items():
        for role in roles:
            shutil.copytree(made / role, folder / machine / "certs" / role)
        shutil.copy(RECIPE, folder / machine)
    shutil.rmtree(made)
    machines = Machines(network, folder)
    try:
        yield machines
    finally:
        machines.end()


def test_three_machines_give_the_adapter_of_train_though_a_cable_was_pulled(
    tmp_path: Path, network: Namespaces | Loopback
) -> None:
    with installed(network, tmp_path / "machines") as machines:
        machines.start("client", "client-0", "wire.keepalive=1")  # the order does not matter
        machines.start("client", "client-1", "wire.keepalive=1")
        machines.start("cloud", "cloud")
        machines.start("edge", "edge", "wire.keepalive=1")
        machines.wait(lambda: len(machines.events("client", "client-0", "step")) >= 3)
        if isinstance(network, Namespaces):
            assert {port for _, port in network.listening("cloud")} == {PORT}
            assert {port for _, port in network.listening("edge")} == {PORT}
            assert network.listening("client") == set()
            network.plug("client", "down")
            time.sleep(SECONDS_WITHOUT_LINK)
            network.plug("client", "up")
        machines.wait(lambda: all(process.poll() is not None for process in machines.running.values()))
        assert {role: process.returncode for role, process in machines.running.items()} == dict.fromkeys(
            machines.running, 0
        ), machines.told()
        if isinstance(network, Namespaces):
            states = [event["state"] for event in machines.events("client", "client-0", "uplink")]
            assert states.count("connected") == 2, states
        assert [event["step"] for event in machines.events("client", "client-0", "step")] == [*range(1, 11)]
    run = tmp_path / "machines" / "cloud" / "out" / "cloud"
    train(load_recipe(RECIPE, SHORT), tmp_path / "whole")
    assert (run / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
