"""Rounds of servers that wait for nobody: what they bring is buffered, and the adapter is stepped when that is enough.

FedBuff (Nguyen et al., 2022), by `policy/staleness.py`. Members bring what they have changed since they last heard; the
answer is the adapter as it is then. Only at the end of the run all are waited for, so that it ends with one adapter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from splitllm.errors import AverageError, DivergedError
from splitllm.federated.rounds import Tensors, Update
from splitllm.policy import staleness as policy
from splitllm.policy.staleness import Buffered
from splitllm.roles.book import Arrival, Keep, Verdict, still_there
from splitllm.roles.device import Device
from splitllm.roles.outcomes import Outcome
from splitllm.roles.rounds import Rounds

logger = logging.getLogger(__name__)
DELTA = "delta/"


class BufferedHall:
    """Of the top.

    Args:
        rounds: its part in rounds, which averages. The recipe has a `rounds.buffer.size`: updates that are a step; with
            fewer members as many as there are.
        members: name -> the clients below it.
        keep: where it is kept; what is there is taken over.
        device: where averages are computed.
        observe: told of every step.
    """

    def __init__(
        self,
        rounds: Rounds,
        members: Mapping[str, Sequence[int]],
        keep: Keep,
        device: Device,
        observe: Callable[[int, list[dict[str, Any]]], None],
    ) -> None:
        self.rounds, self._members, self._keep, self._device = rounds, dict(members), keep, device
        self._observe, self._rule = observe, rounds.recipe.rounds.buffer
        self._over, self._tasks = set[int](), set[asyncio.Task[None]]()
        self._buffer, self._ended = self._empty(), set[str]()
        self._deltas: dict[tuple[str, int], Tensors] = {}
        self._one_at_a_time, self._changed = asyncio.Lock(), asyncio.Condition()
        if (found := keep.read()) is not None:
            self._load(*found)

    def _empty(self) -> Buffered:
        assert self._rule.size is not None, "without a size all are waited for"
        return Buffered(min(self._rule.size, len(self._members)), self._rule.oldest)

    async def bring(self, arrival: Arrival) -> Verdict:
        """Take a difference, and answer with the adapter as it is; at the end of the run when all have come to it.

        Raises:
            DivergedError: nothing in the buffer is finite.
        """
        last = arrival.steps == self.rounds.recipe.train.steps
        try:
            async with self._one_at_a_time:
                await self._take(arrival, last=last)
        finally:
            await self._tell()
        async with self._changed:
            await self._changed.wait_for(lambda: not last or self._all_ended())
        async with self._one_at_a_time:  # no step is half made, or not yet on disk
            assert self.rounds.averager is not None
            value = self.rounds.averager.given()
            return Verdict({name: value[name] for name in arrival.value}, [], self._buffer.version)

    def over(self, client: int) -> None:
        """Nothing more will come of a client, nor of a member that has no other."""
        self._over.add(client)
        task = asyncio.create_task(self._without_it())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _without_it(self) -> None:
        async with self._one_at_a_time:
            if self._all_ended() and self._buffer.inside:
                try:
                    await self._step(self.rounds.recipe.train.steps)
                except DivergedError as error:
                    logger.warning("%s", error)
                await self._write()
        await self._tell()

    async def _tell(self) -> None:
        """Those who wait for the end may look whether it has come."""
        async with self._changed:
            self._changed.notify_all()

    def _all_ended(self) -> bool:
        return self._ended.issuperset(still_there(self._members, self._over))

    async def _take(self, arrival: Arrival, *, last: bool) -> None:
        if arrival.weight:
            number, before = arrival.steps, self._buffer
            self._buffer, told = policy.contribute(before, arrival.name, number, arrival.version, arrival.weight)
            if told.kind == "counted":
                self._deltas[arrival.name, number] = arrival.value
            if told.line:
                logger.info("%s", told.line)
        self._ended |= {arrival.name} if last else set()
        if policy.full(self._buffer) or (self._buffer.inside and self._all_ended()):
            await self._step(arrival.steps)
        await self._write()

    async def _step(self, steps: int) -> None:
        inside = self._buffer.inside
        self._buffer, step = policy.step(self._buffer, self._rule.discount)
        deltas = [self._deltas.pop((one.child, one.number)) for one in inside]
        updates = list(zip([one.child for one in inside], step.shares, deltas, strict=True))
        made = await self._device.run(lambda: self._stepped(updates, step.scale))
        self._observe(steps, [self.rounds.report(made)])

    def _stepped(self, updates: Sequence[tuple[str, float, Tensors]], scale: float) -> Outcome:
        """Given + scale x the mean of the differences; who is not finite or changes too much is left out."""
        averager = self.rounds.averager
        assert averager is not None
        given = averager.given()
        whole = [Update(n, share, {k: given[k].to(d) + d for k, d in delta.items()}) for n, share, delta in updates]
        try:
            combined, rejected = averager.combine(whole)
        except AverageError as error:
            raise DivergedError(str(error)) from error
        value = {k: given[k].to(t) + scale * (t - given[k].to(t)) for k, t in combined.value.items()}
        averager.handed_out(self.rounds.settled(value))
        return Outcome(combined, rejected, len(updates) - len(rejected))

    # What is kept.

    async def _write(self) -> None:
        assert self.rounds.averager is not None
        tensors = dict(self.rounds.averager.state())
        for (child, number), delta in self._deltas.items():
            tensors |= {f"{DELTA}{child}/{number}/{name}": tensor for name, tensor in delta.items()}
        values = {"buffer": policy.to_json(self._buffer), "ended": sorted(self._ended)}
        held = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        await asyncio.to_thread(self._keep.write, held, values)

    def _load(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        assert self.rounds.averager is not None
        self.rounds.averager.load({n: tensor for n, tensor in tensors.items() if not n.startswith(DELTA)})
        self._buffer, self._ended = policy.from_json(values["buffer"]), set(values["ended"])
        for key, tensor in tensors.items():
            if key.startswith(DELTA):
                child, number, name = key.removeprefix(DELTA).split("/", 2)
                self._deltas.setdefault((child, int(number)), {})[name] = tensor
