"""Headers come back as they were, and what is no header is a PeerError."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import PeerError
from splitllm.privacy import messages
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

MESSAGES = [
    Keys("r", "a", b"1" * 32, b"2" * 32),
    Roster("r", {"a": (b"1" * 32, b"2" * 32), "b": (b"3" * 32, b"4" * 32)}),
    Shares("r", "a", b"5" * 32, {"b": b"6" * 94}),
    Delivery("r", {"b": b"6" * 94}),
    Survivors("r", ["a", "b"]),
    Unmasking("r", "a", {"a": b"7" * 33}, {"b": b"8" * 33}),
]
KINDS = [type(message) for message in MESSAGES]
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("00" * 32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["round", "member", "sealing", "masking", "keys", "commitment", "sealed", "members", "seeds", "words", "more"]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_there_and_back_as_json(message: Any) -> None:
    assert from_header(type(message), json.loads(json.dumps(to_header(message)))) == message


def test_words_travel_beside_the_header() -> None:
    words = np.arange(3, dtype=np.uint32)
    header = to_header(Masked("r", "a", words))
    assert header == {"round": "r", "member": "a"}
    assert from_header(Masked, header, words).words is words
    with pytest.raises(PeerError, match="Masked: words"):
        from_header(Masked, header)
    with pytest.raises(PeerError, match="Masked: words"):
        from_header(Masked, {**header, "words": [1, 2, 3]})
    with pytest.raises(PeerError, match="Survivors: words"):
        from_header(Survivors, {"round": "r", "members": []}, words)


@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(FIELDS), plain))
def test_whatever_comes_is_a_message_or_a_peer_error(kind: type[Any], header: dict[str, Any]) -> None:
    try:
        outcome = from_header(kind, header)
    except PeerError as error:
        outcome = error
    if isinstance(outcome, PeerError):
        assert str(outcome).startswith(f"{kind.__name__}: ") and str(outcome).isprintable()
    else:
        assert to_header(outcome).keys() == header.keys()


@pytest.mark.parametrize("name", ["", "a\nb", "a\x00", "a\x7f", "a" * 201])
def test_names_are_short_and_on_one_line(name: str) -> None:
    for header in ({"round": name, "members": ["a"]}, {"round": "r", "members": [name]}):
        with pytest.raises(PeerError, match="Survivors: ") as failure:
            from_header(Survivors, header)
        assert str(failure.value).isprintable()
    with pytest.raises(PeerError, match="Delivery: sealed") as failure:
        from_header(Delivery, {"round": "r", "sealed": {name: "00" * 94}})
    assert str(failure.value).isprintable()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("value", [None, 1, "", "zz", ["a", 1], {"a": "00"}, {"a": None}, {"a": ["00", "00"]}])
def test_each_field_is_checked(message: Any, value: object) -> None:
    header = to_header(message)
    for field in header:
        if value == "zz" and field in ("round", "member"):
            continue
        with pytest.raises(PeerError, match=f"{type(message).__name__}: {field}"):
            from_header(type(message), {**header, field: value})
        with pytest.raises(PeerError, match=f"{type(message).__name__}: {field}"):
            from_header(type(message), {key: header[key] for key in header if key != field})


def test_a_share_of_another_size_is_refused() -> None:
    header = to_header(MESSAGES[-1])
    for size in (0, 32, 34):
        with pytest.raises(PeerError, match=r"Unmasking: seeds\.a"):
            from_header(Unmasking, {**header, "seeds": {"a": "00" * size}})


def test_what_is_sealed_has_the_size_that_the_header_demands() -> None:
    assert messages.SEALED_BYTES == 94
