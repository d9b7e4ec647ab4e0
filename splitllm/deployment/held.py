"""What the clients of a server have in common, kept on its disk: never older than what a lane has committed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from splitllm.deployment.journal import Journal
from splitllm.errors import CheckpointError
from splitllm.model.common import Common
from splitllm.model.trainable import Tensors


class Held:
    """A common adapter with its journal. It only goes on: a lane that goes back takes nothing out of it.

    Args:
        common: takes what the journal holds.
        journal: of this alone; its steps are the adapter's `changes`.
        steps: that each of these clients gives.
        clients: that train it.
        new: whether no lane has committed a step yet.

    Raises:
        CheckpointError: lanes have committed steps, and what they trained in common is missing.
    """

    def __init__(self, common: Common, journal: Journal, steps: int, clients: Iterable[int], *, new: bool) -> None:
        self.common, self._journal, self._lock = common, journal, threading.Lock()
        self._steps, self._clients = steps, set(clients)
        changes = next(iter(journal.steps()), None)
        if changes is not None:
            common.load(*journal.read(changes))
        elif not new:
            why = "what all lanes train in common is missing, though they have committed steps"
            raise CheckpointError(f"{journal.folder}: {why}; give a new --output-dir")
        self._written = -1 if changes is None else changes
        self.keeping()()

    def over(self, client: int) -> None:
        """Nothing more will come of this client."""
        self._clients.discard(client)

    def final(self) -> Tensors:
        """The adapter when a lane ends; with the last of them what is pending is stepped by, and kept."""
        if all(self.common.given.get(client, 0) >= self._steps for client in self._clients):
            self.common.step()
            self.keeping()()
        return self.common.adapter()

    def keeping(self) -> Callable[[], None]:
        """Take its state now; what is returned writes it, on any thread, unless a newer one is written already."""
        tensors, values = self.common.state()
        state, changes = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}, self.common.changes

        def write() -> None:
            with self._lock:
                if changes > self._written:
                    self._journal.write(changes, state, values)
                    self._written = changes

        return write
