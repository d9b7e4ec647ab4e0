"""A sum of which the server sees nothing but the sum: the protocol, and what is agreed on before.

Secure aggregation by Bonawitz et al. (CCS 2017, doi 10.1145/3133956.3133982), within a group of members and their
server. A member sends its words plus a mask of its own, plus for each other member a mask that only the two know: the
first of the two by name adds it, the other subtracts it, so those cancel in the sum. The mask of its own, and those in
common with members that are lost, come off with shares that the members hold of one another; t of them are needed.

| phase | up | down |
|---|---|---|
| keys | `Keys`: two public keys, fresh for this round | `Roster`: those of all |
| shares | `Shares`: for each other, sealed, shares of the own mask's seed and of the masking key | `Delivery` |
| masked | `Masked`: words plus masks | `Survivors`: who is in the sum |
| unmasking | `Unmasking`: shares of the survivors' seeds and of the others' keys | |

**Exact.** Modulo 2^word_bits the sum is that of the words, bit for bit. Who does not answer in a phase is out. Fewer
than t, in any phase, end the round without an outcome (`VoidRoundError`); it can be repeated under another name, with
new keys. A seed or key that was put together from shares is compared with the commitment or the public key that its
owner sent before, so altered shares end the round too, and never give a wrong sum.

**Hidden**, from the server and up to t - 1 members that tell it all: everything but the sum of at least t members'
words, even of a member that is lost after it sent them. (What remains of a sum without the words of those that tell is
known to them, of course.) Not hidden: who takes part, and what two sums of the same words tell that differ by one
member. So whoever has answered the last phase sends those words in no further round: the server may have their sum.

**A server that lies** reads and alters no shares: they are sealed between members and bound to sender, receiver, terms
and the keys of all, so one that shows different keys to different members gets nowhere. But it could tell some members
that X is in the sum and others that it is not, and so gather both kinds of shares of X. There is no further phase in
which members sign whom they were told; instead t is more than half of the group, so that honest members alone never
give both. With m members on the server's side that takes 2 t > n + m. Nor does anything here say who a public key
belongs to: a server that invents t - 1 members can read what is left. Members trust it that far.

**A member that lies** can end a round, or send any words as its own: bounds on what it adds cannot be checked behind a
mask. It cannot read others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from splitllm.errors import PrivacyError, VoidRoundError
from splitllm.privacy.fixedpoint import FixedPoint
from splitllm.privacy.messages import Roster
from splitllm.privacy.sealing import agree, commit, derive


@dataclass(frozen=True)
class Terms:
    """What server and members have agreed on before, each from its own recipe; whoever differs is left out.

    Attributes:
        round: its name, which is never used again: run, group, number and attempt.
        size: values of each member's vector.
        threshold: t, how many have to be left; more than half of `fixed.members`, the most that there are.
        fixed: how values are words.

    Raises:
        PrivacyError: this threshold would not hide a member, or could not be met.
    """

    round: str
    size: int
    threshold: int
    fixed: FixedPoint

    def __post_init__(self) -> None:
        members = self.fixed.members
        if self.size < 1:
            raise PrivacyError(f"size: {self.size} values cannot be summed; send at least 1")
        if self.threshold > members:
            raise PrivacyError(f"threshold: {self.threshold} of {members} members cannot be; use at most {members}")
        if self.threshold < 2 or 2 * self.threshold <= members:
            least = max(2, members // 2 + 1)
            raise PrivacyError(
                f"threshold: with {self.threshold} of {members} members a server could take off the masks of one; "
                f"use at least {least}" + (", of at least 2 members" if members < 2 else "")
            )


def digest(terms: Terms, roster: Roster) -> str:
    """What terms and keys of all are bound to: it differs if anything of them does."""
    fixed = [terms.fixed.clip.hex(), terms.fixed.fraction_bits, terms.fixed.members, terms.fixed.word_bits]
    keys = [[name, *(key.hex() for key in roster.keys[name])] for name in sorted(roster.keys)]
    text = json.dumps([terms.round, terms.size, terms.threshold, fixed, keys])
    return hashlib.sha256(text.encode()).hexdigest()


def mask_key(private: bytes, public: bytes, pair: tuple[str, str], binding: str) -> bytes:
    """The key of the mask that two members have in common.

    Args:
        private: masking key of the one.
        public: masking key of the other.
        pair: their names, the other's last.
        binding: the digest of terms and keys.

    Raises:
        PeerError: with this public key there is no secret.
    """
    return derive(agree(private, public, pair[1]), "mask", binding, *sorted(pair))


def commitment(seed: bytes, member: str, binding: str) -> bytes:
    """What fixes the seed of a member's own mask."""
    return commit(seed, binding, member)


def need(terms: Terms, phase: str, here: Collection[str], missing: Iterable[str]) -> None:
    """At least t have to be left.

    Raises:
        VoidRoundError: they are not.
    """
    if len(here) >= terms.threshold:
        return
    who = ", ".join(sorted(missing)) or "nobody who was asked"
    raise VoidRoundError(
        f"round {terms.round}: {phase}: {len(here)} members are left and {terms.threshold} are needed; missing: {who}; "
        "the round is void: repeat it, with more members or a longer deadline"
    )
