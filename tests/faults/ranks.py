"""A server of a deployment in several processes, as `torchrun` starts them; any of them can be killed."""

from __future__ import annotations

import signal

from tests.faults.deployment import Deployment, Process
from tests.processes import free_port


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
