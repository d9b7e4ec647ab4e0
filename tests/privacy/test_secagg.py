"""The sum is exact whoever is lost, or there is none; one member's words look like noise."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from splitllm.errors import PrivacyError, VoidRoundError
from splitllm.privacy.fixedpoint import FixedPoint
from splitllm.privacy.messages import Masked, Roster, Unmasking
from splitllm.privacy.secagg import Terms, digest
from tests.privacy.rounds import NAMES, PHASES, Played, drawn_words, plain_sum, terms

STAYS = "stays"


def expected(members: int, threshold: int, lost: dict[str, str]) -> tuple[str, list[str]] | list[str]:
    """Who is in the sum; or the phase that ends the round, and who is missing in it."""
    alive = NAMES[:members]
    summed: list[str] = []
    for phase in PHASES:
        missing = sorted(name for name in alive if lost.get(name) == phase)
        summed = alive if phase == "unmasking" else summed
        alive = [name for name in alive if name not in missing]
        if len(alive) < threshold:
            return phase, missing
    return summed


def check(members: int, threshold: int, when: tuple[str, ...]) -> None:
    agreed = terms(members, threshold)
    words = drawn_words(agreed, members)
    lost = {name: phase for name, phase in zip(NAMES, when, strict=False) if phase != STAYS}
    played = Played(agreed, words, lost)
    outcome = expected(members, threshold, lost)
    if isinstance(outcome, list):
        assert played.total().tolist() == plain_sum(words, outcome, agreed)
        assert played.group.members == sorted(outcome)
        return
    phase, missing = outcome
    with pytest.raises(VoidRoundError) as failure:
        played.total()
    line = str(failure.value)
    assert phase in line and f"missing: {', '.join(missing)};" in line and f"{threshold} are needed" in line
    assert "\n" not in line


@pytest.mark.parametrize("first", [STAYS, *PHASES])
def test_any_four_of_four_lost_in_any_phase(first: str) -> None:
    """All 5^4 ways to be lost."""
    for others in product([STAYS, *PHASES], repeat=3):
        check(4, 3, (first, *others))


@pytest.mark.parametrize("phase", PHASES)
def test_any_set_of_five_lost_in_one_phase(phase: str) -> None:
    for many in range(6):
        for lost in combinations(range(5), many):
            check(5, 3, tuple(phase if at in lost else STAYS for at in range(5)))


def test_two_members_and_all_of_them_needed() -> None:
    check(2, 2, (STAYS, STAYS))
    check(2, 2, (STAYS, "unmasking"))


@pytest.mark.parametrize("word_bits", [32, 64])
def test_the_largest_sum_does_not_wrap(word_bits: int) -> None:
    agreed = terms(5, 3, 4, word_bits)
    fixed = agreed.fixed
    for sign in (1.0, -1.0):
        words = {name: fixed.encode(np.full(4, sign * 99)) for name in NAMES[:5]}
        total = fixed.integers(Played(agreed, words).total())
        assert total.tolist() == [int(sign) * 5 * fixed.limit] * 4
        assert fixed.decode(total).tolist() == [sign * 5] * 4


def test_a_vector_longer_than_the_pieces_of_a_mask() -> None:
    agreed = terms(3, 2, size=300_001)
    words = drawn_words(agreed, 3)
    total = Played(agreed, words, {"client-1": "masked"}).total()
    assert (total == words["client-0"] + words["client-10"]).all()


def chi_square(words: np.ndarray) -> float:
    """Over the bytes of the words, standardised: about N(0, 1) for uniform ones."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    each = counts.sum() / 256
    return float((((counts - each) ** 2 / each).sum() - 255) / np.sqrt(2 * 255))


def masked_words(value: float, size: int = 100_000) -> tuple[list[np.ndarray], np.ndarray]:
    """What each of three members sends that all have the same words, and those words."""
    agreed = terms(3, 2, size)
    plain = agreed.fixed.encode(np.full(size, value))
    played = Played(agreed, dict.fromkeys(NAMES[:3], plain))
    played.until_masked()
    return [message.words for message in played.sent if isinstance(message, Masked)], plain


