"""What the clients of a server have in common, kept on its disk: never older than what a lane has committed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from splitllm.deployment.entries import taken
from splitllm.deployment.journal import Journal
from splitllm.errors import CheckpointError
from splitllm.model.common import Common
from splitllm.model.trainable import Tensors


class Held:
    """A common adapter with its journal. It only goes on: a lane that goes back takes nothing out of it.

    Args:
        common: takes what the journal holds.
        journal: of this alone; its steps are the adapter's `changes`.
        steps: that each client gives.
        committed: client -> steps that its lane has committed.

    Raises:
        CheckpointError: lanes have committed steps that are not in it, since its journal is missing or damaged.
    """

    def __init__(self, common: Common, journal: Journal, steps: int, committed: Mapping[int, int]) -> None:
        self.common, self._journal, self._lock = common, journal, threading.Lock()
        self._steps, self._clients = steps, frozenset(committed)
        changes = next(iter(journal.steps()), -1)
        if changes >= 0:
            common.load(*journal.read(changes))
        for client, step in committed.items():
            if common.given.get(client, 0) < step:
                found = f"{common.given.get(client, 0)} steps of client {client}, whose lane has committed {step}"
                raise CheckpointError(f"{journal.folder}: what all lanes train has {found}; give a new --output-dir")
        self._written = changes
        self._newest = self._taken()
        self._write()

    def over(self, client: int) -> None:
        """Nothing more will come of this client."""
        self._clients -= {client}

    def final(self) -> Tensors:
        """The adapter when a lane ends; with the last of them what is pending is stepped by, and kept."""
        if all(self.common.given.get(client, 0) >= self._steps for client in self._clients):
            self.common.step()
            self.keeping()()
        return self.common.adapter()

    def keeping(self) -> Callable[[], None]:
        """Take its state now; what is returned writes it, or one that was taken later, on any thread."""
        self._newest = self._taken()
        return self._write

    def _taken(self) -> tuple[int, Tensors, dict[str, object]]:
        tensors, values = self.common.state()
        return self.common.changes, taken(tensors), values

    def _write(self) -> None:
        with self._lock:
            changes, tensors, values = self._newest
            if changes > self._written:
                self._journal.write_taken(changes, tensors, values)
                self._written = changes
