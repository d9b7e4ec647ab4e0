"""What this machine and this process have of memory, as Linux and the device tell it. Bytes."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from contextlib import suppress
from pathlib import Path

import torch

_CGROUPS = (  # limit and usage; below them lies what the kernel gives back when it is asked for more
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's mallopt
THRESHOLD, SMALL_THRESHOLD = 2**16, 2**20
_returning = False
CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def resident_bytes() -> int:
    """What this process has resident now."""
    return int((PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """What it had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_bytes() -> int | None:
    """What processes of this machine can still take without swapping; None where nobody says."""
    found = [_free_of_the_machine(), *(_free_of_a_group(*names) for names in _CGROUPS)]
    return min((free for free in found if free is not None), default=None)


def device_here() -> torch.device:
    """Where this process will compute, as accelerate will say once it is asked."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def device_bytes(device: torch.device) -> int | None:
    """What this process can still take on its device, up to a cap on its share; None of a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    cap = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(min(free + torch.cuda.memory_reserved(device), cap))


def gives_back() -> bool:
    """Whether the allocator returns large blocks when they are freed, as the environment or `return_at_once` has it."""
    told = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    return _returning or (told.isdecimal() and int(told) <= SMALL_THRESHOLD)


def one_arena() -> None:
    """Let all threads that start from now on take memory from one place: what one has freed another can use."""
    _mallopt(M_ARENA_MAX, 1)


def return_at_once() -> None:
    """Let the allocator return every large block to the system when it is freed; costs time (decision 8)."""
    global _returning
    _returning = _mallopt(M_MMAP_THRESHOLD, THRESHOLD)


def give_back() -> None:
    """Return freed memory to the system, where the allocator (glibc's) can be asked to."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(parameter: int, value: int) -> bool:
    with suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    return False


def _free_of_the_machine() -> int | None:
    with suppress(OSError):
        for line in (PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _free_of_a_group(limit: str, usage: str, reclaimable: str) -> int | None:
    """Of a container, by the files of control groups; None where it has no limit."""
    try:
        most = (CGROUP / limit).read_text().strip()
        used = int((CGROUP / usage).read_text())
        told = dict(line.split() for line in (CGROUP / limit).with_name("memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if most == "max" or int(most) >= 1 << 60:
        return None
    return max(0, int(most) - used + int(told.get(reclaimable, 0)))
