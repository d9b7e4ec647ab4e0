"""What crosses the cuts, for the tests that look at it."""

from __future__ import annotations

import pytest

from splitllm.wire.link import LocalLink
from splitllm.wire.message import Message

Wire = list[tuple[Message, Message]]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """Every request of any role with its reply, in the order of the replies."""
    seen: Wire = []
    request = LocalLink.request

    async def spy(self: LocalLink, message: Message) -> Message:
        reply = await request(self, message)
        seen.append((message, reply))
        return reply

    monkeypatch.setattr(LocalLink, "request", spy)
    return seen
