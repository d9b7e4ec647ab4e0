"""A member does each thing once, and refuses whatever would show its words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from splitllm.errors import PeerError, PrivacyError
from splitllm.privacy.member import Member
from splitllm.privacy.messages import Delivery, Masked, Roster, Survivors
from tests.privacy.rounds import NAMES, Played, drawn_words, terms

AGREED = terms(5, 3)
FIVE = NAMES[:5]
FIRST = FIVE[0]
WORDS = drawn_words(AGREED, 5)


class Until:
    """A round of five, up to a phase that is not closed yet; `first` is where the server's lies go."""

    def __init__(self, phase: str) -> None:
        self.played = Played(AGREED, WORDS)
        self.first = self.played.members[FIRST]
        members, group = self.played.members, self.played.group
        for name in FIVE:
            group.take(members[name].keys())
        self.roster = group.roster()
        if phase == "shares":
            return
        for name in FIVE:
            group.take(members[name].shares(self.roster))
        self.delivery = group.deliveries()[FIRST]
        if phase == "masked":
            return
        self.first.masked(self.delivery, WORDS[FIRST])


def changed(data: bytes) -> bytes:
    return bytes([data[0] ^ 1, *data[1:]])


def test_keys_are_new_each_time() -> None:
    one, other = Member(FIRST, AGREED).keys(), Member(FIRST, AGREED).keys()
    assert len({one.sealing, one.masking, other.sealing, other.masking}) == 4


def test_phases_come_once_and_in_their_order() -> None:
    member = Member(FIRST, AGREED)
    with pytest.raises(PeerError, match="is asked for shares, and is at keys"):
        member.shares(Roster(AGREED.round, {}))
    member.keys()
    with pytest.raises(PeerError, match="is asked for keys, and is at shares"):
        member.keys()


@pytest.mark.parametrize("phase", ["shares", "masked", "unmasking"])
def test_what_was_answered_is_not_answered_again(phase: str) -> None:
    """Two different answers to one question is what takes off a mask."""
    at = Until(phase)
    ask = {
        "shares": lambda: at.first.shares(at.roster),
        "masked": lambda: at.first.masked(at.delivery, WORDS[FIRST]),
        "unmasking": lambda: at.first.unmasking(Survivors(AGREED.round, FIVE)),
    }[phase]
    ask()
    with pytest.raises(PeerError, match=f"is asked for {phase}"):
        ask()


@pytest.mark.parametrize("phase", ["shares", "masked", "unmasking"])
def test_keys_are_for_one_round(phase: str) -> None:
    at = Until(phase)
    with pytest.raises(PeerError, match="has made its keys for round run/edge-0/7, and no other"):
        {
            "shares": lambda: at.first.shares(replace(at.roster, round="another")),
            "masked": lambda: at.first.masked(replace(at.delivery, round="another"), WORDS[FIRST]),
            "unmasking": lambda: at.first.unmasking(Survivors("another", FIVE)),
        }[phase]()
    with pytest.raises(PeerError, match="is at the end"):  # nor can this one be gone on with
        at.first.unmasking(Survivors(AGREED.round, FIVE))


Pairs = dict[str, tuple[bytes, bytes]]
ROSTERS: dict[str, tuple[Callable[[Pairs], Pairs], str]] = {
    "its sealing key": (
        lambda keys: {**keys, FIRST: (changed(keys[FIRST][0]), keys[FIRST][1])},
        "not those that it sent",
    ),
    "its masking key": (
        lambda keys: {**keys, FIRST: (keys[FIRST][0], changed(keys[FIRST][1]))},
        "not those that it sent",
    ),
    "swapped": (lambda keys: {**keys, FIRST: keys[FIRST][::-1]}, "not those that it sent"),
    "without it": (lambda keys: {name: keys[name] for name in FIVE[1:]}, "not those that it sent"),
    "two": (lambda keys: {name: keys[name] for name in FIVE[:2]}, "2 members; 3 to 5 are agreed"),
    "six": (lambda keys: {**keys, "client-9": (b"9" * 32, b"8" * 32)}, "6 members; 3 to 5 are agreed"),
    "a key twice": (lambda keys: {**keys, FIVE[1]: (keys[FIVE[2]][0], keys[FIVE[1]][1])}, "there twice"),
    "its own twice": (lambda keys: {**keys, FIVE[1]: (keys[FIVE[1]][0], keys[FIRST][1])}, "there twice"),
    "low order": (lambda keys: {**keys, FIVE[1]: (bytes(32), keys[FIVE[1]][1])}, "client-1: its public key"),
}


@pytest.mark.parametrize("case", ROSTERS)
def test_rosters_that_are_refused_and_then_any(case: str) -> None:
    lie, what = ROSTERS[case]
    at = Until("shares")
    with pytest.raises(PeerError, match=what):
        at.first.shares(Roster(AGREED.round, lie(at.roster.keys)))
    with pytest.raises(PeerError, match="is asked for shares"):
        at.first.shares(at.roster)


