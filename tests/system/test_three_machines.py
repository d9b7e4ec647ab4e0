"""docs/deployment.md as an operator follows it: its commands, firewall and units; and a cable that is pulled."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from splitllm.recipe import load_recipe
from splitllm.train import train

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
RECIPE = ROOT / "recipes/deployment.yaml"
ADAPTER = Path("adapter/adapter_model.safetensors")
ROLES = {"cloud": ("cloud",), "edge": ("edge",), "client": ("client-0", "client-1")}
"""Machine -> its roles; the folders of these and of no others are copied to it."""
CALLERS = {"cloud": "edge", "edge": "client"}
SHORT = ("train.steps=8", "train.threads=1", "train.eval_every=8", "train.schedule.warmup_steps=2", "data.limit=400")
PORT = 7000
SECONDS_WITHOUT_LINK = 4.0
LISTENING, TCP = "0A", ("/proc/net/tcp", "/proc/net/tcp6")


def blocks(language: str) -> list[str]:
    """What the page shows in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def start_commands() -> dict[str, list[str]]:
    """Role -> the words after `splitllm` that start it, as the page has them."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    words = [shlex.split(line, comments=True)[1:] for line in lines if re.match("splitllm (cloud|edge|client) ", line)]
    return {Path(found[found.index("--output-dir") + 1]).name: found for found in words}


def splitllm(*words: str) -> list[str]:
    return [sys.executable, "-m", "splitllm", *words]


def succeed(*command: str, **more: Any) -> str:
    return str(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, **more).stdout)


def ip(*words: str) -> None:
    succeed("ip", *words)


class Loopback:
    """Three addresses of one machine."""

    def address(self, machine: str) -> str:
        return f"127.0.0.{list(ROLES).index(machine) + 2}"

    def prefix(self, machine: str) -> list[str]:
        return []

    def words(self) -> list[str]:
        addresses = ", ".join(f'{server}: "{self.address(server)}:{PORT}"' for server in CALLERS)
        return [f"wire.addresses={{{addresses}}}"]


class Namespaces:
    """A switch and three machines with one cable each, at the addresses of the page."""

    def __init__(self) -> None:
        self._switch = f"splt{os.getpid()}"

    def address(self, machine: str) -> str:
        return f"10.77.0.{list(ROLES).index(machine) + 1}"

    def prefix(self, machine: str) -> list[str]:
        return ["ip", "netns", "exec", self._name(machine)]

    def words(self) -> list[str]:
        return []

    def build(self) -> None:
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        ip("-n", self._switch, "link", "set", "switch", "up")
        for machine in ROLES:
            name = self._name(machine)
            ip("netns", "add", name)
            ip("-n", self._switch, "link", "add", machine, "type", "veth", "peer", "name", "cable", "netns", name)
            ip("-n", self._switch, "link", "set", machine, "master", "switch", "up")
            ip("-n", name, "address", "add", f"{self.address(machine)}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")

    def remove(self) -> None:
        for name in [self._switch, *map(self._name, ROLES)]:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=10)

    def plug(self, machine: str, state: str) -> None:
        """`down` pulls the cable, `up` puts it back."""
        ip("-n", self._name(machine), "link", "set", "cable", state)

    def listening(self, machine: str) -> set[int]:
        """Ports of every TCP socket that waits for connections."""
        rows = [line.split() for line in succeed(*self.prefix(machine), "cat", *TCP).splitlines()]
        return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTENING}

    def raise_firewalls(self) -> None:
        """The rules of the page, on both servers."""
        [rules] = blocks("nft")
        for machine, caller in CALLERS.items():
            own = rules.replace(self.address("edge"), self.address(caller))
            succeed(*self.prefix(machine), "nft", "-f", "-", input=own)

    def lets_in(self, machine: str, caller: str) -> bool:
        code = f"import socket; socket.create_connection(({self.address(machine)!r}, {PORT}), 0.5)"
        called = subprocess.run([*self.prefix(caller), sys.executable, "-c", code], check=False, capture_output=True)
        return called.returncode == 0

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

    def start(self, role: str, *more: str) -> None:
        """With the page's command, for fewer steps."""
        home = self.home(role)
        command = splitllm(*start_commands()[role], *SHORT, *self.network.words(), *more)
        with (home / f"{role}.log").open("wb") as log, (home / f"{role}.errors").open("wb") as errors:
            self.running[role] = subprocess.Popen(
                [*self.network.prefix(home.name), *command], cwd=home, stdout=log, stderr=errors, env=environment()
            )

    def home(self, role: str) -> Path:
        return self.folder / next(machine for machine, roles in ROLES.items() if role in roles)

    def events(self, role: str, event: str) -> list[dict[str, Any]]:
        lines = (self.home(role) / f"{role}.log").read_text(encoding="utf-8").splitlines(keepends=True)
        said = [json.loads(line) for line in lines if line.endswith("\n")]
        return [entry for entry in said if entry["event"] == event]

    def health(self, role: str, server: str) -> str:
        """What the page's program says of a server to a role."""
        home, address = self.home(role), f"{self.network.address(server)}:{PORT}"
        [program] = blocks("python")
        asks = [*self.network.prefix(home.name), sys.executable, "-c", program, role, server, address]
        return succeed(*asks, cwd=home, env=environment()).strip()

    def wait(self, until: Callable[[], bool], seconds: float = 300.0) -> None:
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


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def installed(network: Namespaces | Loopback, folder: Path) -> Iterator[Machines]:
    """Certificates are made in one place; each machine gets recipe, base and the certificates of its own roles."""
    made = folder / "made"
    shutil.copytree(ROOT / "recipes", made / "recipes")
    assert "\nsplitllm certs certs recipes/deployment.yaml\n" in PAGE
    succeed(*splitllm("certs", "certs", "recipes/deployment.yaml"), cwd=made, env=environment())
    for machine, roles in ROLES.items():
        shutil.copytree(made / "recipes", folder / machine / "recipes")
        for role in roles:
            shutil.copytree(made / "certs" / role, folder / machine / "certs" / role)
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
        for role in ("client-0", "client-1", "cloud", "edge"):  # the order does not matter
            machines.start(role, "wire.keepalive=1")
        machines.wait(lambda: len(machines.events("client-0", "step")) >= 2)
        assert machines.health("client-0", "edge") == "SERVING"
        if isinstance(network, Namespaces):
            assert_ports_are_open_to_whom_they_should(network)
            network.plug("client", "down")
            time.sleep(SECONDS_WITHOUT_LINK)
            network.plug("client", "up")
        machines.wait(lambda: all(process.poll() is not None for process in machines.running.values()))
        assert {process.returncode for process in machines.running.values()} == {0}, machines.told()
        for client in ROLES["client"]:
            assert [event["step"] for event in machines.events(client, "step")] == [*range(1, 9)]
            if isinstance(network, Namespaces):
                states = [event["state"] for event in machines.events(client, "uplink")]
                assert states.count("connected") == 2, states
    train(load_recipe(RECIPE, SHORT), tmp_path / "whole")
    run = tmp_path / "machines/cloud/out/cloud"
    assert (run / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


def assert_ports_are_open_to_whom_they_should(network: Namespaces) -> None:
    """Servers listen at one port, clients at none; behind the page's firewall only those may call who have to."""
    assert [network.listening(machine) for machine in ROLES] == [{PORT}, {PORT}, set()]
    if shutil.which("nft") is None:
        return
    with suppress(subprocess.CalledProcessError):  # a kernel without nf_tables
        network.raise_firewalls()
        assert network.lets_in("cloud", "edge") and network.lets_in("edge", "client")
        assert not network.lets_in("cloud", "client") and not network.lets_in("edge", "cloud")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_units_are_sound(tmp_path: Path) -> None:
    unit, others = (
        block.replace("/opt/splitllm/.venv/bin/splitllm", shutil.which("true") or "") for block in blocks("ini")
    )
    names = ("splitllm-cloud.service", "splitllm-client@.service")
    units = {"splitllm-edge.service": unit}
    units |= {
        name: re.sub("^ExecStart=.*$", line, unit, flags=re.M)
        for name, line in zip(names, others.splitlines(), strict=True)
    }
    for name, text in units.items():
        (tmp_path / name).write_text(text)
        said = subprocess.run(
            ["systemd-analyze", "verify", tmp_path / name], check=False, capture_output=True, text=True
        )
        assert (said.returncode, name in said.stderr) == (0, False), said.stderr
