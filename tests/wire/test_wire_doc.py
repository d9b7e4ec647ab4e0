"""docs/wire.md says what the code does: header, values, kinds, codecs and their sizes, limits, refusals, frames."""

from __future__ import annotations

import ast
import inspect
import re
import struct
import textwrap
from collections.abc import Callable
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch

from splitllm.deployment import bounds, server, station
from splitllm.recipe.schema import WireRecipe
from splitllm.roles import checks
from splitllm.roles.generation import Begun
from splitllm.roles.recovery import Decision
from splitllm.wire import codecs, contents, envelopes, frames, quantizers, remote, sessions, stream, uplink
from splitllm.wire.coding import Coding
from splitllm.wire.frames import Envelope, FrameType, to_frames
from splitllm.wire.message import KINDS, Message

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
PROSE = " ".join(PAGE.split())


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}")[1].split("\n## ")[0]


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the first table whose head begins so."""
    rows = text.split(f"\n| {first} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def first_cells(rows: str) -> set[str]:
    return quoted(" ".join(re.findall(r"^\| (.+?) \|", rows, re.MULTILINE)))


def dict_keys(function: Callable[..., Any]) -> set[str]:
    """Keys written out in the dictionaries of a function."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    literals = [key for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys]
    return {str(key.value) for key in literals if isinstance(key, ast.Constant)}


# Frames and what is in them.


def test_the_header_is_laid_out_as_the_table_says() -> None:
    rows = table(section("The frame"), "offset")
    letters = {1: "B", 2: "H", 4: "I", 8: "Q"}
    sizes = [int(row[1]) for row in rows]
    assert [int(row[0]) for row in rows] == [sum(sizes[:place]) for place in range(len(sizes))]
    own = struct.Struct("<4s" + "".join(letters[size] for size in sizes[1:]))
    assert (own.format, own.size) == (frames.HEADER.format, frames.HEADER.size)
    said = {row[2]: row[3] for row in rows}
    assert said["magic"] == f"`{frames.MAGIC.decode()}`, {frames.MAGIC.hex(' ')}"
    assert int(said["version"]) == frames.VERSION
    assert said["type"] == ", ".join(f"{kind.value} {kind.name.lower()}" for kind in FrameType)
    assert frames.LARGEST_NUMBER == 2**63 - 1 and "below 2^63" in said["number"]
    *names, last = [kind.name.lower() for kind in FrameType if kind in frames.UNNUMBERED]
    assert f"{', '.join(names)} and {last} have 0" in said["number"]


def test_dtypes_and_bounds_of_the_json() -> None:
    said = re.search(r"^- dtype is one of (.+)\.$", PAGE, re.MULTILINE)
    assert said is not None and said[1] == ", ".join(f"`{name}`" for name in contents.DTYPES)
    for fact in (
        f"at most {contents.LEVELS} levels",
        f"A name has 1 to {contents.NAME_CHARACTERS} printable characters",
        f"a codec's name at most {contents.CODEC_CHARACTERS} characters",
        f"At most {contents.DIMS} dims, each 0 to 2^{contents.LARGEST_DIM.bit_length() - 1}",
        f"at most 2^{codecs._MOST_ELEMENTS.bit_length() - 1} elements",
    ):
        assert fact in PROSE, fact


def test_hello_and_welcome_hold_what_the_tables_say() -> None:
    _, hello, welcome = section("Hello, welcome, goodbye").split("\n| value |")
    assert first_cells(hello) == dict_keys(uplink.RemoteLink.__init__) | dict_keys(station.Station.uplink)
    assert first_cells(welcome) == dict_keys(server._admit) | dict_keys(sessions.Sessions._enter)


def test_requests_replies_and_errors_hold_what_the_table_says() -> None:
    values = {row[0]: quoted(row[1]) for row in table(section("Requests and replies"), "envelope")}
    request = Message("open", "client-0", (0, 0, 0))
    assert values["request"] == set(envelopes.request_values(request, []))
    assert values["reply"] == set(envelopes.reply_envelope(1, request, {}).values)
    error = envelopes.error_envelope(1, envelopes.ERRORS["peer"]("x" * 9999)).values
    assert values["error"] == set(error) | set(envelopes.ERRORS)
    assert f"`text` of at most {len(error['text']):,} characters" in PAGE
    assert envelopes.LARGEST == 2**53 and "all are below 2^53" in PROSE