@pytest.mark.parametrize("value", [0.0, 0.37])
def test_masked_words_look_uniform(value: float) -> None:
    """A chi-square of 255 degrees of freedom is above 255 + 9 x 22.6 with a probability of 1e-13; that of the plain
    words is far above. Every byte of a word is looked at by itself too."""
    sent, plain = masked_words(value)
    assert len(sent) == 3
    assert chi_square(plain) > 1000
    for words in sent:
        assert abs(chi_square(words)) < 9
        for byte in range(4):
            assert abs(chi_square(words.view(np.uint8)[byte::4].copy())) < 9


def test_masks_of_members_and_of_rounds_differ_and_do_not_cancel_early() -> None:
    """Differences and sums of two members, and of two rounds with the same words, look uniform too."""
    first, _ = masked_words(0.37)
    again, _ = masked_words(0.37)
    for one, other in [*combinations(first, 2), *zip(first, again, strict=True)]:
        assert abs(chi_square(one - other)) < 9 and abs(chi_square(one + other)) < 9


def test_without_the_last_unmasking_the_sum_is_noise() -> None:
    """The masks of their own keep the sum of all hidden until t members have answered."""
    sent, _ = masked_words(0.0)
    assert abs(chi_square(sent[0] + sent[1] + sent[2])) < 9


def test_what_the_server_gets_of_each_member_is_the_one_or_the_other() -> None:
    played = Played(terms(5, 3), drawn_words(terms(5, 3), 5), {"client-1": "masked", "client-3": "shares"})
    played.total()
    answers = [message for message in played.sent if isinstance(message, Unmasking)]
    assert len(answers) == 3
    for answer in answers:
        assert answer.seeds.keys() == {"client-0", "client-10", "client-2"}
        assert answer.keys.keys() == {"client-1"}  # client-3 was lost before anybody had a mask in common with it


@pytest.mark.parametrize(
    ("members", "threshold", "least"), [(5, 2, 3), (4, 2, 3), (6, 3, 4), (3, 1, 2), (2, 1, 2), (1, 1, 2)]
)
def test_thresholds_that_a_lying_server_could_use_are_refused(members: int, threshold: int, least: int) -> None:
    with pytest.raises(PrivacyError, match=f"use at least {least}"):
        terms(members, threshold)


def test_impossible_terms_are_refused() -> None:
    with pytest.raises(PrivacyError, match="use at most 5"):
        terms(5, 6)
    with pytest.raises(PrivacyError, match="size"):
        terms(size=0)


def test_the_digest_depends_on_all_that_was_agreed() -> None:
    fixed = FixedPoint(1.0, 20, 5)
    keys = {"a": (b"1" * 32, b"2" * 32), "b": (b"3" * 32, b"4" * 32)}
    cases = [
        (Terms("r", 8, 3, fixed), keys),
        (Terms("s", 8, 3, fixed), keys),
        (Terms("r", 9, 3, fixed), keys),
        (Terms("r", 8, 4, fixed), keys),
        (Terms("r", 8, 3, FixedPoint(1.5, 20, 5)), keys),
        (Terms("r", 8, 3, FixedPoint(1.0, 21, 5)), keys),
        (Terms("r", 8, 3, FixedPoint(1.0, 20, 4)), keys),
        (Terms("r", 8, 3, FixedPoint(1.0, 20, 5, 64)), keys),
        (Terms("r", 8, 3, fixed), {**keys, "c": (b"5" * 32, b"6" * 32)}),
        (Terms("r", 8, 3, fixed), {"a": keys["b"], "b": keys["a"]}),
        (Terms("r", 8, 3, fixed), {**keys, "a": keys["a"][::-1]}),
    ]
    digests = [digest(agreed, Roster(agreed.round, known)) for agreed, known in cases]
    assert len(set(digests)) == len(cases)
    assert digest(cases[0][0], Roster("r", dict(reversed(keys.items())))) == digests[0]
