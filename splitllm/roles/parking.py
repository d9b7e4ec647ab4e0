"""Lanes that ask nothing for long give way on the device: their adapters and optimisers wait in host memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from splitllm.roles.gate import Gate

HOST = torch.device("cpu")


class Parking:
    """Of the lanes of one server.

    Args:
        gates: client -> the gate of its lane.
        after: seconds without a request; None: nobody is parked.
    """

    def __init__(self, gates: Mapping[int, Gate], after: float | None) -> None:
        self._gates, self._after = gates, after
        self._asked = dict.fromkeys(gates, _now())
        self._under_way = dict.fromkeys(gates, 0)
        self._parked: dict[int, asyncio.Task[None]] = {}
        self._look_later()

    @contextmanager
    def busy(self, client: int) -> Iterator[None]:
        """While one of its requests is being answered."""
        self._under_way[client] += 1
        try:
            yield
        finally:
            self._under_way[client] -= 1
            self._asked[client] = _now()

    async def bring_back(self, client: int) -> None:
        """Before a request of its lane is answered."""
        if (parking := self._parked.get(client)) is None:
            return
        await asyncio.shield(parking)
        if self._parked.pop(client, None) is not None:
            worker = self._gates[client].server.worker
            assert worker is not None
            await self._move(client, worker.device)

    def _look_later(self) -> None:
        if self._after is not None:
            asyncio.get_running_loop().call_later(self._after / 4, self._look, self._after)

    def _look(self, after: float) -> None:
        for client, since in self._asked.items():
            if not self._under_way[client] and client not in self._parked and _now() - since >= after:
                self._gates[client].end("it is idle")  # a step that it left open is run again
                self._parked[client] = asyncio.create_task(self._move(client, HOST))
        self._look_later()

    async def _move(self, client: int, device: torch.device) -> None:
        server = self._gates[client].server
        assert server.worker is not None
        mine = server.worker.own[client]
        await server.device.run(lambda: mine.move(device), urgent=True)


def _now() -> float:
    return asyncio.get_running_loop().time()
