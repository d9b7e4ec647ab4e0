"""Where the children of a role meet: a step opens, and closes, only when all of them are there."""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import Awaitable, Callable, Sequence

from splitllm.errors import PeerError
from splitllm.wire.message import Message

Settle = Callable[[list[Message]], Awaitable[Callable[[Message], Message]]]


class Meeting:
    """Collects one message from every child; the last to come settles the matter for all.

    Args:
        children: names, in the order in which their messages are put before `settle`.
        settle: takes all messages, returns what makes each child's reply. Of a method the object is not kept alive: it
            is the one that holds the meeting, and a run's tensors would stay until the garbage is collected.
    """

    def __init__(self, children: Sequence[str], settle: Settle) -> None:
        self._children = list(children)
        self._settle: Callable[[], Settle | None]
        self._settle = weakref.WeakMethod(settle) if inspect.ismethod(settle) else lambda: settle
        self._here: dict[str, Message] = {}
        self._outcome: asyncio.Future[Callable[[Message], Message]] | None = None

    async def join(self, message: Message) -> Message:
        """Wait for the others, then get the reply.

        Raises:
            PeerError: the sender is unknown, came twice, or is at another step than the others.
            Exception: what `settle` raised; every child gets it.
        """
        self._check(message)
        if self._outcome is None:
            self._outcome = asyncio.get_running_loop().create_future()
        self._here[message.sender] = message
        outcome = self._outcome
        if len(self._here) == len(self._children):
            messages = [self._here[name] for name in self._children]
            self._here, self._outcome = {}, None
            try:
                settle = self._settle()
                assert settle is not None, "whoever is asked is there"
                outcome.set_result(await settle(messages))
            except BaseException as error:
                outcome.set_exception(error)  # those who wait would wait for ever
                outcome.exception()  # nobody may be waiting
                raise
        return (await asyncio.shield(outcome))(message)  # one child's cancellation is not the others'

    def _check(self, message: Message) -> None:
        if message.sender not in self._children:
            raise PeerError(f"{message.sender} is not a child here (children: {', '.join(self._children)})")
        if message.sender in self._here:
            raise PeerError(f"{message.sender} sent {message.kind} twice in step {message.step}")
        steps = {other.step for other in self._here.values()}
        if steps - {message.step}:
            raise PeerError(f"{message.sender} is at step {message.step}, the others at {steps}")
