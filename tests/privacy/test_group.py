"""The server takes what belongs to the phase, from those that are in it, once; and never gives a wrong sum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from splitllm.errors import PeerError, VoidRoundError
from splitllm.privacy.group import Group
from splitllm.privacy.member import Member
from splitllm.privacy.messages import Keys, Masked, Unmasking
from tests.privacy.rounds import NAMES, Played, drawn_words, plain_sum, terms

AGREED = terms(5, 3)
FIVE = NAMES[:5]
WORDS = drawn_words(AGREED, 5)


def altered(data: bytes) -> bytes:
    return bytes([*data[:-1], data[-1] ^ 1])


def answers(lost: dict[str, str] | None = None) -> tuple[Played, dict[str, Unmasking]]:
    """A round in which all that is left is to take what unmasks the sum."""
    played = Played(AGREED, WORDS, lost)
    survivors = played.until_masked()
    return played, {name: played.members[name].unmasking(survivors) for name in survivors.members}


def test_a_phase_is_closed_with_whom_is_there() -> None:
    group = Group(AGREED, FIVE)
    keys = {name: Member(name, AGREED).keys() for name in FIVE}
    for many, name in enumerate(FIVE[:4], 1):
        group.take(keys[name])
        assert group.missing == FIVE[many:] and group.enough == (many >= 3)
    assert list(group.roster().keys) == FIVE[:4] == group.members == group.missing
    assert not group.enough
    with pytest.raises(PeerError, match="client-3: Keys of round run/edge-0/7; this is shares"):
        group.take(keys[FIVE[4]])


def test_strangers_other_rounds_and_repetitions_change_nothing() -> None:
    group = Group(AGREED, FIVE)
    keys = Member(FIVE[0], AGREED).keys()
    group.take(keys)
    for message, what in (
        (keys, "client-0: its keys are there already"),
        (Member(FIVE[0], AGREED).keys(), "are there already"),
        (Member("client-9", AGREED).keys(), "client-9: it is not in this phase"),
        (replace(Member(FIVE[1], AGREED).keys(), round="another"), "Keys of round another"),
        (Unmasking(AGREED.round, FIVE[1], {}, {}), "Unmasking of round"),
        (replace(keys, member=FIVE[1]), "client-1: its public keys are not two of its own"),
        (Keys(AGREED.round, FIVE[1], b"7" * 32, b"7" * 32), "not two of its own"),
        (Keys(AGREED.round, FIVE[1], b"7" * 32, bytes(32)), "not a sound X25519 key"),
    ):
        with pytest.raises(PeerError, match=what):
            group.take(message)
        assert group.missing == FIVE[1:]


def test_who_was_lost_in_a_phase_does_not_come_back_in_the_next() -> None:
    played = Played(AGREED, WORDS, {"client-1": "masked"})
    late = played.members["client-1"]
    played.until_masked()
    with pytest.raises(PeerError, match="client-1: Masked of round"):
        played.group.take(Masked(AGREED.round, "client-1", WORDS["client-1"]))
    with pytest.raises(PeerError, match="client-1: it is not in this phase"):
        played.group.take(Unmasking(AGREED.round, late.name, {}, {}))


def test_shares_for_somebody_else_or_not_for_all_are_refused() -> None:
    members = {name: Member(name, AGREED) for name in FIVE}
    group = Group(AGREED, FIVE)
    for member in members.values():
        group.take(member.keys())
    shares = members[FIVE[0]].shares(group.roster())
    one = next(iter(shares.sealed.values()))
    for sealed in (
        {name: shares.sealed[name] for name in FIVE[2:]},
        {**shares.sealed, "client-9": one},
        {**shares.sealed, FIVE[0]: one},
    ):
        with pytest.raises(PeerError, match="client-0: sealed: not exactly those of round"):
            group.take(replace(shares, sealed=sealed))
    group.take(shares)


@pytest.mark.parametrize("words", [np.zeros(7, np.uint32), np.zeros(8, np.int32), np.zeros((8, 1), np.uint32)])
def test_words_of_another_size_or_type_are_refused_and_the_right_ones_still_count(words: np.ndarray) -> None:
    group, members = Group(AGREED, FIVE), {name: Member(name, AGREED) for name in FIVE}
    for member in members.values():
        group.take(member.keys())
    roster = group.roster()
    for member in members.values():
        group.take(member.shares(roster))
    for name, delivery in group.deliveries().items():
        message = members[name].masked(delivery, WORDS[name])
        with pytest.raises(PeerError, match=r"the terms say uint32 \[8\]"):
            group.take(replace(message, words=words))
        group.take(message)
    survivors = group.survivors()
    for member in members.values():
        group.take(member.unmasking(survivors))
    assert group.total().tolist() == plain_sum(WORDS, FIVE, AGREED)


def test_shares_of_the_wrong_members_are_refused() -> None:
    played, sent = answers({"client-1": "masked"})
    first = sent["client-0"]
    for wrong in (
        replace(first, keys={}),
        replace(first, seeds={**first.seeds, "client-1": b"\0" * 33}),
        replace(first, keys={**first.keys, "client-0": b"\0" * 33}),
        replace(first, seeds={}),
    ):
        with pytest.raises(PeerError, match=r"client-0: (seeds|keys): not exactly those"):
            played.group.take(wrong)
    for answer in sent.values():
        played.group.take(answer)
    assert played.group.total().tolist() == plain_sum(WORDS, [name for name in FIVE if name != "client-1"], AGREED)


@pytest.mark.parametrize("liar", ["client-0", "client-10", "client-2"])
@pytest.mark.parametrize("kind", ["seeds", "keys"])
@pytest.mark.parametrize("share", [altered, lambda share: b"\xff" * 33, lambda share: b"\0" * 33])
def test_an_altered_share_voids_the_round_and_never_gives_a_wrong_sum(liar: str, kind: str, share: object) -> None:
    played, sent = answers({"client-1": "masked", "client-3": "masked"})
    assert list(sent) == ["client-0", "client-10", "client-2"]
    shares = getattr(sent[liar], kind)
    victim = sorted(shares)[0]
    sent[liar] = replace(sent[liar], **{kind: {**shares, victim: share(shares[victim])}})  # type: ignore[operator]
    for answer in sent.values():
        played.group.take(answer)
    with pytest.raises(VoidRoundError, match=rf"the shares of {victim} do not fit together: it or one of .*{liar}"):
        played.group.total()


def test_phases_are_closed_in_their_order_and_once() -> None:
    group = Group(AGREED, FIVE)
    for close in (group.deliveries, group.survivors, group.total):
        with pytest.raises(ValueError, match="is at phase 0"):
            close()
    played = Played(AGREED, WORDS)
    played.total()
    with pytest.raises(ValueError, match="is at phase 4"):
        played.group.total()
    with pytest.raises(PeerError, match="this is the end of round"):
        played.group.take(played.sent[-1])


def test_no_more_are_invited_than_the_terms_are_for() -> None:
    with pytest.raises(ValueError, match="6 are invited; the terms are for 5"):
        Group(AGREED, NAMES)


def test_any_t_answers_give_the_same_sum() -> None:
    for silent in ("client-0", "client-2", "client-4"):
        agreed, names = terms(6, 4), [*FIVE, "client-4"]
        words = drawn_words(agreed, 6)
        played = Played(agreed, words, {"client-3": "masked", silent: "unmasking"})
        assert played.total().tolist() == plain_sum(words, [name for name in names if name != "client-3"], agreed)
