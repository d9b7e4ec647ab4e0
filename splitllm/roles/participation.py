"""Who takes part until the next round, and what everybody counts in it: kept by the server right above the clients.

Clients that are not asked open and close steps with nothing in them, and go on from the average like all others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from splitllm.model.trainable import Tensors
from splitllm.policy.history import History, Report, from_json, recorded, to_json, utility
from splitllm.policy.participation import Asked, Rules, select
from splitllm.policy.sampling import Draw
from splitllm.recipe import Recipe, intervals

COUNTS, HELD, HISTORY = "counts", "held", "history"
LARGEST_LOSS = 1e6
"""Mean nats of a label that a client is believed, of what it says itself."""


@dataclass
class Lesson:
    """What a client has told in the steps since the last round.

    Attributes:
        steps: that it took part in.
        squares: sum of the squares of its mean losses.
        seconds: from the opening of a step to its closing, all together.
    """

    steps: int = 0
    squares: float = 0.0
    seconds: float = 0.0


@dataclass
class Participation:
    """Of the clients of one server.

    Attributes:
        recipe: `rounds` and `seed` are read.
        names: client -> its name, of those below this server.
        clock: seconds, for what clients take.
        history: what is known of them, for the policy `oort`.
        rounds_held: so far, void ones not.
    """

    recipe: Recipe
    names: Mapping[int, str]
    clock: Callable[[], float] = time.monotonic
    history: History = field(default_factory=History)
    rounds_held: int = 0

    def __post_init__(self) -> None:
        """Nobody is asked yet."""
        self._levels = len(intervals(self.recipe))
        self._asked: tuple[int, frozenset[int]] = (-1, frozenset())
        self._lessons: dict[int, Lesson] = {}
        self.begin_anew()
        self._opened = 0.0

    def asked(self, step: int) -> frozenset[int]:
        """The clients that take part in a step, the same until the next round."""
        number = step // intervals(self.recipe)[0] + 1
        if self._asked[0] != number:
            self._asked = number, self._drawn(number)
        return self._asked[1]

    def opened(self) -> None:
        """A step begins."""
        self._opened = self.clock()

    def closed(self, client: int) -> None:
        """A client has come to the end of a step."""
        lesson = self._lessons.setdefault(client, Lesson())
        lesson.seconds += self.clock() - self._opened

    def count(self, labels: Mapping[int, int], losses: Mapping[int, Sequence[float | None]]) -> None:
        """A step is being committed.

        Args:
            labels: client -> how many it trained on.
            losses: client -> summed loss (None if it is not finite), labels, tokens.
        """
        for client, number in labels.items():
            self._counts[client] = [count + number for count in self._counts[client]]
        for client, (loss, predicted, _) in losses.items():
            if loss is not None and predicted:
                lesson = self._lessons.setdefault(client, Lesson())
                mean = min(abs(loss) / predicted, LARGEST_LOSS)
                lesson.steps, lesson.squares = lesson.steps + 1, lesson.squares + mean**2

    def weights(self, examples: Mapping[int, int]) -> dict[int, list[float]]:
        """What each client counts at each level; 0 if it took no part since the last round there.

        Args:
            examples: client -> rows that it has.
        """
        by = self.recipe.rounds.weights
        if by == "tokens":
            return {client: list(self._counts[client]) for client in examples}
        each = {client: float(rows) if by == "examples" else 1.0 for client, rows in examples.items()}
        return {c: [one if count else 0.0 for count in self._counts[c]] for c, one in each.items()}

    def held(self, due: int, step: int, left_out: Sequence[str], examples: Mapping[int, int]) -> None:
        """A round was held: counting begins anew, at its level and below.

        Args:
            due: the highest level that averaged.
            step: the last before it.
            left_out: whose updates are not in the average.
            examples: client -> rows that it has.
        """
        self.rounds_held += 1
        for client, counts in self._counts.items():
            self._counts[client] = [0.0] * due + counts[due:]
        asked, lessons = self.asked(step), self._lessons
        reports = {
            self.names[client]: Report(utility(examples[client], lesson.squares / lesson.steps), lesson.seconds)
            for client, lesson in lessons.items()
            if client in asked and lesson.steps and self.names[client] not in left_out
        }
        missing = [self.names[client] for client in asked if self.names[client] not in reports]
        waited = max((lesson.seconds for lesson in lessons.values()), default=0.0)
        if self.recipe.rounds.participation.policy == "oort":
            self.history = recorded(self.history, self._asked[0], reports, missing, waited)
        self._lessons = {}

    def lesson(self, client: int) -> Lesson:
        """What a client has told in the steps since the last round."""
        return self._lessons.get(client, Lesson())

    def begin_anew(self) -> None:
        """Nobody counts yet, as after a round of all levels."""
        self._counts = {client: [0.0] * self._levels for client in self.names}
        self._lessons = {}

    def state(self) -> Tensors:
        """All that a resumed run needs."""
        counts = [self._counts[client] for client in sorted(self._counts)]
        text = np.frombuffer(json.dumps(to_json(self.history)).encode(), dtype=np.uint8)
        return {
            COUNTS: torch.tensor(counts, dtype=torch.float64),
            HELD: torch.tensor(self.rounds_held),
            HISTORY: torch.from_numpy(text.copy()),
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as a `state()` tells."""
        rows: list[list[float]] = tensors[COUNTS].tolist()
        self._counts = dict(zip(sorted(self._counts), rows, strict=True))
        self.rounds_held = int(tensors[HELD])
        self.history = from_json(json.loads(tensors[HISTORY].cpu().numpy().tobytes()))
        self._asked, self._lessons = (-1, frozenset()), {}

    def _drawn(self, number: int) -> frozenset[int]:
        wanted, present = self.recipe.rounds.participation, list(self.names.values())
        rules = Rules(wanted.policy, wanted.share, wanted.count, 1.0, min(wanted.minimum, len(present)))
        numbers = {name: client for client, name in self.names.items()}
        attempt = 0
        while True:
            found = select(rules, present, Draw(self.recipe.seed, number, attempt), self.history)
            if isinstance(found, Asked):
                return frozenset(numbers[name] for name in found.clients)
            assert found.redraw, found.line
            attempt += 1
