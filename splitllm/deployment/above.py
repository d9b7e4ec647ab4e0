"""What the role above says as it lets a role in, and what it is told when the run cannot go on."""

from __future__ import annotations

import asyncio
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from splitllm.errors import DivergedError, PeerError, SplitLLMError
from splitllm.roles.checks import LONGEST_WORDS
from splitllm.roles.together import is_count
from splitllm.wire.message import Message
from splitllm.wire.uplink import RemoteLink

TELL_SECONDS = 5.0


@dataclass(frozen=True)
class Told:
    """What the role above says in its welcome.

    Attributes:
        shard: first block that this role holds, and one past the last.
        batch_size, accumulate, in_flight: of this role's clients.
    """

    shard: tuple[int, int]
    batch_size: int
    accumulate: int
    in_flight: int

    @classmethod
    def from_welcome(cls, welcome: Mapping[str, Any], parent: str, blocks: int) -> Told:
        """As it travelled.

        Args:
            welcome: its values.
            parent: who sent it.
            blocks: of the model.

        Raises:
            PeerError: it does not say what it should.
        """
        shard: Any = welcome.get("shard")
        counts: list[Any] = [welcome.get(key) for key in ("batch_size", "accumulate", "in_flight")]
        whole = isinstance(shard, list) and len(shard) == 2 and all(map(is_count, [*shard, *counts]))
        if not whole or not shard[0] <= shard[1] <= blocks or min(counts) < 1:
            said = reprlib.repr([shard, *counts])
            raise PeerError(f"{parent}: its welcome names no blocks of the {blocks}, or no sizes of batches: {said}")
        return cls((shard[0], shard[1]), *counts)


async def tell_above(uplink: RemoteLink, name: str, error: DivergedError, client: int = 0) -> None:
    """Tell the role above, unless that is where it comes from, that this run cannot go on.

    Args:
        uplink: to the role above.
        name: of this role.
        error: what is not finite here.
        client: number of the client that this is.
    """
    what = " ".join(str(error).split())[:LONGEST_WORDS]
    with suppress(SplitLLMError, TimeoutError):  # the answer is an error
        async with asyncio.timeout(TELL_SECONDS):
            await uplink.request(Message("diverged", name, (0, client, 0), {"what": what}))
