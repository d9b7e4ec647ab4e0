"""Rounds in which a server sees no client's adapter: sums of masked words, and noise on them.

Both are of the average right above clients; further up averages travel as in any round. Words are integers, so a sum
is exact, with masks and without (`privacy/secagg.py`, `privacy/dp.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from splitllm.errors import PeerError
from splitllm.federated.averager import is_finite
from splitllm.model.trainable import Tensors
from splitllm.privacy.dp import add_noise, clip_update, epsilon
from splitllm.privacy.fixedpoint import FixedPoint, Words
from splitllm.privacy.group import Group
from splitllm.privacy.member import Member
from splitllm.privacy.messages import (
    Delivery,
    Keys,
    Masked,
    Roster,
    Shares,
    Survivors,
    Unmasking,
    from_header,
    to_header,
)
from splitllm.privacy.secagg import Terms
from splitllm.privacy.vectors import flatten, unflatten
from splitllm.wire.message import Kind, Message

logger = logging.getLogger(__name__)
WORDS, _SLACK = "words", 1e-9
_KINDS: dict[str, type[Any]] = {"keys": Keys, "shares": Shares, "masked": Masked}
PHASES = tuple(_KINDS)
Ask = Callable[[Kind, Mapping[str, Any], Mapping[str, torch.Tensor]], Awaitable[Message]]
"""Sends a message of a kind, with header and tensors."""


@dataclass(frozen=True)
class Hiding:
    """What members of a group and their server have agreed on, each from its own recipe.

    Attributes:
        run: a digest of the recipe.
        server: name of the one right above.
        fixed: how values are words.
        threshold: how many members have to be left; None: nothing is masked.
        clip: the largest norm of a client's change; None: adapters themselves are summed, not changes.
        noise: deviation of the noise as a multiple of what one client can add.
        delta: of (epsilon, delta)-privacy.
        expected: clients that a mean of changes is over, whoever comes.
    """

    run: str
    server: str
    fixed: FixedPoint
    threshold: int | None
    clip: float | None
    noise: float
    delta: float
    expected: float

    def terms(self, steps: int, generation: int, size: int) -> Terms:
        """Of one round; one that is held again, after a recovery, has another name."""
        assert self.threshold is not None
        return Terms(f"{self.run}/{self.server}/{steps}/{generation}", size, self.threshold, self.fixed)

    def words_of(self, value: Tensors, anchor: Tensors, name: str) -> Words:
        """What a client adds to the sum; one whose values are not finite adds what it had after the last round.

        Args:
            value: `adapter/NAME` of what it trains.
            anchor: the same after the last round.
            name: of the client.
        """
        before = {key: anchor[key] for key in value}
        if not is_finite(value):
            logger.warning("not finite: adds no change to this round", extra={"fields": {"client": name}})
            value = before
        if self.clip is None:
            return self.fixed.encode(flatten(value))
        change = {key: tensor.double() - before[key].double() for key, tensor in value.items()}
        return self.fixed.encode(flatten(clip_update(change, self.clip)[0]))

    def mean(self, words: Words, members: int, given: Tensors) -> Tensors:
        """The average that a sum stands for, noise added where it has to be.

        Args:
            words: the sum of what `members` clients added.
            members: how many.
            given: what all had after the last round, of the tensors that were summed.
        """
        total = self.fixed.integers(words)
        if self.clip is not None:
            total = add_noise(total, self.noise, self.clip, self.fixed)
        count = members if self.clip is None else self.expected
        mean = unflatten(self.fixed.decode(total) / count, {key: tuple(t.shape) for key, t in given.items()})
        if self.clip is not None:
            mean = {key: given[key].double().cpu() + change for key, change in mean.items()}
        return {key: tensor.to(given[key].device, given[key].dtype) for key, tensor in mean.items()}

    def fault(self, words: Words) -> str | None:
        """Why what one client adds, seen as it is, is no change that was clipped; None: it may be one."""
        assert self.clip is not None
        norm = float(np.linalg.norm(self.fixed.decode(self.fixed.integers(words))))
        if norm <= (self.clip + self.fixed.rounding_norm(words.size)) * (1 + _SLACK):
            return None
        return f"a change of norm {norm:.3g}, where rounds.privacy.clip is {self.clip:g}"

    def spent(self, rounds: int) -> float | None:
        """The epsilon of so many rounds; None without noise, which promises nothing.

        As if every client took part in each: an empty draw is drawn again, which accounts of sampling leave out.
        """
        if self.clip is None or self.noise == 0:
            return None
        found = epsilon(self.noise, 1.0, rounds, self.delta)
        return found if math.isfinite(found) else None


async def hidden_round(terms: Terms | None, ask: Ask, name: str, words: Words, examples: Any) -> Message:
    """A client's side of a round.

    Args:
        terms: of the round, where words are masked.
        ask: sends to the server.
        name: of the client.
        words: that it adds.
        examples: what the message of the round says of it.

    Returns:
        The answer to `round`.

    Raises:
        PeerError: the server breaks the protocol.
    """
    if terms is None:
        return await ask("round", {"examples": examples}, {WORDS: _tensor(words)})
    member = Member(name, terms)
    roster = from_header(Roster, _said(await ask("secure", _phase("keys", member.keys()), {})))
    delivery = from_header(Delivery, _said(await ask("secure", _phase("shares", member.shares(roster)), {})))
    masked = member.masked(delivery, words)
    reply = await ask("secure", _phase("masked", masked), {WORDS: _tensor(masked.words)})
    unmasking = member.unmasking(from_header(Survivors, _said(reply)))
    return await ask("round", {"examples": examples, "said": to_header(unmasking)}, {})


class Masking:
    """The server's side of one round of masked words.

    Args:
        terms: of the round.
        invited: names of those who take part.
    """

    def __init__(self, terms: Terms, invited: Sequence[str]) -> None:
        self._group, self._dtype = Group(terms, invited), terms.fixed.dtype

    def take(self, message: Message) -> None:
        """What one member sends in a phase, or in the end of its masks.

        Raises:
            PeerError: it breaks the protocol. Nothing is changed.
        """
        kind: type[Any] | None = Unmasking if message.kind == "round" else _KINDS.get(message.header.get("phase", ""))
        if kind is None or (kind is Masked) != (WORDS in message.tensors):
            raise PeerError(f"{message.sender} sent {message.kind} with words in another phase than theirs, or of none")
        words = words_in(message, self._dtype) if kind is Masked else None
        try:
            said = from_header(kind, _said(message), words)
        except PeerError as error:
            raise PeerError(f"{message.sender} sent {message.kind}: {error}") from error
        if said.member != message.sender:
            raise PeerError(f"{message.sender} sent {kind.__name__} of {str(said.member)[:80]}")
        self._group.take(said)

    def told(self, phase: str) -> dict[str, dict[str, Any]]:
        """A phase is over, since all who take part have sent theirs: what each is told, as it travels.

        Raises:
            VoidRoundError: too few are left.
        """
        if phase == "shares":
            return {name: to_header(delivery) for name, delivery in self._group.deliveries().items()}
        said = to_header(self._group.roster() if phase == "keys" else self._group.survivors())
        return dict.fromkeys(self._group.members, said)

    def total(self) -> Words:
        """The sum, when all have said what is due of the masks.

        Raises:
            VoidRoundError: too few are left.
        """
        return self._group.total()


def words_in(message: Message, dtype: np.dtype[np.unsignedinteger]) -> Words:
    """What a client adds, as it travelled."""
    return message.tensors[WORDS].cpu().numpy().view(dtype)


def summed(messages: Sequence[Message], hiding: Hiding, size: int) -> tuple[Words, dict[str, str]]:
    """The sum of words that are not masked, and who was left out of it -> why."""
    total, rejected = np.zeros(size, hiding.fixed.dtype), dict[str, str]()
    for message in messages:
        words = words_in(message, hiding.fixed.dtype)
        fault = hiding.fault(words)
        if fault is None:
            total += words
        else:
            rejected[message.sender] = fault
    return total, rejected


def _tensor(words: Words) -> torch.Tensor:
    """Words as they travel: signed, since tensors are."""
    return torch.from_numpy(words.view(np.dtype(f"int{8 * words.dtype.itemsize}")).copy())


def _phase(name: str, said: Any) -> dict[str, Any]:
    return {"phase": name, "said": to_header(said)}


def _said(message: Message) -> Mapping[str, Any]:
    said = message.header.get("said")
    if not isinstance(said, dict):
        raise PeerError(f"{message.sender} sent {message.kind} without what is due of masks")
    return said
