"""The side of one member: for one round, each phase once, and nothing that would show its words."""

from __future__ import annotations

import os

import numpy as np

from splitllm.errors import PeerError, PrivacyError
from splitllm.privacy.fixedpoint import Words
from splitllm.privacy.masks import KEY_BYTES, add_mask, subtract_mask
from splitllm.privacy.messages import Delivery, Keys, Masked, Roster, Shares, Survivors, Unmasking
from splitllm.privacy.sealing import agree, derive, public_of, seal, unseal
from splitllm.privacy.secagg import Terms, commitment, digest, mask_key
from splitllm.privacy.shamir import SHARE_BYTES, split

_PHASES = ("keys", "shares", "masked", "unmasking", "the end")


class Member:
    """One member in one round: `keys`, `shares`, `masked`, `unmasking`, in this order and each once.

    Whoever refuses has left the round: a phase that failed is not tried again. All its secrets are of this round.

    Args:
        name: its own, as the others know it.
        terms: of its own recipe.
    """

    def __init__(self, name: str, terms: Terms) -> None:
        self.name = name
        self.terms = terms
        self._phase = _PHASES[0]
        self._sealing, self._masking, self._seed = (os.urandom(KEY_BYTES) for _ in range(3))
        self._roster = Roster(terms.round, {})
        self._binding = ""
        self._own = b""
        self._held: dict[str, bytes] = {}

    def keys(self) -> Keys:
        """Its public keys, which nobody has seen before."""
        self._enter("keys", self.terms.round)
        self._leave("keys")
        return Keys(self.terms.round, self.name, public_of(self._sealing), public_of(self._masking))

    def shares(self, roster: Roster) -> Shares:
        """Shares of its secrets, sealed for each of the others.

        Raises:
            PeerError: the roster is of another round, too short or too long, changes its own keys, or has a key twice.
        """
        self._enter("shares", roster.round)
        self._check(roster)
        self._roster, self._binding = roster, digest(self.terms, roster)
        names = sorted(roster.keys)
        seeds, keys = (split(secret, self.terms.threshold, len(names)) for secret in (self._seed, self._masking))
        both = {name: seed + key for name, seed, key in zip(names, seeds, keys, strict=True)}
        self._own = both.pop(self.name)
        sealed = {
            name: seal(self._key(name, self.name, name), text, self._binding, self.name, name)
            for name, text in both.items()
        }
        self._leave("shares")
        return Shares(self.terms.round, self.name, commitment(self._seed, self.name, self._binding), sealed)

    def masked(self, delivery: Delivery, words: Words) -> Masked:
        """Its words behind its masks.

        Args:
            delivery: what the others have sealed for it.
            words: uint32 or uint64 [terms.size], by `terms.fixed.encode`; they are left as they are.

        Raises:
            PeerError: the shares are of fewer than t members, of strangers, or were changed on the way.
            PrivacyError: these are not words of the terms.
        """
        self._enter("masked", delivery.round)
        self._check_words(words)
        self._held = {name: self._opened(name, sealed) for name, sealed in delivery.sealed.items()}
        if len(self._held) + 1 < self.terms.threshold:
            raise PeerError(
                f"delivery: shares of {len(self._held)} others are too few; {self.terms.threshold} members are needed"
            )
        total = words.copy()
        add_mask(total, self._seed)
        for other in self._held:
            key = mask_key(self._masking, self._roster.keys[other][1], (self.name, other), self._binding)
            (add_mask if self.name < other else subtract_mask)(total, key)
        self._leave("masked")
        return Masked(self.terms.round, self.name, total)

    def unmasking(self, survivors: Survivors) -> Unmasking:
        """Of every survivor the share of its seed, of every other the share of its masking key; never both of one.

        Raises:
            PeerError: the survivors are fewer than t, strangers, named twice, or it is not one of them itself.
        """
        self._enter("unmasking", survivors.round)
        alive = set(survivors.members)
        strangers = alive - self._held.keys() - {self.name}
        if len(alive) != len(survivors.members):
            raise PeerError("survivors: a member is named twice; name each once")
        if strangers:
            raise PeerError(f"survivors: {min(strangers)} has sent {self.name} no shares; leave it out")
        if self.name not in alive or len(alive) < self.terms.threshold:
            raise PeerError(
                f"survivors: {', '.join(sorted(alive)) or 'nobody'}; the masks of {self.name} come off only in a sum "
                f"with it in, of at least {self.terms.threshold} members"
            )
        held = {**self._held, self.name: self._own}
        seeds = {name: both[:SHARE_BYTES] for name, both in held.items() if name in alive}
        keys = {name: both[SHARE_BYTES:] for name, both in held.items() if name not in alive}
        self._sealing = self._masking = self._seed = self._own = b""
        self._held = {}
        self._leave("unmasking")
        return Unmasking(self.terms.round, self.name, seeds, keys)

    def _enter(self, phase: str, round_: str) -> None:
        """What fails from here on ends the round for this member; `_leave` goes on with the next phase."""
        if phase != self._phase:
            raise PeerError(f"round {self.terms.round}: {self.name} is asked for {phase}, and is at {self._phase}")
        self._phase = _PHASES[-1]
        if round_ != self.terms.round:
            raise PeerError(f"round {round_}: {self.name} has made its keys for round {self.terms.round}, and no other")

    def _leave(self, phase: str) -> None:
        self._phase = _PHASES[_PHASES.index(phase) + 1]

    def _check(self, roster: Roster) -> None:
        own = (public_of(self._sealing), public_of(self._masking))
        if roster.keys.get(self.name) != own:
            raise PeerError(f"roster: the keys of {self.name} are not those that it sent; send them unchanged")
        if not self.terms.threshold <= len(roster.keys) <= self.terms.fixed.members:
            agreed = f"{self.terms.threshold} to {self.terms.fixed.members}"
            raise PeerError(f"roster: {len(roster.keys)} members; {agreed} are agreed")
        if len({key for pair in roster.keys.values() for key in pair}) != 2 * len(roster.keys):
            raise PeerError("roster: a public key is there twice; each member has two of its own")

    def _check_words(self, words: Words) -> None:
        fixed = self.terms.fixed
        if words.dtype != fixed.dtype or words.shape != (self.terms.size,):
            raise PrivacyError(
                f"words: {words.dtype} {list(words.shape)}; the terms say {fixed.dtype} [{self.terms.size}]"
            )
        if np.abs(fixed.integers(words)).max() > fixed.limit:
            raise PrivacyError(
                f"words: beyond the limit of {fixed.limit}, so the sum could wrap; use FixedPoint.encode"
            )

    def _opened(self, sender: str, sealed: bytes) -> bytes:
        if sender == self.name or sender not in self._roster.keys:
            raise PeerError(f"delivery: {sender} is not one of the others of the roster; leave it out")
        text = unseal(self._key(sender, sender, self.name), sealed, self._binding, sender, self.name)
        if text is None or len(text) != 2 * SHARE_BYTES:
            raise PeerError(
                f"delivery: what {sender} sealed for {self.name} was changed, or is for other terms or keys"
            )
        return text

    def _key(self, other: str, sender: str, receiver: str) -> bytes:
        """For what one of the two seals for the other."""
        secret = agree(self._sealing, self._roster.keys[other][0], other)
        return derive(secret, "shares", self._binding, sender, receiver)
