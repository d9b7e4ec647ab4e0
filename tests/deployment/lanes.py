"""Real roles over gRPC in one event loop, one of them possibly tampered with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from splitllm.deployment import client as client_module
from splitllm.deployment import server as server_module
from splitllm.deployment.bounds import limits
from splitllm.deployment.entries import read_entry
from splitllm.deployment.station import Options, Station, open_station
from splitllm.recipe import Recipe, load_recipe, role_names, tier_of
from splitllm.wire.codecs import Packed
from splitllm.wire.coding import Coding
from splitllm.wire.message import Message
from splitllm.wire.uplink import RemoteLink
from tests.processes import free_port

BAD = "client-1"
OTHERS = ("client-0", "client-2")
FORGED = "forged"
Tamper = Callable[[Message], Message | None]
"""What a hostile tenant makes of a request; None: it is never sent."""


class Tampered:
    """A link whose requests are not what the client meant."""

    def __init__(self, link: RemoteLink, tamper: Tamper) -> None:
        self._link, self._tamper = link, tamper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    async def request(self, message: Message) -> Message:
        sent = self._tamper(message)
        if sent is None:
            await asyncio.Event().wait()
        assert sent is not None
        return await self._link.request(sent)


class Forger(Coding):
    """Writes NaN over the bytes of a tensor, after they were checked."""

    def pack_request(self, message: Message) -> dict[str, Packed]:
        packed = super().pack_request(message)
        if (name := message.header.get(FORGED)) is not None:
            packed[name] = replace(packed[name], blob=torch.full_like(packed[name].blob, 255))
        return packed


def with_ports(path: Path, *words: str) -> Recipe:
    """A recipe whose servers listen where nobody does yet; of two tiers above the clients."""
    ports = f"wire.addresses={{edge: 127.0.0.1:{free_port()}, cloud: 127.0.0.1:{free_port()}}}"
    return load_recipe(path, [ports, *words])


def with_edges(path: Path, *words: str) -> Recipe:
    """The same of two edges."""
    ports = ", ".join(f"{name}: 127.0.0.1:{free_port()}" for name in ("edge-0", "edge-1", "cloud"))
    return load_recipe(path, [f"wire.addresses={{{ports}}}", *words])


@asynccontextmanager
async def deployed(recipe: Recipe, folder: Path, tamper: Tamper | None = None) -> Any:
    """All roles; yields the task of each."""
    tasks: dict[str, asyncio.Task[None]] = {}
    for name in [name for tier in reversed(role_names(recipe).values()) for name in tier]:
        client = tier_of(recipe, name)[1] if tier_of(recipe, name)[0] == 0 else None
        station = open_station(recipe, Options(name, folder / name), client=client)
        limits(station.plan)  # builds a model without weights, which must not meet another that is being loaded
        if name == BAD and tamper is not None:
            _tamper_with(station, tamper)
        serve = server_module._serve if client is None else client_module._attend
        tasks[name] = asyncio.create_task(serve(station))
    try:
        yield tasks
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


def _tamper_with(station: Station, tamper: Tamper) -> None:
    def uplink() -> Any:
        link = Station.uplink(station)
        link._coding = Forger()
        return Tampered(link, tamper)

    station.uplink = uplink  # type: ignore[method-assign]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def adapters(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Of all clients that have one, in a deployment's folder."""
    places = {name: folder / "cloud" / "adapter" / name for name in (*OTHERS, BAD)}
    return {name: adapter(place) for name, place in places.items() if place.exists()}


def kept(server: Path) -> dict[str, Any]:
    """The newest values in the journal of what is common."""
    entries = {int(place.stem.partition("-")[2]): place for place in (server / "journal" / "common").glob("step-*")}
    return read_entry(entries[max(entries)]).values


async def trained(recipe: Recipe, folder: Path, tamper: Tamper) -> dict[str, BaseException | None]:
    """Until all others have their adapters; how every role that has ended did."""
    async with deployed(recipe, folder, tamper) as tasks:
        while not set(OTHERS) <= adapters(folder).keys():
            for name, task in tasks.items():
                assert name == BAD or not task.done() or task.exception() is None, (name, task.exception())
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        return {name: task.exception() for name, task in tasks.items() if task.done()}
