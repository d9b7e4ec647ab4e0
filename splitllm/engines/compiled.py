"""Operators that DeepSpeed compiles on first use: what was killed while it compiled leaves a lock that nobody opens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

LOCK = "lock"  # as torch calls it
YOUNG = 30.0  # seconds: a compiler may not be running yet
PROC = Path("/proc")


def open_dead_locks(*names: str) -> None:
    """Remove the locks of operators that no process compiles; who waits for one would wait for ever."""
    folders = [folder for folder in _folders(names) if (folder / LOCK).exists()]
    if not folders:
        return
    compiled = set(_working_folders())
    for folder in folders:
        try:
            age = time.time() - (folder / LOCK).stat().st_mtime
        except FileNotFoundError:  # it was finished meanwhile
            continue
        if age > YOUNG and folder.resolve() not in compiled:
            (folder / LOCK).unlink(missing_ok=True)


def _folders(names: tuple[str, ...]) -> list[Path]:
    """Where operators of these names are compiled, by torch's rules."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    roots = [Path(chosen)] if chosen else list(Path(get_default_build_root()).glob("*"))
    return [root / name for root in roots for name in names]


def _working_folders() -> Iterator[Path]:
    """Of all processes: a compiler works in the operator's folder."""
    for process in PROC.glob("[0-9]*"):
        try:
            yield (process / "cwd").resolve(strict=True)
        except OSError:  # it has ended, or is somebody else's
            continue