def test_shares_that_were_changed_or_are_not_for_it_are_refused() -> None:
    other = FIVE[1]
    for swap in (lambda d: changed(d[other]), lambda d: d[FIVE[2]], lambda d: bytes(len(d[other]))):
        at = Until("masked")
        with pytest.raises(PeerError, match=f"what {other} sealed for {FIRST} was changed"):
            at.first.masked(
                Delivery(AGREED.round, {**at.delivery.sealed, other: swap(at.delivery.sealed)}), WORDS[FIRST]
            )


def test_a_server_that_shows_others_another_roster_gets_no_masked_words() -> None:
    """It puts a key of its own into the place of one member's, for all but that one."""
    played = Played(AGREED, WORDS)
    keys = {name: played.members[name].keys() for name in FIVE}
    honest = Roster(AGREED.round, {name: (each.sealing, each.masking) for name, each in keys.items()})
    spy = Member(FIVE[4], AGREED).keys()
    lie = replace(honest, keys={**honest.keys, FIVE[4]: (honest.keys[FIVE[4]][0], spy.masking)})
    shares = {name: played.members[name].shares(honest if name == FIVE[4] else lie) for name in FIVE}
    for name in FIVE:
        delivery = Delivery(AGREED.round, {other: shares[other].sealed[name] for other in FIVE if other != name})
        with pytest.raises(PeerError, match="other terms or keys"):
            played.members[name].masked(delivery, WORDS[name])


def test_members_with_other_terms_get_no_masked_words() -> None:
    played = Played(AGREED, WORDS)
    played.members[FIVE[4]] = Member(FIVE[4], replace(AGREED, threshold=4))
    with pytest.raises(PeerError, match="other terms or keys"):
        played.until_masked()


def test_shares_of_too_few_of_strangers_and_of_itself_are_refused() -> None:
    at = Until("masked")
    with pytest.raises(PeerError, match="shares of 1 others are too few; 3 members are needed"):
        at.first.masked(Delivery(AGREED.round, {FIVE[1]: at.delivery.sealed[FIVE[1]]}), WORDS[FIRST])
    for name in ("client-9", FIRST):
        at = Until("masked")
        sealed = {**at.delivery.sealed, name: at.delivery.sealed[FIVE[1]]}
        with pytest.raises(PeerError, match=f"{name} is not one of the others"):
            at.first.masked(Delivery(AGREED.round, sealed), WORDS[FIRST])


def test_words_that_are_not_of_the_terms_are_refused() -> None:
    fixed = AGREED.fixed
    for words, what in (
        (np.zeros(8, np.uint64), "uint64"),
        (np.zeros(7, np.uint32), r"\[7\]"),
        (fixed.wrap(np.array([0] * 7 + [fixed.limit + 1])), "could wrap"),
        (fixed.wrap(np.array([0] * 7 + [-fixed.limit - 1])), "could wrap"),
        (np.full(8, 1 << 31, np.uint32), "could wrap"),
    ):
        at = Until("masked")
        with pytest.raises(PrivacyError, match=what):
            at.first.masked(at.delivery, words)
        with pytest.raises(PeerError, match="is at the end"):  # it has sent no words, so it is in no sum
            at.first.unmasking(Survivors(AGREED.round, FIVE))


def test_words_are_left_as_they_are() -> None:
    before = WORDS[FIRST].copy()
    at = Until("masked")
    sent = at.first.masked(at.delivery, WORDS[FIRST])
    assert isinstance(sent, Masked) and (WORDS[FIRST] == before).all() and (sent.words != before).any()


@pytest.mark.parametrize(
    ("survivors", "what"),
    [
        ([], "nobody; the masks of client-0"),
        (FIVE[:2], "of at least 3 members"),
        (FIVE[1:], "only in a sum with it in"),
        ([*FIVE, FIVE[1]], "named twice"),
        ([FIRST, FIRST, FIRST], "named twice"),
        ([*FIVE[:4], "client-9"], "client-9 has sent client-0 no shares"),
    ],
)
def test_survivors_that_are_refused_and_then_any(survivors: list[str], what: str) -> None:
    at = Until("unmasking")
    with pytest.raises(PeerError, match=what):
        at.first.unmasking(Survivors(AGREED.round, survivors))
    with pytest.raises(PeerError, match="is at the end"):
        at.first.unmasking(Survivors(AGREED.round, FIVE))


def test_no_two_sets_of_survivors_get_both_shares_of_anyone() -> None:
    """One answer has of each member the one or the other, and there is no second answer."""
    at = Until("unmasking")
    answer = at.first.unmasking(Survivors(AGREED.round, FIVE[:4]))
    assert answer.seeds.keys() | answer.keys.keys() == set(FIVE) and not answer.seeds.keys() & answer.keys.keys()
    with pytest.raises(PeerError, match="is at the end"):
        at.first.unmasking(Survivors(AGREED.round, [FIRST, *FIVE[2:]]))
