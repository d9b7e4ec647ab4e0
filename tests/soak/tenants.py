"""Clients of different speeds in one process without torch, each over a connection of its own and at its own pace.

    python -m tests.soak.tenants CONFIG.json

Between an answer and the next request a client takes its time, as if it computed: a third before its forward, the rest
between that and the close of the step. How much time is found first, when all of them go as fast as they can, which
shows what the server is able to do: in a phase of `load` 0.8 all together ask for 0.8 of that. In some phases the
slowest stand still. A line of JSON on standard output tells the beginning and the end of what is measured of every
phase, and the last line all that was seen.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.soak.load import Client, Load

BEFORE_FORWARD = 1 / 3
SPREAD = 0.1
FULL = 6.0  # seconds in which all go as fast as they can


@dataclass
class Tenants(Load):
    """What all share.

    Attributes:
        phase: whose measurement is under way, None between two.
        think: client -> seconds between an answer and its next request; none while all go as fast as they can.
        here: set when everybody is connected.
        waits: client -> (phase, seconds from a forward's departure to its answer), those of no phase left out.
        going: set while the slowest take part.
        over: set when nobody opens a step any more, and nobody takes time any more.
    """

    phase: int | None = None
    think: dict[str, float] = field(default_factory=dict)
    here: asyncio.Event = field(default_factory=asyncio.Event)
    waits: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    going: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def may_open(self, step: int) -> bool:
        """Everybody is at a step of its own."""
        return not self.over.is_set()

    def ask_for(self, load: float, able: float) -> None:
        """So much of the steps a second that the server is able to do."""
        speeds: dict[str, float] = self.config["speeds"]
        unit = sum(speeds.values()) / (load * able)
        self.think = {name: unit / speed for name, speed in speeds.items()}

    async def pass_time(self, seconds: float) -> None:
        """Unless it is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.over.wait()


class Tenant(Client):
    """One of them."""

    def __init__(self, load: Tenants, name: str) -> None:
        super().__init__(load, name)
        self._tenants, self._alike, self._random = load, name, Random(name)
        self._at_pace = False
        self._stands_still = name in load.config["stragglers"]
        self._variants = sum(name.startswith("forward-") for name in self._recorded)

    async def _step(self, step: int) -> None:
        await self._tenants.here.wait()
        if self.name in self._tenants.think and not self._at_pace:
            self._at_pace = True
            await self._take_time(self._random.random())  # not all at once
        if self._stands_still and not self._tenants.going.is_set():
            await self._tenants.going.wait()
            await self._take_time(self._random.random())
        await self._at_its_pace(step)

    async def _at_its_pace(self, step: int) -> None:
        variant, place = step % self._variants, self._place(step)
        await self._ask(f"open-{variant}", place)
        await self._compute(BEFORE_FORWARD)
        started = time.monotonic()
        await self._ask(f"forward-{variant}", place)
        if self._tenants.phase is not None:
            self._tenants.waits[self.name].append((self._tenants.phase, time.monotonic() - started))
        await self._compute(1 - BEFORE_FORWARD)
        await self._ask(f"close-{variant}", place)

    async def _compute(self, share: float) -> None:
        await self._take_time(share * self._random.uniform(1 - SPREAD, 1 + SPREAD))

    async def _take_time(self, share: float) -> None:
        await self._tenants.pass_time(share * self._tenants.think.get(self.name, 0.0))


def tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def run(config: dict[str, Any]) -> None:
    load = Tenants(config)
    load.going.set()
    clients = [Tenant(load, name) for name in config["clients"]]
    attending = asyncio.gather(*(client.attend() for client in clients))
    while len(load.joins) < len(clients):
        await asyncio.wait({attending}, timeout=0.1)
        if attending.done():
            attending.result()
    load.here.set()
    await asyncio.sleep(config["settle"])
    done = sum(load.steps.values())
    await asyncio.sleep(FULL)
    able = (sum(load.steps.values()) - done) / FULL
    for number, (share, everybody, seconds) in enumerate(config["phases"]):
        load.ask_for(share, able)
        (load.going.set if everybody else load.going.clear)()
        await asyncio.sleep(config["settle"])
        tell(begins=number, think=load.think)
        load.phase, started = number, time.monotonic()
        await asyncio.wait({attending}, timeout=seconds)
        load.phase = None
        tell(ends=number, seconds=time.monotonic() - started)
        if attending.done():
            attending.result()
    load.over.set()
    load.going.set()
    await attending
    tell(waits=load.waits, able=able, **load.told())
    await asyncio.to_thread(sys.stdin.read)
    for client in clients:
        await client.close()


if __name__ == "__main__":
    asyncio.run(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
