"""Who is asked in a round that another engine runs, and when all have answered: plain numbers, the time is an argument.

Edges are known by name. The nodes behind them come and go: a node that was restarted has another number.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from splitllm.errors import AverageError, PeerError

AGAIN_SECONDS = 1.0
FAILURES = 10  # of one node in a row


@dataclass
class Calling:
    """The rounds of a run as seen by who asks.

    Attributes:
        edges: how many there are.
        step: of the last outcome; -1: there is none.
        names: node -> the edge behind it, once it has answered.
        answers: edge -> the step that it offers now; None: it is through.
    """

    edges: int
    step: int = -1
    names: dict[int, str] = field(default_factory=dict)
    answers: dict[str, int | None] = field(default_factory=dict)
    _asked: set[int] = field(default_factory=set)
    _silent: dict[int, float] = field(default_factory=dict)
    _failures: dict[int, int] = field(default_factory=dict)
    _left_alone: set[int] = field(default_factory=set)
    _known: frozenset[str] = frozenset()

    @property
    def complete(self) -> bool:
        """Whether all edges have answered."""
        return len(self.answers) >= self.edges

    def due(self, nodes: Collection[int], now: float) -> list[int]:
        """Whom to ask now, of the nodes that are connected; they count as asked."""
        found = [
            node
            for node in sorted(nodes)
            if node not in self._asked | self._left_alone
            and self.names.get(node) not in self.answers
            and self._silent.get(node, now) <= now
        ]
        self._asked.update(found)
        return found

    def answered(self, node: int, edge: str, step: int | None) -> str | None:
        """A node has answered; why that does not count, or None if it does.

        An edge that was restarted may offer the step of the last outcome once more: it is to get that outcome again.

        Args:
            node: it.
            edge: the one behind it.
            step: that the edge offers; None: it is through.

        Raises:
            AverageError: two nodes say that they are the same edge.
        """
        self._asked.discard(node)
        self._failures.pop(node, None)
        if self._known and edge not in self._known:
            self._left_alone.add(node)
            return f"{edge} takes no part: there are {self.edges} edges without it"
        twins = [other for other, name in self.names.items() if name == edge and other != node]
        if any(twin in self._asked for twin in twins) or (twins and edge in self.answers):
            raise AverageError(f"nodes {node} and {twins[0]} are both {edge}; give each SuperNode the name of its edge")
        for twin in twins:
            del self.names[twin]
        self.names[node] = edge
        if step is not None and step <= self.step:
            return f"{edge} is at step {step} again, and gets that outcome once more"
        self.answers[edge] = step
        if self.complete:
            self._known = frozenset(self.answers)
        return None

    def failed(self, node: int, reason: str, now: float) -> str:
        """A node has failed; what becomes of it.

        Raises:
            PeerError: it is that of an edge, and has failed too often in a row.
        """
        self._asked.discard(node)
        name = self.names.get(node, f"node {node}")
        self._failures[node] = self._failures.get(node, 0) + 1
        self._silent[node] = now + AGAIN_SECONDS
        if self._failures[node] < FAILURES:
            return f"{name} failed and is asked again: {reason}"
        if node in self.names:
            raise PeerError(f"{name} has failed {FAILURES} times in a row: {reason}")
        self._left_alone.add(node)
        return f"{name} is left alone, as it has failed {FAILURES} times and never been an edge: {reason}"

    def agreed(self) -> int | None:
        """The step whose round this is; None: the edges are through. The next question is of the next round.

        Raises:
            AverageError: the edges are not at one step.
        """
        answers, self.answers = self.answers, {}
        if len(set(answers.values())) > 1:
            found = ", ".join(
                f"{edge}: {'the end' if step is None else step}" for edge, step in sorted(answers.items())
            )
            raise AverageError(f"the edges are not at one step ({found}); use one recipe, and resume all from one step")
        (step,) = set(answers.values())
        self.step = self.step if step is None else step
        return step
