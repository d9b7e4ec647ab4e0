"""What the children of a server do together comes in an order; who is out of turn is refused, and not the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from splitllm.errors import PeerError
from splitllm.wire.message import TOGETHER, Message


class Order:
    """The turns of one generation: `share` first, a step opens and closes, and `evaluated` and `finish` lie between.

    Args:
        step: from which the generation goes on.
        round_due: whether a round ends the step after which so many are done.
    """

    def __init__(self, step: int, round_due: Callable[[int], bool] = lambda steps: False) -> None:
        self._step, self._is_open, self._round_due = step, False, round_due
        self._owes_round = set[str]()
        self._asking: dict[str, str] = {}

    @contextmanager
    def turn(self, message: Message) -> Iterator[None]:
        """While a request is being answered; micro-batches have no turns.

        Raises:
            PeerError: something else is due of its sender.
        """
        if message.kind not in TOGETHER:
            yield
            return
        self._check(message)
        self._asking[message.sender] = message.kind
        try:
            yield
        finally:
            del self._asking[message.sender]
        if message.kind == "round":
            self._owes_round.discard(message.sender)
        if message.kind == "close" and self._round_due(message.step + 1):
            self._owes_round.add(message.sender)
        if message.kind in ("open", "close"):
            self._is_open = message.kind == "open"
            self._step = message.step + (not self._is_open)

    def _check(self, message: Message) -> None:
        kind, sender, step = message.kind, message.sender, message.step
        if sender in self._asking:
            raise PeerError(f"{sender} sent {kind} before its {self._asking[sender]} was answered")
        due = 0 if kind == "share" else self._step
        if step != due:
            raise PeerError(f"{sender} sent {kind} of step {step}, where {due} is due")
        of_round = kind in ("secure", "round")
        if of_round != (sender in self._owes_round):
            raise PeerError(f"{sender} sent {kind}, where {'no' if of_round else 'a'} round is due")
        if of_round:
            return
        if (kind == "close") != self._is_open:
            raise PeerError(f"{sender} sent {kind}, but step {due} is {'' if self._is_open else 'not '}open")