def test_every_kind_is_listed_with_all_that_is_checked_of_it() -> None:
    rows = {row[0].split("`")[1]: row for row in table(section("Requests and replies"), "kind")}
    assert list(rows) == list(KINDS)
    for kind, row in rows.items():
        source = inspect.getsource(checks._CHECKS[kind])
        header = re.findall(r'(?:_mapping\(message, |header\.get\(|header\[)"(\w+)"', source)
        tensors = re.findall(r'"([a-z_]+_[A-Z]+)"', source)
        losses = ["losses"] if "_losses(" in source else []
        assert {*header, *tensors, *losses} <= quoted(row[1]), kind
    assert f"1 to {checks.MOST_KEPT} states kept" in rows["join"][1]
    assert f"1 to {checks.LONGEST_WORDS} printable characters" in rows["diverged"][1]
    assert f"an origin is 1 to {checks.LONGEST_ORIGIN} printable characters" in PROSE
    assert set(Begun(1, Decision(0, "new", {}, ()), evaluated=False).header()) == quoted(rows["join"][2])


def dump(which: int) -> dict[int, bytes]:
    """Offset -> bytes, of a frame that the page shows."""
    text = re.findall(r"^```\n(0000 .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[which]
    rows = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ){15}[0-9a-f]{2})", text, re.MULTILINE)
    return {int(offset, 16): bytes.fromhex(row) for offset, row in rows}


def test_the_hello_shown_is_what_is_sent() -> None:
    values: dict[str, Any] = {"name": "client-0", "recipe": "0" * 32, "model": "f" * 32}
    values |= {"protocol": frames.VERSION, "incarnation": "8f3a6c01d2b4e597"}
    [frame] = to_frames(Envelope(FrameType.HELLO, 0, values))
    shown = dump(0)
    assert {offset: frame[offset : offset + 16] for offset in shown} == shown and len(shown) == 5
    assert len(frame) == 256 and "the rest of its 256 bytes is zeros" in PROSE and not any(frame[0xE0:])


def test_the_request_shown_is_what_is_sent() -> None:
    header = {"lengths": [2, 1], "train": True, "input_gradient": True}
    hidden_TD = torch.tensor([[0.5, -1.0], [2.0, 0.25], [1.5, -0.125]])
    tensors = {"hidden_TD": hidden_TD, "positions_N": torch.tensor([1], dtype=torch.int32)}
    message = Message("forward", "client-0", (3, 0, 1), header, tensors, 1795447227000)
    packed = Coding().pack_request(message)
    [frame] = to_frames(Envelope(FrameType.REQUEST, 7, envelopes.request_values(message, [5, 6]), packed))
    shown = dump(1)
    assert {offset: frame[offset : offset + 16] for offset in shown} == shown and len(shown) == 8
    assert len(frame) == 0x1C0 and not any(frame[0x190:])


# Codecs.

SIZES = {row[0]: row[1:] for row in table(section("Codecs"), "codec")}
"""Names in backquotes -> what the blob holds, its bytes."""


def bytes_of(names: str, tokens: int, width: int, more: str = "0") -> int:
    """What the table's formula gives; `2 M` is 2 times M."""
    blob, formula = SIZES[names]
    known: dict[str, Any] = {"ceil": ceil, "min": min, "max": max, "T": tokens, "D": width, "F": Fraction(1, 20)}
    letters = re.findall(r"\b([A-Z]) = (.+?)(?=, [A-Z] = |$)", blob)
    for name, value in [*letters, ("result", f"{formula} + {more}")]:
        known[name] = eval(re.sub(r"(?<=[\w)]) (?=[\w(])", "*", value), known)
    return int(known["result"])


def size_of(name: str, tokens: int, width: int) -> int:
    return codecs.codec(name.replace(":F", ":0.05")).size((tokens, width), torch.float32)


def test_every_codec_is_listed() -> None:
    assert {name for names in SIZES for name in re.findall(r"`([^`]+)`", names)} == {*codecs.CODECS, "topk:F"}


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (7, 31), (33, 768), (5, 2048), (3, 65_536)])
def test_sizes_are_those_of_the_formulas(tokens: int, width: int) -> None:
    for names in SIZES.keys() - {"`none`"}:
        for name in re.findall(r"`([^`]+)`", names):
            assert size_of(name, tokens, width) == bytes_of(names, tokens, width), name


