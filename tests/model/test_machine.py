"""What is left of memory: by the machine, by a container's control groups of either version, and by what is freed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from splitllm.model import machine
from splitllm.model.machine import available_bytes, device_bytes, give_back, peak_bytes, resident_bytes

MIB = 2**20


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1,000 MiB free."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    write(tmp_path / "proc", meminfo=f"MemTotal: 9999999 kB\nMemAvailable: {1000 * 1024} kB\n")
    return tmp_path / "cgroup"


def test_without_a_container_the_machine_tells(elsewhere: Path) -> None:
    assert available_bytes() == 1000 * MIB


def test_a_container_of_version_2_leaves_its_limit_less_what_cannot_be_reclaimed(elsewhere: Path) -> None:
    files = {"memory__current": str(500 * MIB), "memory__stat": f"anon 1\ninactive_file {100 * MIB}\n"}
    write(elsewhere, memory__max=str(700 * MIB), **files)
    assert available_bytes() == 300 * MIB
    write(elsewhere, memory__max="max\n", **files)
    assert available_bytes() == 1000 * MIB


def test_a_container_of_version_1_does_the_same(elsewhere: Path) -> None:
    files = {"memory__usage_in_bytes": str(500 * MIB), "memory__stat": f"total_inactive_file {100 * MIB}\n"}
    write(elsewhere / "memory", memory__limit_in_bytes=str(600 * MIB), **files)
    assert available_bytes() == 200 * MIB
    write(elsewhere / "memory", memory__limit_in_bytes=str(2**63 - 4096), **files)  # what the kernel writes for none
    assert available_bytes() == 1000 * MIB


def test_a_container_beyond_its_limit_leaves_nothing(elsewhere: Path) -> None:
    write(elsewhere, memory__max="10", memory__current="20", memory__stat="inactive_file 0\n")
    assert available_bytes() == 0


def test_where_nobody_says_nothing_is_known(elsewhere: Path) -> None:
    (machine.PROC / "meminfo").unlink()
    assert available_bytes() is None


def test_this_process_has_what_it_takes() -> None:
    before = resident_bytes()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert resident_bytes() - before >= 60 * MIB
    assert peak_bytes() >= resident_bytes() - MIB
    assert held.nbytes and device_bytes(torch.device("cpu")) is None
    give_back()


CODE = """
import torch
from splitllm.model.machine import gives_back, resident_bytes, return_at_once

large = torch.ones(2**22)  # 16 MiB: freed, it teaches glibc to keep what is smaller
del large
before = gives_back()
return_at_once()
held = [torch.ones(2**18) for _ in range(100)]  # 1 MiB each
taken = resident_bytes()
del held[::2]
print(before, gives_back(), (taken - resident_bytes()) // 2**20)
"""


def test_freed_memory_goes_back_at_once_where_that_was_asked_for() -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    words = [sys.executable, "-c", CODE]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=clean, check=True)
    before, after, returned = done.stdout.split()
    assert (before, after) == ("False", "True")
    assert int(returned) >= 40
