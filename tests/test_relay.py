"""The relay of scripts/relay.py as a process: delay, bandwidth, and the ways in which it breaks a link."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "relay.py"
MEGABYTES = 5_000_000  # at 200 Mbit/s: 0.2 s
WAIT = 10.0  # seconds after which a test gives up


def echo(connection: socket.socket) -> None:
    while block := connection.recv(65_536):
        connection.sendall(block)


def count(connection: socket.socket) -> None:
    """Answers with one byte once 5 MB have come, for as long as they come."""
    missing = MEGABYTES
    while block := connection.recv(1_048_576):
        missing -= len(block)
        if missing == 0:
            connection.sendall(b"!")
            missing = MEGABYTES


@contextmanager
def server(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server with a thread a connection; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                handle(connection)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


class Running:
    """A relay that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self._commands = process, process.stdin
        self.printed: IO[str] = process.stdout
        host, port = self.printed.readline().removeprefix("listening on ").split(":")
        self.address = (host, int(port))

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.address, WAIT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def stats(self) -> dict[str, int]:
        self._commands.write("stats\n")
        self._commands.flush()
        return dict(json.loads(self.printed.readline()))

    def tell(self, command: str) -> None:
        """Give a command and wait until it is obeyed."""
        self._commands.write(f"{command}\n")
        self.stats()


@contextmanager
def relay(to: str, *options: str) -> Iterator[Running]:
    command = [sys.executable, "-I", str(SCRIPT), "--listen", "127.0.0.1:0", "--to", to, *options]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield Running(process)
        finally:
            process.terminate()
            _, errors = process.communicate(timeout=WAIT)
    assert (process.returncode, errors) == (0, "")


def receive(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size and (block := connection.recv(65_536)):
        received += block
    return bytes(received)


def round_trip(connection: socket.socket, size: int = 100) -> float:
    start = time.perf_counter()
    connection.sendall(bytes(size))
    assert len(receive(connection, size)) == size
    return time.perf_counter() - start


def transfer(*connections: socket.socket) -> float:
    """Seconds until the far end has 5 MB of each connection."""
    start = time.perf_counter()
    senders = [threading.Thread(target=each.sendall, args=(bytes(MEGABYTES),)) for each in connections]
    for sender in senders:
        sender.start()
    for connection in connections:
        assert receive(connection, 1) == b"!"
    return time.perf_counter() - start


def best(measure: Callable[[], float], times: int = 3) -> float:
    """The quickest of several: other processes on these cores only make it slower."""
    return min(measure() for _ in range(times))


def test_a_small_message_takes_the_round_trip() -> None:
    with server(echo) as to, relay(to, "--rtt-ms", "40") as running, running.connect() as connection:
        trips = [round_trip(connection) for _ in range(5)]
    assert min(trips) >= 0.040
    assert sorted(trips)[2] <= 0.060


def test_the_bandwidth_is_shaped() -> None:
    with server(count) as to, relay(to, "--mbit", "200") as running, running.connect() as connection:
        assert 0.15 <= best(lambda: transfer(connection)) <= 0.25


def test_delay_does_not_limit_the_bandwidth() -> None:
    options = ("--rtt-ms", "80", "--mbit", "200")
    with server(count) as to, relay(to, *options) as running, running.connect() as connection:
        assert 0.08 + 0.15 <= best(lambda: transfer(connection)) <= 0.08 + 0.25


def test_connections_share_the_bandwidth() -> None:
    with server(count) as to, relay(to, "--mbit", "400") as running, running.connect() as a, running.connect() as b:
        assert 0.15 <= best(lambda: transfer(a, b)) <= 0.25


def test_a_sender_waits_when_nobody_reads() -> None:
    def deaf(connection: socket.socket) -> None:
        connection.recv(1)
        time.sleep(WAIT)

    with server(deaf) as to, relay(to, "--mbit", "1000") as running, running.connect() as connection:
        connection.settimeout(0.3)
        sent, block = 0, bytes(1_000_000)
        with suppress(TimeoutError):
            while sent < 100 * len(block):
                sent += connection.send(block)
        assert sent < 50 * len(block)


def test_a_cut_link_holds_every_byte_and_then_delivers_all_in_order() -> None:
    sent = random.Random(1).randbytes(300_000)
    with server(echo) as to, relay(to, "--rtt-ms", "10") as running, running.connect() as connection:
        round_trip(connection)
        start = time.perf_counter()
        running.tell("cut 0.5")
        connection.sendall(sent)
        with running.connect() as new:
            new.sendall(b"new")
            for waiting in (connection, new):
                waiting.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    waiting.recv(1)
                waiting.settimeout(WAIT)
            assert receive(connection, len(sent)) == sent
            assert receive(new, 3) == b"new"
        assert 0.5 <= time.perf_counter() - start <= 1.5


def test_dropped_connections_are_reset_and_new_ones_accepted() -> None:
    with server(echo) as to, relay(to) as running, running.connect() as connection:
        round_trip(connection)
        assert running.stats()["connections"] == 1
        running.tell("drop")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        with running.connect() as new:
            round_trip(new)
            assert running.stats() == {"bytes_up": 200, "bytes_down": 200, "connections": 1, "accepted": 2}


def test_refused_for_a_time_and_then_accepted_again() -> None:
    with server(echo) as to, relay(to) as running, running.connect() as connection:
        round_trip(connection)
        start = time.perf_counter()
        running.tell("refuse 0.4")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        with pytest.raises(ConnectionRefusedError):
            running.connect()
        while True:
            with suppress(ConnectionRefusedError), running.connect() as new:
                round_trip(new)
                break
            time.sleep(0.02)
        assert 0.4 <= time.perf_counter() - start <= 1.5


def test_the_end_of_one_direction_leaves_the_other() -> None:
    def answer_at_the_end(connection: socket.socket) -> None:
        connection.sendall(receive(connection, MEGABYTES)[::-1])

    with server(answer_at_the_end) as to, relay(to, "--rtt-ms", "5") as running, running.connect() as connection:
        connection.sendall(b"question")
        connection.shutdown(socket.SHUT_WR)
        assert receive(connection, 100) == b"noitseuq"
        while running.stats()["connections"]:
            time.sleep(0.01)


def test_where_nobody_listens_the_connection_is_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        to = f"127.0.0.1:{free.getsockname()[1]}"
    with relay(to) as running, running.connect() as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)


def test_a_wrong_command_is_answered_on_stderr_and_the_relay_goes_on() -> None:
    command = [sys.executable, "-I", str(SCRIPT), "--listen", "127.0.0.1:0", "--to", "127.0.0.1:1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        running = Running(process)
        running.tell("cut soon")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT)
    assert errors == "relay: 'cut soon' is no command; give cut SECONDS, drop, refuse SECONDS or stats\n"
    assert process.returncode == 0
