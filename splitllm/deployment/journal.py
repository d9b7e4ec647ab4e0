"""What a role remembers of the last committed steps, so that its process may be killed at any time."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from splitllm.checkpoint import flush
from splitllm.deployment.entries import Entry, read_entry, taken, write_entry
from splitllm.errors import CheckpointError

FORMAT = "2"
_FINISHED, _OVER = "finished.safetensors", "over.safetensors"
logger = logging.getLogger(__name__)


class Journal:
    """The last entries of one role, `step-N.safetensors`, and whether its run is complete, or over before that.

    The folder is locked until the journal is closed or its process ends.

    Args:
        folder: made if missing; nothing else belongs in it.
        identity: whose journal this is, e.g. role, recipe and model. It is of use to nobody else.
        keep: entries that are kept, at least 1.

    Raises:
        CheckpointError: another process has it open, or it is of another identity.
        OSError: the folder cannot be made, read or written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str], keep: int = 2) -> None:
        assert keep >= 1, keep
        self.folder = folder
        self._identity = {**identity, "journal format": FORMAT}
        self._keep = keep
        self._ignored: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder, identity.get("role", "a role"))
        try:
            for unfinished in folder.glob(".*.writing"):
                unfinished.unlink()
            self._refuse_foreign()
            self._known = self.steps()
        except BaseException:
            self.close()
            raise

    def steps(self) -> list[int]:
        """Steps whose entries can be read back, newest first, at most `keep`; a damaged one is logged once."""
        return list(self.values())

    def values(self) -> dict[int, dict[str, Any]]:
        """Each of these steps, newest first -> the plain values that its entry holds."""
        found = ((step, self._sound(_name(step))) for step in self._files())
        sound = [(step, entry.values) for step, entry in found if entry is not None]
        return dict(sound[: self._keep])

    def newest_values(self) -> dict[str, Any]:
        """The plain values of the newest entry; empty if there is none."""
        return next(iter(self.values().values()), {})

    def write(self, step: int, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """As `write_taken`, of tensors that are in use, and may share storage."""
        self.write_taken(step, taken(tensors), values)

    def write_taken(self, step: int, tensors: dict[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Remember a step; when this returns it is on the disk, and only the newest `keep` are left.

        A step that is there is replaced. One that is neither there nor the newest is a mistake of the caller, who has
        to `forget_after` an earlier one first.

        Args:
            step: number of the committed step, 0 or more.
            tensors: that were `entries.taken`; possibly none.
            values: what JSON can carry.

        Raises:
            OSError: it cannot be written, for want of space say; all entries are as they were.
        """
        assert step >= 0 and (step in self._known or step > max(self._known, default=-1)), (step, self._known)
        write_entry(self.folder / _name(step), Entry(step, self._identity, dict(values), tensors))
        self._known = sorted({step, *self._known}, reverse=True)[: self._keep]
        for old in self._files():
            if old < self._known[-1]:
                (self.folder / _name(old)).unlink()

    def read(self, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors, on the CPU, and values of a step.

        Raises:
            CheckpointError: there is no such entry, or it is damaged.
        """
        try:
            entry = self._read(_name(step))
        except FileNotFoundError as error:
            there = ", ".join(map(str, self.steps())) or "none"
            path = self.folder / _name(step)
            raise CheckpointError(f"{path} is missing (steps there: {there}): go on from one that is there") from error
        return entry.tensors, entry.values

    def forget_after(self, step: int) -> None:
        """The run goes on from `step`: entries of later steps are removed, and with them the mark of its end."""
        later = [found for found in self._files() if found > step]
        if later:
            for end in (_FINISHED, _OVER):
                (self.folder / end).unlink(missing_ok=True)
        for found in later:
            (self.folder / _name(found)).unlink()
        flush(self.folder)
        self._known = [known for known in self._known if known <= step]

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self._sound(_FINISHED) is not None

    def mark_finished(self) -> None:
        """The run is complete, and stays so when this process ends.

        Raises:
            OSError: it cannot be written.
        """
        write_entry(self.folder / _FINISHED, Entry(max(self._known, default=0), self._identity, {}, {}))

    @property
    def over(self) -> bool:
        """Whether its run has come to an end before its last step, of which this role was told."""
        return self._sound(_OVER) is not None

    def mark_over(self) -> None:
        """The run will not be complete, and nobody need wait for it.

        Raises:
            OSError: it cannot be written.
        """
        write_entry(self.folder / _OVER, Entry(max(self._known, default=0), self._identity, {}, {}))

    def close(self) -> None:
        """Let another process open it. Closing twice is allowed."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def _files(self) -> list[int]:
        """Steps with a file, whatever is in it, newest first."""
        found = (re.fullmatch(r"step-(\d+)\.safetensors", path.name) for path in self.folder.iterdir())
        return sorted((int(match.group(1)) for match in found if match), reverse=True)

    def _read(self, name: str) -> Entry:
        entry = read_entry(self.folder / name)
        if name not in (_FINISHED, _OVER, _name(entry.step)):
            raise CheckpointError(f"{self.folder / name} holds step {entry.step}: give it its own name back")
        return entry

    def _sound(self, name: str) -> Entry | None:
        """An entry that can be read back whole."""
        try:
            return self._read(name)
        except FileNotFoundError:
            return None
        except CheckpointError as error:
            if name not in self._ignored:
                logger.warning("ignored: %s", error)
            self._ignored.add(name)
            return None

    def _refuse_foreign(self) -> None:
        names = [*(_name(step) for step in self._files()), _FINISHED, _OVER]
        for entry in filter(None, map(self._sound, names)):
            theirs, ours = entry.identity, self._identity
            differing = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
            if differing:
                parts = ", ".join(f"{key} {theirs.get(key)}, here {ours.get(key)}" for key in differing)
                raise CheckpointError(
                    f"{self.folder}: holds the journal of another run ({parts}); give a new --output-dir"
                )


def _name(step: int) -> str:
    return f"step-{step}.safetensors"


def _locked(folder: Path, role: str) -> int:
    """Take the folder for this process.

    Returns:
        a descriptor; the folder is free again when it is closed.
    """
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        complaint = f"another process uses this folder for {role}; stop that one, or give another --output-dir"
        raise CheckpointError(f"{folder}: {complaint}") from error
    return lock
