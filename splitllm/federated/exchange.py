"""The edge's side of rounds that another engine runs: it offers what it has trained, and waits for the outcome."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from splitllm.errors import AverageError, PeerError
from splitllm.federated.parcels import LENGTHS, Parcel, lengths, parsed, place
from splitllm.federated.pooling import Rules, unviewed, viewed
from splitllm.federated.rounds import Tensors

LONGEST_REASON = 300


@dataclass(frozen=True)
class _Due:
    """A round that is due: what may be taken, and where its outcome is awaited."""

    step: int
    parcel: Parcel
    outcome: asyncio.Future[Tensors]
    taken: asyncio.Event


class Exchange:
    """A socket on this machine at which an engine of rounds takes values and gives outcomes.

    Who may connect may also take: a Unix socket is its owner's alone, a port is open to every user of the machine.

    Args:
        address: `unix:PATH` or `127.0.0.1:PORT`.
        rules: by which the recipe averages; the same at all edges.
    """

    def __init__(self, address: str, rules: Rules) -> None:
        self.address, self.rules = address, rules
        self._due: _Due | None = None
        self._given = -1
        self._over = False
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Exchange:
        """Listen.

        Raises:
            OSError: the address cannot be listened on.
            PeerError: it is not on this machine.
        """
        where = place(self.address)
        if isinstance(where, tuple):
            self._server = await asyncio.start_server(self._serve, *where)
            return self
        if _is_answered(where):
            raise OSError(errno.EADDRINUSE, "another process listens there")
        with contextlib.suppress(FileNotFoundError):
            Path(where).unlink()  # of a process that was killed
        self._server = await asyncio.start_unix_server(self._serve, sock=_bound(where))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the address."""
        self._server.close()

    async def average(
        self, step: int, weight: float, value: Mapping[str, torch.Tensor], *, last: bool = False
    ) -> Tensors:
        """Offer a value and wait for the outcome of the round.

        A round that was cancelled may be held again, also one whose outcome has come.

        Args:
            step: the steps that are done; more than in the round before. 0 is no round: all edges offer what they
                start from, and get it back, where `rules` look at changes.
            weight: of this edge; 0: it takes the outcome and counts nothing.
            value: as `Rounds.value` names it.
            last: whether this is the last round of the run.

        Returns:
            The outcome, on the CPU, of all that was offered; it is finite and its shapes are not checked.

        Raises:
            AverageError: the engine says that the rounds cannot go on.
        """
        views, bfloat16 = viewed(value)
        about = {"step": step, "weight": weight, "last": last, "rules": self.rules.text(), "bfloat16": bfloat16}
        due = _Due(step, Parcel(about, save(views)), asyncio.get_running_loop().create_future(), asyncio.Event())
        self._due, self._given = due, min(self._given, step - 1)
        self._wake()
        try:
            return await due.outcome
        finally:
            if self._due is due:
                self._due = None

    @property
    def is_taken(self) -> bool:
        """Whether an engine has what was offered for the round that is due."""
        return self._due is not None and self._due.taken.is_set()

    def finish(self) -> None:
        """Say that there will be no more rounds, where the last was not offered as such; who asks is told so."""
        self._over = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            question = await _read(reader)
            try:
                answer = await self._answer(question)
            except PeerError as error:
                answer = Parcel({"error": str(error)})
            writer.write(answer.packed())
            await writer.drain()
        except (OSError, EOFError, PeerError):
            pass  # who has gone, or speaks something else, is owed nothing
        finally:
            writer.close()

    async def _answer(self, question: Parcel) -> Parcel:
        match question.values.get("call"):
            case "take":
                return await self._take()
            case "give":
                await self._give(question.values.get("step"), question)
                return Parcel({})
            case "end":
                self._fail(str(question.values.get("why"))[:LONGEST_REASON])
                return Parcel({})
            case other:
                raise PeerError(f"call {other!r} is unknown; the calls are take, give and end")

    async def _take(self) -> Parcel:
        while not self._over and self._due is None:
            await self._changed.wait()
        if self._due is None:
            return Parcel({"over": True})
        self._due.taken.set()
        return self._due.parcel

    async def _give(self, step: object, parcel: Parcel) -> None:
        if not isinstance(step, int):
            raise PeerError(f"step is {step!r}; expected a number")
        outcome = _checked(parcel)
        while step > self._given and (self._due is None or self._due.step == 0 < step):
            if self._due is not None:
                self._settle(_checked(self._due.parcel))  # the engine is further, and knows the start: it was the same
            else:
                await self._changed.wait()  # a round that was cancelled will be held again
        if step <= self._given:
            return  # it has this outcome already
        assert self._due is not None
        if step != self._due.step:
            raise PeerError(f"an outcome of step {step}, and the round of step {self._due.step} is due")
        self._settle(outcome)

    def _fail(self, why: str) -> None:
        due, self._due = self._due, None
        if due is not None and not due.outcome.done():
            due.outcome.set_exception(AverageError(f"the rounds at {self.address} cannot go on: {why}"))

    def _settle(self, outcome: Tensors) -> None:
        assert self._due is not None
        due = self._due
        self._due, self._given = None, due.step
        if not due.outcome.done():
            due.outcome.set_result(outcome)


def _bound(where: str) -> socket.socket:
    """A socket at a path, which its owner alone may open from its first moment on.

    Raises:
        OSError: there is no such folder, or no right to write there.
    """
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # of the whole process: nothing else may run until it is set back
    try:
        found.bind(where)
    except BaseException:
        found.close()
        raise
    finally:
        os.umask(mask)
    return found


def _is_answered(path: str) -> bool:
    """Whether somebody listens at a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


async def _read(reader: asyncio.StreamReader) -> Parcel:
    text, tensors = lengths(await reader.readexactly(LENGTHS.size))
    return parsed(await reader.readexactly(text), await reader.readexactly(tensors))


def _checked(parcel: Parcel) -> Tensors:
    """An outcome that can be read, of finite numbers."""
    try:
        outcome = unviewed(load(parcel.tensors), parcel.values.get("bfloat16", []))
    except SafetensorError as error:
        raise PeerError(f"the outcome cannot be read ({error}); expected safetensors") from error
    for name, tensor in outcome.items():
        if not (tensor.is_floating_point() and bool(torch.isfinite(tensor).all())):
            raise PeerError(f"the outcome has nothing of use as {name}; see which edge diverged")
    return outcome
