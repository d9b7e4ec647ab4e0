"""Processes of roles over loopback: started, watched until all have ended, and what each of them took and said."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from splitllm.roles.ledger import PARTS

MIB = 2**20
PAUSE = 0.1  # seconds between two looks
HELD = ("weights", "weights in files", "adapter and optimiser", "activations of a batch")


class RoleFailed(Exception):
    """A role has failed, or the run did not end in time."""


def start(words: Sequence[str], log: Path, environment: Mapping[str, str], count: int) -> subprocess.Popen[bytes]:
    """`splitllm` with these words, in a session of its own; several processes by `accelerate launch`."""
    shared = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "HF_HUB_OFFLINE": "1", **environment}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
    launch = [*launch, "--main_process_port", str(free_port())] if count > 1 else []
    command = [sys.executable, *launch, "-m", "splitllm", *words]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=shared, start_new_session=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def watched(
    processes: Mapping[str, subprocess.Popen[bytes]], counts: Mapping[str, int], limit: float
) -> dict[str, int]:
    """Peaks by role, of a server of several processes by rank, when all have ended.

    Raises:
        RoleFailed: one of them has, or they take longer than `limit` seconds.
    """
    peaks: dict[str, int] = {}
    until = time.monotonic() + limit
    try:
        while any(process.poll() is None for process in processes.values()):
            for name, process in processes.items():
                for label, pid in _pids(name, process.pid, counts[name]):
                    peaks[label] = max(peaks.get(label, 0), resident(pid))
            if failed := [name for name, process in processes.items() if process.poll()]:
                raise RoleFailed(f"{failed[0]} ended with status {processes[failed[0]].returncode}")
            if time.monotonic() > until:
                raise RoleFailed(f"not ended after {limit:.0f} s")
            time.sleep(PAUSE)
    finally:
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also the ranks of a launcher
            process.wait()
    return peaks


def _pids(name: str, pid: int, count: int) -> Iterator[tuple[str, int]]:
    """Of the process of a role, or of the ranks that a launcher has started."""
    if count == 1:
        yield name, pid
        return
    for child in _children(pid):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            for word in environment:
                if word.startswith(b"RANK="):
                    yield f"{name}, rank {int(word[5:])}", child


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def resident(pid: int) -> int:
    """The peak of a process, in bytes, which the kernel keeps as long as it lives."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+)", status)  # a zombie has none
    return int(found[1]) * 1024 if found else 0


def said(log: Path, rank: int = 0) -> dict[str, Any]:
    """What a role logged of itself.

    Args:
        log: of the role, to which all of its ranks write.
        rank: whose prediction is wanted.

    Returns:
        Tokens a second in its steps after the first; what it predicted, in bytes, and its parts; what it held once it
        had stepped.
    """
    events = list(_events(log))
    steps = [event for event in events if event["event"] == "step" and event.get("tokens")][1:]
    told: dict[str, Any] = {}
    if steps:
        told["tokens_per_second"] = sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)
    for event in events:
        if "predicted_mib" in event and event.get("rank", 0) == rank and "predicted" not in told:
            told["predicted"] = event["predicted_mib"] * MIB
            told["parts"] = {part: event[part] * MIB for part in PARTS if part in event}
        if "measured_mib" in event:
            told["held"] = {name: event[name] * MIB for name in HELD if name in event}
    return told


def _events(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):  # two ranks at once, or what a library prints
                yield json.loads(line)


def imported_of(packages: Sequence[str], log: Path) -> list[str]:
    """Which of some packages a process imported, where it ran with PYTHONPROFILEIMPORTTIME: the log tells all."""
    found = {
        line.rpartition("|")[2].strip() for line in log.read_text().splitlines() if line.startswith("import time:")
    }
    assert "torch" in found or not found, "imports are told, or nothing is"
    return [name for name in packages if name in found]


def resident_after(imports: str) -> int:
    """Bytes of an interpreter that has imported something."""
    code = f"{imports}; print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code]
    status = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ}).stdout
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) * 1024
