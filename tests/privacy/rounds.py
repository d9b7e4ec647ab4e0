"""Whole rounds of secure aggregation in one process, with members that are lost where a test says so."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import numpy as np

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

NAMES = ["client-0", "client-1", "client-10", "client-2", "client-3", "client-4"]
PHASES = ("keys", "shares", "masked", "unmasking")
Lost = Mapping[str, str]
"""Member -> the phase in which it does not answer any more."""
T = TypeVar("T", Keys, Roster, Shares, Delivery, Masked, Survivors, Unmasking)


def terms(
    members: int = 5, threshold: int = 3, size: int = 8, word_bits: int = 32, name: str = "run/edge-0/7"
) -> Terms:
    return Terms(name, size, threshold, FixedPoint.finest(1.0, members, word_bits))


def travelled(message: T) -> T:
    """The message after its header was JSON text."""
    header: dict[str, Any] = json.loads(json.dumps(to_header(message)))
    words = message.words.copy() if isinstance(message, Masked) else None
    return from_header(type(message), header, words)


class Played:
    """A round: who is lost when, and every message of it."""

    def __init__(self, agreed: Terms, words: Mapping[str, Words], lost: Lost | None = None) -> None:
        self.words, self.lost = words, lost or {}
        self.group = Group(agreed, list(words))
        self.members = {name: Member(name, agreed) for name in words}
        self.sent: list[Keys | Shares | Masked | Unmasking] = []

    def send(self, message: Keys | Shares | Masked | Unmasking) -> None:
        self.sent.append(message)
        self.group.take(travelled(message))

    def until_masked(self) -> Survivors:
        for name in self.alive("keys"):
            self.send(self.members[name].keys())
        roster = travelled(self.group.roster())
        for name in self.alive("shares"):
            self.send(self.members[name].shares(roster))
        deliveries = self.group.deliveries()
        for name in self.alive("masked"):
            self.send(self.members[name].masked(travelled(deliveries[name]), self.words[name]))
        return travelled(self.group.survivors())

    def total(self) -> Words:
        """The sum.

        Raises:
            VoidRoundError: too many were lost.
        """
        survivors = self.until_masked()
        for name in self.alive("unmasking"):
            self.send(self.members[name].unmasking(survivors))
        return self.group.total()

    def alive(self, phase: str) -> list[str]:
        """Those of this phase that answer in it."""
        return [
            name
            for name in self.group.members
            if name not in self.lost or PHASES.index(self.lost[name]) > PHASES.index(phase)
        ]


def drawn_words(agreed: Terms, members: int, seed: int = 0) -> dict[str, Words]:
    """Random words of so many members, the limits among them."""
    generator = np.random.default_rng(seed)
    values = generator.uniform(-1.2, 1.2, (members, agreed.size))
    values[:, 0], values[:, -1] = 1, -1
    return {name: agreed.fixed.encode(row) for name, row in zip(NAMES[:members], values, strict=True)}


def plain_sum(words: Mapping[str, Words], members: Collection[str], agreed: Terms) -> list[int]:
    """What the sum has to be, by Python's own integers."""
    bits = agreed.fixed.word_bits
    return [sum(int(words[name][at]) for name in members) % (1 << bits) for at in range(agreed.size)]
