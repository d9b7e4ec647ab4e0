"""What the children of a server do together comes in an order; who is out of turn is refused, and not the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from splitllm.errors import PeerError
from splitllm.wire.message import TOGETHER, Message


class Order:
    """The turns of one generation: `share` first, a step opens and closes, and `evaluated` and `finish` lie between.

    Args:
        step: from which the generation goes on.
    """

    def __init__(self, step: int) -> None:
        self._step, self._is_open = step, False
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
        if (kind == "close") != self._is_open:
            raise PeerError(f"{sender} sent {kind}, but step {due} is {'' if self._is_open else 'not '}open")
