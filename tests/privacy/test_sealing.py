"""Only the two of a pair have its keys, and a sealed text is bound to where it belongs."""

from __future__ import annotations

import os

import pytest

from splitllm.errors import PeerError
from splitllm.privacy.sealing import SEAL_BYTES, agree, commit, derive, public_of, seal, unseal

KEY = bytes(range(32))


def test_both_of_a_pair_have_the_same_secret_and_others_another() -> None:
    a, b, c = (os.urandom(32) for _ in range(3))
    assert agree(a, public_of(b), "b") == agree(b, public_of(a), "a")
    assert agree(a, public_of(b), "b") != agree(a, public_of(c), "c")


@pytest.mark.parametrize("public", [bytes(32), b"\1" + bytes(31), b"short"])
def test_keys_without_a_secret_are_refused(public: bytes) -> None:
    """The first two are points of low order: the secret would be 0 whatever the private key is."""
    with pytest.raises(PeerError, match="client-1: its public key"):
        agree(KEY, public, "client-1")


def test_keys_are_for_one_purpose() -> None:
    contexts = [(), ("a",), ("a", "b"), ("ab",), ("a", ""), ('a", "b',)]
    for function in (derive, commit):
        made = {function(KEY, *context) for context in contexts}
        assert len(made) == len(contexts) and {len(key) for key in made} == {32}
        assert function(KEY, "a") == function(KEY, "a")
        assert function(bytes(32), "a") not in made


def test_a_sealed_text_opens_with_its_key_in_its_context_and_nowhere_else() -> None:
    sealed = seal(KEY, b"text", "round", "a", "b")
    assert len(sealed) == 4 + SEAL_BYTES and b"text" not in sealed
    assert unseal(KEY, sealed, "round", "a", "b") == b"text"
    assert unseal(KEY, sealed, "round", "b", "a") is None
    assert unseal(bytes(32), sealed, "round", "a", "b") is None
    for at in range(len(sealed)):
        changed = bytes([*sealed[:at], sealed[at] ^ 1, *sealed[at + 1 :]])
        assert unseal(KEY, changed, "round", "a", "b") is None
    for size in range(len(sealed)):
        assert unseal(KEY, sealed[:size], "round", "a", "b") is None


def test_the_same_text_is_never_sealed_alike() -> None:
    assert seal(KEY, b"text") != seal(KEY, b"text")
