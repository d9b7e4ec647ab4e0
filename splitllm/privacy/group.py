"""The side of the server: who is in which phase, and the sum at the end."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Set
from itertools import islice

import numpy as np

from splitllm.errors import PeerError, VoidRoundError
from splitllm.privacy.fixedpoint import Words
from splitllm.privacy.masks import add_mask, subtract_mask
from splitllm.privacy.messages import Delivery, Keys, Masked, Roster, Shares, Survivors, Unmasking, Up
from splitllm.privacy.sealing import PUBLIC_BYTES, agree, public_of
from splitllm.privacy.secagg import Terms, commitment, digest, mask_key, need
from splitllm.privacy.shamir import join

_PHASES: tuple[tuple[type[Up], str], ...] = (
    (Keys, "keys"),
    (Shares, "shares"),
    (Masked, "masked words"),
    (Unmasking, "unmasking"),
)
_UNMASKING = 3


class Group:
    """The members of one round as their server sees them.

    In each phase it takes what the members send, until all have (`missing` is empty) or time is up; then the phase is
    closed by `roster`, `deliveries`, `survivors` and at last `total`. Each of them says what goes down, and raises
    `VoidRoundError`, with who is missing, if fewer than t are left.

    Args:
        terms: of the recipe.
        invited: names of those who may take part.
    """

    def __init__(self, terms: Terms, invited: Collection[str]) -> None:
        if len(invited) > terms.fixed.members:
            raise ValueError(f"{len(invited)} are invited; the terms are for {terms.fixed.members}")
        self.terms = terms
        self._phase = 0
        self._keys: dict[str, Keys] = {}
        self._shares: dict[str, Shares] = {}
        self._masked: set[str] = set()
        self._unmaskings: dict[str, Unmasking] = {}
        self._arrivals: tuple[Collection[str], ...] = (self._keys, self._shares, self._masked, self._unmaskings)
        self._expected = frozenset(invited)
        self._roster = Roster(terms.round, {})
        self._binding = ""
        self._sum: Words = np.zeros(terms.size, terms.fixed.dtype)

    @property
    def missing(self) -> list[str]:
        """Who has not answered in this phase."""
        return sorted(self._expected - self._arrived)

    @property
    def enough(self) -> bool:
        """Whether so many have answered that this phase may be closed."""
        return len(self._arrived) >= self.terms.threshold

    @property
    def members(self) -> list[str]:
        """Who is expected to answer in this phase; from `survivors` on, who is in the sum."""
        return sorted(self._expected)

    def take(self, message: Up) -> None:
        """What one member sends in this phase.

        Raises:
            PeerError: it is of another round, phase or member, was there already, or is not whole. Nothing is changed.
        """
        sender = message.member
        kind, phase = _PHASES[self._phase] if self._phase < len(_PHASES) else (None, "the end")
        if message.round != self.terms.round or type(message) is not kind:
            found = f"{type(message).__name__} of round {message.round}"
            raise PeerError(f"{sender}: {found}; this is {phase} of round {self.terms.round}")
        if sender not in self._expected:
            raise PeerError(f"{sender}: it is not in this phase of round {self.terms.round}; wait for the next round")
        if sender in self._arrived:
            raise PeerError(f"{sender}: its {phase} are there already; send them once")
        self._store(message)

    def roster(self) -> Roster:
        """Close the phase of keys. For every one of `members`: the keys of all.

        Raises:
            VoidRoundError: fewer than t members.
        """
        self._close(0)
        keys = {name: (each.sealing, each.masking) for name, each in sorted(self._keys.items())}
        self._roster = Roster(self.terms.round, keys)
        self._binding = digest(self.terms, self._roster)
        return self._roster

    def deliveries(self) -> dict[str, Delivery]:
        """Close the phase of shares. For each of `members` what the others have sealed for it.

        Raises:
            VoidRoundError: fewer than t members.
        """
        self._close(1)
        shares = self._shares
        return {
            name: Delivery(self.terms.round, {other: shares[other].sealed[name] for other in shares if other != name})
            for name in sorted(shares)
        }

    def survivors(self) -> Survivors:
        """Close the phase of masked words. For each of `members`: who is in the sum.

        Raises:
            VoidRoundError: fewer than t members.
        """
        self._close(2)
        return Survivors(self.terms.round, self.members)

    def total(self) -> Words:
        """Close the round: the sum of the words of `members`, bit for bit.

        Raises:
            VoidRoundError: fewer than t have sent what unmasks it, or one of them something else.
        """
        self._close(_UNMASKING)
        survivors = self._expected
        used = dict(islice(sorted(self._unmaskings.items()), self.terms.threshold))
        for name in survivors:
            subtract_mask(self._sum, self._seed_of(name, used))
        for name in self._shares.keys() - survivors:
            private = self._key_of(name, used)
            for other in survivors:
                key = mask_key(private, self._roster.keys[other][1], (name, other), self._binding)
                (subtract_mask if other < name else add_mask)(self._sum, key)
        return self._sum

    @property
    def _arrived(self) -> frozenset[str]:
        return frozenset(self._arrivals[min(self._phase, _UNMASKING)])

    def _close(self, phase: int) -> None:
        if self._phase != phase:
            raise ValueError(f"this closes phase {phase} of round {self.terms.round}, which is at phase {self._phase}")
        need(self.terms, _PHASES[phase][1], self._arrived, self.missing)
        if phase < _UNMASKING:
            self._expected = self._arrived
        self._phase += 1

    def _store(self, message: Up) -> None:
        """What comes from one of the members, once: if it is whole."""
        match message:
            case Keys():
                known = {key for each in self._keys.values() for key in (each.sealing, each.masking)}
                if {message.sealing, message.masking} & known or message.sealing == message.masking:
                    raise PeerError(f"{message.member}: its public keys are not two of its own; make new ones")
                for key in (message.sealing, message.masking):
                    agree(os.urandom(PUBLIC_BYTES), key, message.member)
                self._keys[message.member] = message
            case Shares():
                self._need_names(message.member, "sealed", message.sealed, self._expected - {message.member})
                self._shares[message.member] = message
            case Masked():
                words, fixed = message.words, self.terms.fixed
                if words.dtype != fixed.dtype or words.shape != (self.terms.size,):
                    found = f"{words.dtype} {list(words.shape)}"
                    raise PeerError(f"{message.member}: words {found}; the terms say {fixed.dtype} [{self.terms.size}]")
                self._sum += words
                self._masked.add(message.member)
            case Unmasking():
                self._need_names(message.member, "seeds", message.seeds, self._expected)
                self._need_names(message.member, "keys", message.keys, self._shares.keys() - self._expected)
                self._unmaskings[message.member] = message

    def _need_names(self, member: str, what: str, found: Mapping[str, bytes], expected: Set[str]) -> None:
        if found.keys() != expected:
            odd = ", ".join(sorted(found.keys() ^ expected)[:3])
            raise PeerError(f"{member}: {what}: not exactly those of round {self.terms.round}; look at {odd}")

    def _seed_of(self, name: str, answers: Mapping[str, Unmasking]) -> bytes:
        """A survivor's seed, which its commitment proves."""
        seed = self._joined(name, {member: answer.seeds[name] for member, answer in answers.items()})
        if commitment(seed, name, self._binding) != self._shares[name].commitment:
            raise self._altered(name, answers)
        return seed

    def _key_of(self, name: str, answers: Mapping[str, Unmasking]) -> bytes:
        """A lost member's masking key, which its public key proves."""
        key = self._joined(name, {member: answer.keys[name] for member, answer in answers.items()})
        if public_of(key) != self._keys[name].masking:
            raise self._altered(name, answers)
        return key

    def _joined(self, name: str, shares: Mapping[str, bytes]) -> bytes:
        points = {member: point for point, member in enumerate(sorted(self._roster.keys), 1)}
        try:
            return join({points[member]: share for member, share in shares.items()})
        except PeerError as error:
            raise self._altered(name, shares) from error

    def _altered(self, name: str, members: Collection[str]) -> VoidRoundError:
        return VoidRoundError(
            f"round {self.terms.round}: the shares of {name} do not fit together: it or one of {', '.join(members)} "
            "has altered them; the round is void: repeat it without who does not keep to the protocol"
        )
