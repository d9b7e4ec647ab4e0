"""A real gRPC server with sessions on a free port, and links to it, for the tests of the wire."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from scripts.relay import Relay
from splitllm.errors import PeerError
from splitllm.wire.assembling import Limits
from splitllm.wire.certificates import Credentials
from splitllm.wire.coding import Coding
from splitllm.wire.link import Handler
from splitllm.wire.message import Message
from splitllm.wire.remote import Dialer, Listener
from splitllm.wire.sessions import HELLO_SECONDS, Reception, Sessions
from splitllm.wire.stream import Refused
from splitllm.wire.uplink import RemoteLink

CHILDREN = tuple(f"client-{number}" for number in range(4))
KEEPALIVE = 10.0


@dataclass
class Served:
    """A server under test, and what it was told."""

    sessions: Sessions
    listener: Listener
    port: int
    events: list[tuple[str, str]] = field(default_factory=list)
    fatal: list[BaseException] = field(default_factory=list)


def admit(hello: Mapping[str, Any], identity: str | None) -> tuple[str, dict[str, Any]]:
    """As a deployment does it."""
    name = str(hello.get("name"))
    if identity is not None and identity != name:
        raise Refused("identity", f"the certificate is that of {identity}, but the process says that it is {name}")
    if name not in CHILDREN:
        raise Refused("mismatch", f"{name} does not belong to cloud")
    for key in ("recipe", "model"):
        if hello.get(key) != "right":
            raise Refused("mismatch", f"{name} has another {key}")
    return name, {"batch_size": 7}


async def echo(message: Message) -> Message:
    return Message(message.kind, "cloud", message.micro_batch, message.header, message.tensors)


@asynccontextmanager
async def served(
    answer: Handler = echo,
    *,
    credentials: Credentials | None = None,
    room: int = 8,
    port: int = 0,
    keepalive: float = KEEPALIVE,
    limits: Limits | None = None,
    check: Callable[[Message], None] = lambda message: None,
    coding: Callable[[], Coding] = Coding,
    hello_seconds: float = HELLO_SECONDS,
    grace: float = 0.0,
) -> AsyncIterator[Served]:
    events: list[tuple[str, str]] = []
    fatal: list[BaseException] = []
    reception = Reception(
        admit=admit,
        answer=answer,
        check=check,
        room=lambda name: room,
        coding=coding,
        limits=limits or Limits(),
        back=lambda name: events.append(("back", name)),
        away=lambda name: events.append(("away", name)),
        left=lambda name: events.append(("left", name)),
        fatal=fatal.append,
    )
    sessions = Sessions(reception, hello_seconds)
    listener = Listener(f"127.0.0.1:{port}", sessions.serve, credentials, keepalive, 64)
    found = Served(sessions, listener, await listener.start(), events, fatal)
    try:
        yield found
    finally:
        await listener.stop(grace)


def dialer(
    port: int, credentials: Credentials | None = None, *, server: str = "cloud", keepalive: float = KEEPALIVE
) -> Dialer:
    return Dialer(f"127.0.0.1:{port}", server, credentials, keepalive)


HELLO = {"name": "client-0", "recipe": "right", "model": "right"}


@asynccontextmanager
async def linked(
    port: int,
    name: str = "client-0",
    credentials: Credentials | None = None,
    *,
    server: str = "cloud",
    keepalive: float = KEEPALIVE,
    coding: Coding | None = None,
    hello: Mapping[str, Any] | None = None,
    patience: float = 60.0,
    states: list[str] | None = None,
    goodbye: bool = False,
) -> AsyncIterator[RemoteLink]:
    link = RemoteLink(
        dialer(port, credentials, server=server, keepalive=keepalive).dial,
        server,
        {**HELLO, "name": name, **(hello or {})},
        coding or Coding(),
        Limits(),
        patience=patience,
        on_change=(states if states is not None else []).append,
    )
    try:
        yield link
    finally:
        await link.close(goodbye=goodbye)
    await asyncio.sleep(0)  # whoever still waited is told
    await asyncio.sleep(0)
    assert link.under_way == 0 and not link._pending, "every request has given its place back"


@asynccontextmanager
async def relayed(port: int, rate: float | None = None) -> AsyncIterator[Relay]:
    """A relay before the server, in this process, of so many bytes/s each way."""
    relay = Relay(("127.0.0.1", 0), ("127.0.0.1", port), 0.0, rate)
    await relay.start()
    try:
        yield relay
    finally:
        relay.drop()
        if relay._server is not None:
            relay._server.close()


@cache
def _loop() -> asyncio.Runner:
    """One for all tests of a process: gRPC hands what comes late from one loop to that loop, also when it is closed."""
    return asyncio.Runner()


async def _cancelled() -> None:
    """The tasks that a test has left are gone, as after `asyncio.run`."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def run(test: Callable[[], Awaitable[None]], seconds: float = 30.0, expected: tuple[str, ...] = ()) -> None:
    """Run a test's coroutine; fails if a task's exception was left to nobody, or an error was logged.

    Loggers named in `expected` may log errors.
    """
    left: list[Any] = []
    watch = logging.Handler(logging.ERROR)
    watch.emit = left.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(watch)

    async def inner() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))
        try:
            async with asyncio.timeout(seconds):
                await test()
        finally:
            await _cancelled()

    try:
        _loop().run(inner())
    finally:
        logging.getLogger().removeHandler(watch)
    records = [record for record in left if not isinstance(record, logging.LogRecord) or record.name not in expected]
    told = [record.getMessage() if isinstance(record, logging.LogRecord) else record for record in records]
    assert not told, told


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def raises(awaitable: Awaitable[Any], kind: type[BaseException] = PeerError, seconds: float = 15.0) -> str:
    """The text of the error that it ends with, which is of exactly this class."""
    try:
        async with asyncio.timeout(seconds):
            await awaitable
    except kind as error:
        assert type(error) is kind, repr(error)  # noqa: PT017
        return str(error)
    raise AssertionError(f"no {kind.__name__}")
