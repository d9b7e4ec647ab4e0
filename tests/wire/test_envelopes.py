"""Messages survive their envelopes, and what is no message is refused with its reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import DivergedError, PeerError, RejoinError, SplitLLMError
from splitllm.wire.coding import Coding
from splitllm.wire.envelopes import error_envelope, error_of, reply_envelope, reply_of, request_of, request_values
from splitllm.wire.frames import Envelope, FrameType
from splitllm.wire.message import KINDS, Message

GOOD = {"kind": "forward", "micro_batch": [1, 2, 3], "generation": 4, "received": [5], "header": {"train": True}}


def request(**changes: Any) -> Envelope:
    return Envelope(FrameType.REQUEST, 9, {**GOOD, **changes})


def test_a_request_and_its_reply() -> None:
    sent = Message("close", "edge-0", (4, 0, -1), {"a": [1]}, {"x": torch.arange(3)}, generation=8)
    packed = Coding().pack_request(sent)
    found, received = request_of(Envelope(FrameType.REQUEST, 1, request_values(sent, [3, 4]), packed), "edge-0")
    assert received == [3, 4] and torch.equal(found.tensors["x"], sent.tensors["x"])
    assert replace(found, tensors={}) == replace(sent, tensors={})
    answer = replace(sent, sender="cloud", header={"b": None})
    back = reply_of(reply_envelope(1, answer, Coding().pack_reply(sent, answer)), sent, "cloud")
    assert replace(back, tensors={}) == replace(answer, tensors={}) and torch.equal(back.tensors["x"], torch.arange(3))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "sing"}, "request 9 has kind 'sing'; known are join, share"),
        ({"kind": ["forward"]}, "request 9 has kind ['forward']"),
        ({"micro_batch": [1, 2]}, "micro_batch [1, 2]; step, client and index are due"),
        ({"micro_batch": [1, 2, True]}, "micro_batch"),
        ({"micro_batch": [1, 2, -2]}, "micro_batch"),
        ({"micro_batch": [1, 2, 2**53]}, "micro_batch"),
        ({"generation": -1}, "generation -1"),
        ({"generation": None}, "generation None"),
        ({"header": []}, "a header that is no mapping"),
        ({"received": 3}, "it received 3; a list of numbers is due"),
        ({"received": [1.0]}, "it received [1.0]"),
    ],
)
def test_what_is_no_request(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(PeerError) as refused:
        request_of(request(**changes), "client-0")
    assert text in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(list(GOOD)), JSON), st.sampled_from(FrameType))
def test_any_values_are_a_request_or_refused(changes: dict[str, Any], kind: FrameType) -> None:
    try:
        message, _ = request_of(replace(request(**changes), type=kind), "client-0")
    except PeerError as error:
        assert str(error).startswith("client-0")  # noqa: PT017
    else:
        assert message.kind in KINDS and kind is FrameType.REQUEST


def test_an_answer_needs_a_header() -> None:
    asked = Message("open", "client-0", (0, 0, 0))
    with pytest.raises(PeerError, match="cloud: the answer to open has no header"):
        reply_of(Envelope(FrameType.REPLY, 1, {}), asked, "cloud")


@pytest.mark.parametrize("error", [RejoinError("again"), DivergedError("nan"), PeerError("no")])
def test_errors_keep_type_and_text(error: SplitLLMError) -> None:
    found = error_of(error_envelope(3, error))
    assert type(found) is type(error) and str(found) == str(error)


def test_an_unknown_error_is_a_peers() -> None:
    assert type(error_of(Envelope(FrameType.ERROR, 1, {"error": [], "text": None}))) is PeerError
