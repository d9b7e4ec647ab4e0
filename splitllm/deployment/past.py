"""What a role can go back to: the states in its journal, and the worker that they are about."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from splitllm.deployment.entries import taken
from splitllm.deployment.footprint import gpu_mib, measured
from splitllm.deployment.held import Held
from splitllm.deployment.journal import Journal
from splitllm.deployment.station import Station
from splitllm.errors import RejoinError
from splitllm.recipe import sharing, start_digest
from splitllm.roles.assembly import adapter_in
from splitllm.roles.recovery import Standing
from splitllm.roles.together import Tensors
from splitllm.roles.worker import Worker

MIB = 2**20
COMMON_STEPS = "common_steps"
HELD = "held: "
"""Before the name of a part in closing words: what the tensors of that part took at most."""


class Past:
    """What a role can go back to: its journal, and the worker that it is about.

    Args:
        station: whose it is.
        journal: of that role.
        worker: its shard.
        values: plain values to keep beside the tensors.
        put_back: takes those values when the role goes back.
        held: what its worker trains in common with others that go at their own pace.
        speaks_for: whose memory its closing words tell, where that is not `worker`: of a lane the whole server's.
        exported: the role's part of the adapter where that is not what its worker's state holds.
        scaled: makes that of what is held in common.
    """

    def __init__(
        self,
        station: Station,
        journal: Journal,
        worker: Worker,
        values: Callable[[], Mapping[str, Any]] = dict,
        put_back: Callable[[Mapping[str, Any]], None] = lambda values: None,
        *,
        held: Held | None = None,
        speaks_for: Worker | None = None,
        exported: Callable[[], Tensors] | None = None,
        scaled: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    ) -> None:
        self.journal, self.worker, self._shares = journal, worker, sharing(station.recipe, station.name)
        self._footprint = station.footprint
        self._values, self._put_back, self._speaks_for = values, put_back, speaks_for or worker
        self._held, self._lock, self._returns = held, threading.Lock(), 0
        self._exported, self._scaled = exported, scaled
        if not self.journal.steps():
            self._keep(0, start_digest(station.recipe))

    def standing(self) -> Standing:
        """The states that are kept. From now on no commit changes that which was begun before."""
        with self._lock:
            self._returns += 1
            states = ((step, str(values["origin"])) for step, values in self.journal.values().items())
            return Standing(self._shares, tuple(states))

    def commit(self, step: int, generation: int) -> None:
        """Keep the state as it is after `step` steps, of which the last was this generation's."""
        self._keep(step, str(generation))
        self._footprint.stepped(self._speaks_for)

    def committing(self, step: int, generation: int) -> Callable[[], None]:
        """The same in two parts: the state is taken now, and what is returned writes it, on any thread.

        It raises RejoinError and writes nothing if the role was asked meanwhile what it can go back to.
        """
        state = taken(self.state())
        about, returns = {"origin": str(generation), "beside": dict(self._values())}, self._returns
        keep_common = self._held.keeping() if self._held is not None else None

        def write() -> None:
            if keep_common is not None:
                keep_common()
            with self._lock:
                if self._returns != returns:
                    raise RejoinError(f"step {step} was not committed: the run has gone back")
                self.journal.write_taken(step, state, about)
            self._footprint.stepped(self._speaks_for)

        return write

    def restore(self, step: int) -> None:
        """Be as after `step` steps; what came later is forgotten."""
        tensors, values = self.journal.read(step)
        self.worker.load(tensors)
        self._put_back(values["beside"])
        self.journal.forget_after(step)

    def adopt(self, step: int, origin: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as another role of the tier is in that state."""
        self.worker.load(tensors)
        self.journal.forget_after(step)
        self._keep(step, origin)

    def _keep(self, step: int, origin: str) -> None:
        self.journal.write(step, self.state(), {"origin": origin, "beside": self._values()})

    def state(self) -> Tensors:
        """Adapter and optimiser as they are."""
        return self.worker.state()

    def adapter(self) -> Tensors:
        """The role's part of the adapter."""
        if self._exported is not None:
            return self._exported()
        return adapter_in(self.state()) | (self._held.common.adapter() if self._held is not None else {})

    def final_adapter(self) -> Tensors:
        """The same when the run ends, or this lane of it."""
        return self.adapter() | (self._scaled(self._held.final()) if self._held is not None else {})

    def mark_finished(self) -> None:
        """The run is complete, and stays so when this process ends."""
        self.journal.mark_finished()

    def closing_words(self) -> dict[str, float]:
        """Memory of this process, and what its tensors took at most, in MiB."""
        words = {"rss_mib": measured(), **gpu_mib(self.worker.device), **self._footprint.words()}
        if self._held is not None:
            words[COMMON_STEPS] = self._held.common.steps
        return words | {f"{HELD}{name}": round(size / MIB, 2) for name, size in self._speaks_for.peak().items()}
