"""A server of a deployment in several processes, as `torchrun` starts them; any of them can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.faults.deployment import Deployment, Process
from tests.processes import ROOT, free_port


class Ranked:
    """Starts one server of a deployment in several ranks, again and again.

    Args:
        deployment: whose server it is.
        name: of the server.
        more: overrides of its ranks.

    Attributes:
        processes: of the last start, by rank.
    """

    def __init__(self, deployment: Deployment, name: str, *more: str) -> None:
        self.deployment, self.name, self.more = deployment, name, more
        self.processes: list[Process] = []

    def start(self, count: int) -> None:
        port = free_port()
        self.processes = [self._process(rank, count, port) for rank in range(count)]
        self.deployment.running[self.name] = self.processes[0]
        self.deployment.since[self.name] = self.processes[0].since

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> list[int]:
        """Kill one rank; the exit statuses of the others, which end by themselves."""
        self.processes[rank].signal(number)
        others = [process for process in self.processes if process is not self.processes[rank]]
        deployment = self.deployment
        deployment.until(lambda: all(p.status is not None for p in self.processes), "all ranks to end", 60)
        del deployment.running[self.name]
        return [process.status or 0 for process in others]

    def statuses(self) -> list[int | None]:
        return [process.status for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.end()

    def _process(self, rank: int, count: int, port: int) -> Process:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        env = {key: str(value) for key, value in {**where, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}
        more = (f"server.processes={count}", *self.more)
        label = self.name if rank == 0 else f"{self.name}-rank-{rank}"
        return self.deployment.spawn(self.name, more=more, label=label, env=env if count > 1 else None)


class Launched:
    """The same by `accelerate launch`."""

    def __init__(self, deployment: Deployment, name: str, config: Path) -> None:
        words = deployment.command_of(name, "server.processes=2")
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        port = ["--main_process_port", str(free_port())]
        self._deployment = deployment
        with deployment.log_of(name).open("ab") as out, deployment.log_of(name, "err").open("ab") as err:
            command = [sys.executable, *launch, *port, "-m", "splitllm", *words]
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)

    def ranks(self) -> list[int]:
        """Process ids, by rank."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        found = {}
        for pid in map(int, children):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(word.removeprefix(b"RANK=")): pid for word in environ if word.startswith(b"RANK=")}
        return [found[rank] for rank in sorted(found)]

    def wait(self) -> int:
        """Until the launcher has ended: its exit status."""
        self._deployment.until(lambda: self._process.poll() is not None, "the launcher to end")
        return int(self._process.returncode)

    def end(self) -> None:
        for pid in self.ranks() if self._process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()


def seconds_of(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