def test_above_65536_channels_their_numbers_take_two_bytes_more() -> None:
    for name, more in (("int8", "2 M"), ("int4", "2 M"), ("topk:F", "2 T K")):
        assert size_of(name, 3, 65_537) == bytes_of(f"`{name}`", 3, 65_537, more), name


def test_a_tensor_without_elements_has_no_bytes() -> None:
    assert {codec.size((0, 64), torch.float32) for codec in codecs.CODECS.values()} == {0}


@pytest.mark.parametrize("name", ["none", "bf16", "int8", "int4", "topk:0.05"])
def test_bytes_a_token_are_those_stated(name: str) -> None:
    share = {"int8": 128, "int4": 256}.get(name)
    figures = [size_of(name, 1, width) - (2 * ceil(width / share) if share else 0) for width in (768, 2048)]
    said = PROSE.split("Bytes a token at D = 768 and 2,048")[1].split(". ")[0]
    assert f"{'none in float32' if name == 'none' else name} {figures[0]:,} and {figures[1]:,}" in said


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_parts_of_a_blob_come_in_the_order_of_the_table(name: str) -> None:
    words = {"float32": torch.float32, "uint16": torch.int16, "bfloat16": torch.bfloat16, "int8": torch.int8}
    words |= {"e4m3fn": torch.float8_e4m3fn, "uint8": torch.uint8}
    shown = re.findall(r"(\w+) \[[^]]+\]", SIZES[f"`{name}`"][0])
    parts = {"int8": quantizers.int8_parts, "int4": quantizers.int4_parts}[name](3, 768)
    assert [words[word] for word in shown] == [dtype for dtype, _ in parts]


# Limits, times and refusals.


def test_statuses_are_those_of_the_reasons() -> None:
    listed = [name for row in table(section("Refusals"), "status") for name in row[0].split(", ")]
    assert {code.name for code in remote.CODES.values()} <= set(listed)
    assert len(set(listed)) == len(listed)
    assert f"at most {stream.LONGEST} characters" in section("Refusals")
    patience = inspect.signature(uplink.RemoteLink).parameters["patience"].default
    assert remote.patience(WireRecipe().keepalive) == patience == remote.patience(1.0) * 2.5
    assert f"tries for {remote.SILENCE + 3} times `wire.keepalive`, at least {remote.patience(1.0):g} s" in PAGE
    assert f"then ends ({patience:g} s by default) |" in PAGE


def test_limits_and_times_are_those_stated() -> None:
    first, longest = (inspect.signature(stream.backoff).parameters[name].default for name in ("first", "longest"))
    hello = sessions.HELLO_LIMITS
    for fact in (
        f"`/{remote.SERVICE}/{remote.METHOD}`",
        f'services `""` and `{remote.SERVICE}`',
        f"is one frame (below), at most {frames.FRAME_BYTES:,} bytes",
        f"| a frame | {frames.FRAME_BYTES:,} |",
        f"| the JSON | {frames.VALUES_BYTES:,}; of a hello {hello.values_bytes:,} |",
        f"as many as {bounds.STATES} x adapter tensors + {bounds.OF_MICRO_BATCH} |",
        f"at most {remote.STREAMS_A_CONNECTION} on one connection; of one certificate {remote.CALLS_A_NAME} calls",
        f"4 for each child and {2 * server.SPARE_STREAMS} more",
        f"that TCP has sent and nobody confirms for {remote.UNCONFIRMED} times as long",
        f"unanswered for {remote.SILENCE} times as long",
        f"lets {remote.WINDOW_BYTES:,} bytes be under way",
        f"| handshake | of TCP and TLS within {remote.HANDSHAKE_SECONDS:g} s |",
        f"the question within {remote.HEALTH_SECONDS:g} s",
        f"a hello, within {sessions.HELLO_SECONDS:g} seconds, with at most {hello.values_bytes:,} bytes of JSON",
        f"which the child awaits for {uplink.HANDSHAKE_SECONDS:g} seconds",
        f"after {first:g} s, doubling to {longest:g} s",
        f"Servers stay {server.LINGER_SECONDS:g} seconds",
        f"| `protocol` | {frames.VERSION} |",
        "4 `room` + 16 answers",
    ):
        assert fact in PROSE, fact
    assert hello.payload_bytes == 0 and "and no payload" in PROSE


def test_a_session_keeps_as_many_answers_as_stated() -> None:
    room = 5
    assert sessions.Session("client-0", "incarnation", room, Coding()).most == 4 * room + 16
