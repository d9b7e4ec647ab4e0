"""Folders for files that go with their process: removed at the end, or by whoever comes next if it was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from splitllm.errors import RecipeError

PREFIX, LOCK = "splitllm-", "in-use"


class Folder:
    """A folder of this process alone.

    Args:
        above: an existing folder; what dead processes have left in it is removed.

    Attributes:
        path: of the new folder.

    Raises:
        RecipeError: `above` is no folder that can be written to.
    """

    def __init__(self, above: str | None) -> None:
        if problems := unwritable(above):
            raise RecipeError(problems)
        _sweep(Path(str(above)))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=above))
        lock = os.open(self.path / f"{LOCK}-soon", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (self.path / f"{LOCK}-soon").rename(self.path / LOCK)
        self._removal = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def remove(self) -> None:
        """With all that is in it."""
        self._removal()


def unwritable(above: str | None) -> list[str]:
    """What is wrong with a place for folders, if anything is."""
    if above is not None and Path(above).is_dir() and os.access(above, os.W_OK | os.X_OK):
        return []
    return [f"server.zero.nvme_path: {above} is no folder that can be written to; create it, or name another"]


def _remove(path: Path, lock: int, process: int) -> None:
    if os.getpid() == process:  # a child that was forked has this to do as well
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _sweep(above: Path) -> None:
    for path in above.glob(f"{PREFIX}*/{LOCK}"):
        try:
            lock = os.open(path, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its process lives
            continue
        else:
            shutil.rmtree(path.parent, ignore_errors=True)
        finally:
            os.close(lock)
