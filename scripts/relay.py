"""A TCP relay that makes a link slow or broken, to rehearse a bad network on one machine.

    python scripts/relay.py --listen 127.0.0.1:7200 --to 127.0.0.1:7100 --rtt-ms 40 --mbit 200

Connections to --listen go on to --to. Half of the round trip is added each way; the bandwidth holds each way, for all
connections together. Commands are read from stdin, one a line and in order; end of input leaves the relay running:

    cut SECONDS      hold every byte of both directions, and new connections; nothing is lost or closed
    drop             close all connections at once (RST); new ones are accepted
    refuse SECONDS   close all connections and refuse new ones
    stats            print bytes delivered each way and connections as one line of JSON

It prints `listening on HOST:PORT` first (port 0: any free one) and ends on SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence

CHUNK = 65_536  # bytes, the most that is read at once
SLOT = 0.002  # seconds of bandwidth in a chunk, so that a slow link does not wait for large ones to be read
BURST = 0.005  # seconds of bandwidth that may be caught up with, as timers fire late
UNSHAPED = 1.25e9  # bytes/s that buffers are sized for where the bandwidth is not limited
BUFFER = 1_048_576  # bytes, the least that may be under way in one direction of a connection
AGAIN = 0.05  # seconds until a port that was refused is tried again

Address = tuple[str, int]


class Way:
    """One direction of the link, shared by all connections.

    Args:
        delay: seconds each byte is under way.
        rate: bytes/s, or None for no limit.
    """

    def __init__(self, delay: float, rate: float | None) -> None:
        self.delay, self.rate = delay, rate
        self.delivered = 0
        self.chunk = CHUNK if rate is None else max(1500, min(CHUNK, int(rate * SLOT)))
        self.limit = max(BUFFER, int(2 * 2 * delay * (rate or UNSHAPED)))
        self._free = 0.0

    async def send(self, count: int) -> None:
        """Wait until `count` bytes have left at the link's bandwidth, after all that were sent before."""
        if self.rate is None:
            return
        now = asyncio.get_running_loop().time()
        self._free = max(self._free, now - BURST) + count / self.rate
        await _until(self._free)


class Flight:
    """Chunks under way in one direction of a connection, each with the time it arrives; b"" is the end.

    Args:
        limit: bytes that may be under way.
    """

    def __init__(self, limit: int) -> None:
        self._chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._room = asyncio.Event()
        self._room.set()
        self._size, self._limit = 0, limit

    async def put(self, arrives: float, chunk: bytes) -> None:
        """Send a chunk on its way."""
        self._chunks.put_nowait((arrives, chunk))
        self._count(len(chunk))
        await self._room.wait()

    async def get(self) -> bytes:
        """The next chunk, when it arrives."""
        arrives, chunk = await self._chunks.get()
        await _until(arrives)
        self._count(-len(chunk))
        return chunk

    def _count(self, change: int) -> None:
        self._size += change
        (self._room.set if self._size < self._limit else self._room.clear)()


