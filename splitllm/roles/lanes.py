"""The door of a server whose clients go at their own pace: each has a lane.

A *lane* is one client with the roles above it. It has steps, generations and journals of its own, so that whatever
becomes of a client, no other client's lane notices. All lanes of a server share its shard and its device, where they
meet in batches. A message belongs to the lane of the client that its place names.

Where a child carries several lanes, as an edge does to the cloud, what is wrong in one of them is answered with an
error in that lane: the connection, and with it the others, stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from splitllm.errors import CheckpointError, DivergedError, PeerError, RejoinError, SplitLLMError
from splitllm.roles.buffered import BufferedHall
from splitllm.roles.checks import LONGEST_WORDS
from splitllm.roles.gate import Gate
from splitllm.roles.hall import Hall
from splitllm.roles.merging import MergeDoor
from splitllm.roles.parking import Parking
from splitllm.roles.runner import Batching
from splitllm.wire.message import Message

logger = logging.getLogger(__name__)


class LaneError(PeerError):
    """One lane cannot go on as it is; those beside it can."""


class All:
    """Set when all of these events are; has what of `asyncio.Event` is needed to wait for it."""

    def __init__(self, events: Iterable[asyncio.Event]) -> None:
        self._events = list(events)

    def is_set(self) -> bool:
        """Whether all are."""
        return all(event.is_set() for event in self._events)

    async def wait(self) -> None:
        """Until all are."""
        for event in self._events:
            await event.wait()


class Lanes:
    """Stands where a `Gate` does, in front of many.

    Args:
        gates: client -> the gate of its lane.
        batching: what all lanes share.
        park_after: seconds after which the adapter of an idle lane leaves the device for host memory; None: never.
        over: told of a client whose values are not finite: its lane ends without an adapter.
        hall: where members of rounds come, if there are any.
        merges: what other servers bring of theirs.

    Attributes:
        children: names of the roles below.
        finished: set when all lanes are complete, or over.
        all_left: set when every child has said goodbye to every lane.
    """

    def __init__(
        self,
        gates: Mapping[int, Gate],
        batching: Batching,
        park_after: float | None = None,
        over: Callable[[int], None] = lambda client: None,
        hall: Hall | BufferedHall | None = None,
        merges: MergeDoor | None = None,
    ) -> None:
        self.gates, self.batching, self._tell_of = dict(gates), batching, over
        self._hall, self._merges = hall, merges
        self._parking = Parking(self.gates, park_after)
        self._lanes = Counter(child for gate in gates.values() for child in gate.children)
        self.children = list(self._lanes)
        self._telling: set[asyncio.Task[None]] = set()
        self.finished = All(gate.finished for gate in gates.values())
        self.all_left = All(gate.all_left for gate in gates.values())

    async def handle(self, message: Message) -> Message:
        """Answer one request, in its lane.

        Raises:
            RejoinError: that lane's generation is over.
            PeerError: it breaks the protocol; LaneError where its child carries other lanes too.
            LaneError: there is no state from which that lane could go on.
            DivergedError: that lane's values are not finite: it ends, and no other.
        """
        if message.kind == "merge":
            return await self._merging(message).handle(message)
        gate, client = self._gate(message), message.micro_batch[1]
        try:
            with self._parking.busy(client):
                await self._parking.bring_back(client)
                if self._carries_others(message.sender):
                    gate.check(message)
                return await gate.handle(message)
        except DivergedError as error:
            self._over(message, gate, error)
            raise
        except CheckpointError as error:
            raise self._in_lane(message, error) from error
        except PeerError as error:
            if isinstance(error, RejoinError) or not self._carries_others(message.sender):
                raise
            raise self._in_lane(message, error) from error

    def check(self, message: Message) -> None:
        """Look at a request, by what the recipe allows in its lane; that of a child with other lanes only later.

        Raises:
            PeerError: it is not allowed, or the lane is not below its sender.
        """
        if message.kind == "merge":
            self._merging(message).check(message)
            return
        gate = self._gate(message)
        if not self._carries_others(message.sender):
            gate.check(message)

    def away(self, child: str) -> None:
        """The connection of a child is gone."""
        self._each(child, lambda gate: gate.away(child))
        if isinstance(self._hall, Hall):
            self._hall.away(child)

    def back(self, child: str) -> None:
        """A child is connected."""
        self._each(child, lambda gate: gate.back(child))
        if isinstance(self._hall, Hall):
            self._hall.back(child)

    def left(self, child: str) -> None:
        """A child has said goodbye."""
        self._each(child, lambda gate: gate.left(child))

    def missing(self, seconds: float) -> list[str]:
        """Children that have been away for so many seconds, and are waited for without end."""
        return sorted({child for gate in self.gates.values() for child in gate.missing(seconds)})

    def wait_no_more(self, client: int) -> None:
        """The run can end without this lane."""
        gate = self.gates[client]
        gate.finished.set()
        for child in gate.children:
            gate.left(child)

    def ended(self, client: int) -> None:
        """This lane is over before its last step, and nobody waits for it: neither the run, nor its rounds."""
        self.wait_no_more(client)
        if self._hall is not None:
            self._hall.over(client)
        self._tell_of(client)

    def _merging(self, message: Message) -> MergeDoor:
        if self._merges is None or message.sender not in self.children:
            raise PeerError(f"{message.sender} sent merge, where nobody merges")
        return self._merges

    def _gate(self, message: Message) -> Gate:
        gate = self.gates.get(message.micro_batch[1])
        if gate is None or message.sender not in gate.children:
            raise PeerError(f"{message.sender} sent {message.kind} for client {message.micro_batch[1]}, not below it")
        return gate

    def _carries_others(self, child: str) -> bool:
        return self._lanes[child] > 1

    def _in_lane(self, message: Message, error: SplitLLMError) -> LaneError:
        client = message.micro_batch[1]
        logger.warning("a lane cannot go on", extra={"fields": {"client": client, "reason": str(error)}})
        return LaneError(str(error))

    def _over(self, message: Message, gate: Gate, error: DivergedError) -> None:
        """Nobody waits for this lane any more; if its client comes back it may still go on."""
        client = message.micro_batch[1]
        logger.warning("this client has diverged", extra={"fields": {"client": client, "reason": str(error)}})
        gate.end("its values are not finite")
        self.ended(client)
        if message.kind == "diverged" and gate.server.uplink is not None:
            task = asyncio.create_task(_tell_above(gate, client, error))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    def _each(self, child: str, tell: Callable[[Gate], None]) -> None:
        for gate in self.gates.values():
            if child in gate.children:
                tell(gate)


async def _tell_above(gate: Gate, client: int, error: DivergedError) -> None:
    """The role above need not wait for this lane either."""
    assert gate.server.uplink is not None
    what = " ".join(str(error).split())[:LONGEST_WORDS]
    with contextlib.suppress(SplitLLMError):  # the answer is an error
        await gate.server.uplink.request(gate.server.message("diverged", (0, client, 0), {"what": what}))