class Relay:
    """Accepts connections and carries them on.

    Args:
        listen: where it accepts; port 0 is any free one.
        to: where it connects.
        delay: seconds one way.
        rate: bytes/s one way, or None for no limit.
    """

    def __init__(self, listen: Address, to: Address, delay: float, rate: float | None) -> None:
        self.listen, self.to = listen, to
        self.up, self.down = Way(delay, rate), Way(delay, rate)
        self.accepted = 0
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._cut_until = self._refuse_until = 0.0
        self._server: asyncio.Server | None = None
        self._returning: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accept connections; `listen` then has the port."""
        self._server = await asyncio.start_server(self._accept, *self.listen)
        self.listen = self._server.sockets[0].getsockname()[:2]

    def cut(self, seconds: float) -> None:
        """Hold every byte for so long."""
        self._cut_until = max(self._cut_until, asyncio.get_running_loop().time() + seconds)

    def drop(self) -> None:
        """Close all connections at once."""
        for task, writer in self._open.items():
            task.cancel()
            _reset(writer)
        self._open.clear()

    def refuse(self, seconds: float) -> None:
        """Close all connections and refuse new ones for so long."""
        self._refuse_until = max(self._refuse_until, asyncio.get_running_loop().time() + seconds)
        if self._server is not None:
            self._server.close()
            self._server = None
            self._returning = asyncio.create_task(self._return())
        self.drop()

    def stats(self) -> None:
        """Print what was delivered."""
        counts = {"bytes_up": self.up.delivered, "bytes_down": self.down.delivered}
        print(json.dumps({**counts, "connections": len(self._open), "accepted": self.accepted}), flush=True)

    async def _return(self) -> None:
        """Accept connections again when it is time, and the port is free."""
        while asyncio.get_running_loop().time() < self._refuse_until:
            await _until(self._refuse_until)
        while self._server is None:
            try:
                await self.start()
            except OSError:
                await asyncio.sleep(AGAIN)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Open a connection. Its end, however it comes, is that of its task."""
        self.accepted += 1
        task = asyncio.create_task(self._carry(reader, writer))
        self._open[task] = writer
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        writer = self._open.pop(task, None)
        if writer is not None:
            _reset(writer)

    async def _carry(self, below: asyncio.StreamReader, to_below: asyncio.StreamWriter) -> None:
        """Carry one connection until both sides have ended it, or one breaks it."""
        await self._mended()
        try:
            above, to_above = await asyncio.open_connection(*self.to)
        except OSError:
            return
        try:
            async with asyncio.TaskGroup() as group:
                for way, reader, writer in ((self.up, below, to_above), (self.down, above, to_below)):
                    flight = Flight(way.limit)
                    group.create_task(self._depart(way, reader, flight))
                    group.create_task(self._arrive(way, flight, writer))
            for writer in (to_above, to_below):
                writer.close()
                await writer.wait_closed()
        except* OSError:
            pass
        finally:
            _reset(to_above)

    async def _depart(self, way: Way, reader: asyncio.StreamReader, flight: Flight) -> None:
        loop = asyncio.get_running_loop()
        while chunk := await reader.read(way.chunk):
            await self._mended()
            await way.send(len(chunk))
            await flight.put(loop.time() + way.delay, chunk)
        await flight.put(loop.time() + way.delay, b"")

    async def _arrive(self, way: Way, flight: Flight, writer: asyncio.StreamWriter) -> None:
        _set_nodelay(writer)
        while True:
            chunk = await flight.get()
            await self._mended()
            if not chunk:
                return writer.write_eof()
            writer.write(chunk)
            way.delivered += len(chunk)
            await writer.drain()

    async def _mended(self) -> None:
        """Wait while the link is cut."""
        while asyncio.get_running_loop().time() < self._cut_until:
            await _until(self._cut_until)


async def _until(moment: float) -> None:
    """Sleep until a time of the loop's clock; return at once if it has passed."""
    wait = moment - asyncio.get_running_loop().time()
    if wait > 0:
        await asyncio.sleep(wait)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection by RST, unless it has been closed already."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _set_nodelay(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def obey(relay: Relay, line: str) -> None:
    """Carry out one command; a wrong one is answered on stderr."""
    timed: dict[str, Callable[[float], None]] = {"cut": relay.cut, "refuse": relay.refuse}
    plain: dict[str, Callable[[], None]] = {"drop": relay.drop, "stats": relay.stats}
    match line.split():
        case []:
            return
        case [name] if name in plain:
            plain[name]()
        case [name, text] if name in timed and (seconds := _number_or_none(text)) is not None:
            timed[name](seconds)
        case _:
            known = "cut SECONDS, drop, refuse SECONDS or stats"
            print(f"relay: {line.strip()!r} is no command; give {known}", file=sys.stderr, flush=True)


def _number_or_none(text: str) -> float | None:
    try:
        return _number(text)
    except argparse.ArgumentTypeError:
        return None


def _read_commands(loop: asyncio.AbstractEventLoop, relay: Relay) -> None:
    """Hand on the lines of stdin until it ends; in a thread, for the loop cannot wait for every kind of file."""
    rest = b""
    while True:
        try:
            block = os.read(0, CHUNK)
        except OSError:  # no stdin, or that of a terminal in whose background this runs
            return
        if not block:
            return
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            loop.call_soon_threadsafe(obey, relay, line.decode(errors="replace"))


async def run(relay: Relay) -> None:
    """Relay until SIGTERM or SIGINT."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    await relay.start()
    host, port = relay.listen
    print(f"listening on {f'[{host}]' if ':' in host else host}:{port}", flush=True)
    threading.Thread(target=_read_commands, args=(loop, relay), daemon=True).start()
    await stop.wait()
    relay.drop()


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 0 or more")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and relay; 0 when told to end, 1 where it cannot listen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--rtt-ms", type=_number, default=0.0, help="added to the round trip, half each way")
    parser.add_argument(
        "--mbit", type=_number, default=0.0, help="Mbit/s each way, all connections together; 0: no limit"
    )
    options = parser.parse_args(arguments)
    relay = Relay(options.listen, options.to, options.rtt_ms / 2000, options.mbit * 1e6 / 8 or None)
    try:
        asyncio.run(run(relay))
    except OSError as error:
        print(f"relay: --listen {':'.join(map(str, options.listen))}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
