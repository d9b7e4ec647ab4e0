"""Envelopes survive the wire bit for bit; whatever else arrives is refused with one line and takes no memory."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from splitllm.errors import PeerError
from splitllm.wire.assembling import Assembler, Limits
from splitllm.wire.codecs import Packed, codec
from splitllm.wire.contents import DTYPES, LEVELS
from splitllm.wire.frames import (
    FRAME_BYTES,
    HEADER,
    UNNUMBERED,
    VALUES_BYTES,
    Envelope,
    FrameType,
    aligned,
    frames_bytes,
    to_frames,
)

SMALL = 1024
LIMITS = Limits(values_bytes=4096, payload_bytes=1 << 16, tensors=8)


def packed(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, codec_name: str = "none") -> Packed:
    size = codec(codec_name).size(shape, dtype)
    blob = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    return Packed(codec_name, dtype, shape, blob)


def request(*shapes: tuple[int, ...], number: int = 7, **values: Any) -> Envelope:
    return Envelope(FrameType.REQUEST, number, values, {f"t{i}": packed(shape) for i, shape in enumerate(shapes)})


def received(frames: list[bytes], frame_bytes: int = FRAME_BYTES, limits: Limits = LIMITS) -> Envelope:
    assembler = Assembler(limits, frame_bytes)
    *early, last = (assembler.add(frame) for frame in frames)
    assert all(result is None for result in early) and last is not None
    return last


def same(one: Envelope, other: Envelope) -> bool:
    plain = (one.type, one.number, one.values, list(one.tensors)) == (
        other.type,
        other.number,
        other.values,
        list(other.tensors),
    )
    pairs = [(one.tensors[name], other.tensors[name]) for name in one.tensors] if plain else []
    return plain and all(
        (a.codec, a.dtype, a.shape) == (b.codec, b.dtype, b.shape) and torch.equal(a.blob, b.blob) for a, b in pairs
    )


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
VALUES = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), PLAIN, max_size=3)
ANY = st.builds(packed, st.lists(st.integers(0, 9), max_size=4).map(tuple), st.sampled_from(list(DTYPES.values())))
LOSSY = st.builds(
    packed,
    st.tuples(st.integers(0, 20), st.integers(1, 40)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["bf16", "fp16", "int8", "int4", "topk:0.25"]),
)
NAMES = st.text("abc.é漢 ", min_size=1, max_size=20)


@st.composite
def envelopes(draw: st.DrawFn) -> Envelope:
    kind = draw(st.sampled_from(FrameType))
    number = 0 if kind in UNNUMBERED else draw(st.integers(0, (1 << 63) - 1))
    return Envelope(kind, number, draw(VALUES), draw(st.dictionaries(NAMES, ANY | LOSSY, max_size=5)))


@given(envelopes(), st.sampled_from([4096, 5003, FRAME_BYTES]))
def test_what_arrives_is_what_was_sent_in_frames_of_any_size(envelope: Envelope, frame_bytes: int) -> None:
    frames = to_frames(envelope, frame_bytes)
    assert max(map(len, frames)) <= frame_bytes
    assert sum(map(len, frames)) == frames_bytes(envelope, frame_bytes)
    assert same(received(frames, frame_bytes, Limits()), envelope)


@pytest.mark.parametrize("size", range(0, 4 * SMALL, 61))
def test_sizes_around_the_borders_of_frames_arrive(size: int) -> None:
    envelope = Envelope(FrameType.REPLY, 1, {}, {"x": packed((size,), torch.uint8), "y": packed((3,))})
    frames = to_frames(envelope, SMALL)
    assert sum(map(len, frames)) == frames_bytes(envelope, SMALL)
    assert all(len(frame) == SMALL for frame in frames[:-1])
    assert same(received(frames, SMALL), envelope)


@pytest.mark.parametrize(("frame_bytes", "room"), [(1024, 992), (1031, 992), (1087, 992), (1088, 1056)])
def test_json_may_fill_part_0_to_its_last_byte(frame_bytes: int, room: int) -> None:
    bare = Envelope(FrameType.REPLY, 1, {"x": ""}, {"t": packed((300,))})
    fixed = HEADER.unpack_from(to_frames(bare)[0])[6]
    full = Envelope(bare.type, bare.number, {"x": "x" * (room - fixed)}, bare.tensors)
    frames = to_frames(full, frame_bytes)
    assert len(frames[0]) == frame_bytes and len(frames) == 3
    assert sum(map(len, frames)) == frames_bytes(full, frame_bytes)
    assert same(received(frames, frame_bytes), full)
    with pytest.raises(PeerError, match=f"{room + 1:,} bytes of values and tensor table; at most {room:,} fit"):
        to_frames(Envelope(bare.type, bare.number, {"x": "x" * (room + 1 - fixed)}, bare.tensors), frame_bytes)


def test_the_layout_is_the_documented_one() -> None:
    frames = to_frames(request((3,), (2,), number=5, a=1), SMALL)
    text = b'{"values": {"a": 1}, "tensors": [["t0", "none", "float32", [3]], ["t1", "none", "float32", [2]]]}'
    assert len(frames) == 1
    assert frames[0][:32] == struct.pack("<4sBBHQIIQ", b"SPLT", 1, 3, 0, 5, 0, len(text), 128)
    assert frames[0][32 : 32 + len(text)] == text
    start = aligned(32 + len(text))
    blobs = [bytes(packed(shape).blob.numpy()).ljust(64, b"\0") for shape in ((3,), (2,))]
    assert frames[0][32 + len(text) :] == bytes(start - 32 - len(text)) + b"".join(blobs)


def test_a_stream_carries_one_envelope_after_another_in_any_kind_of_bytes() -> None:
    assembler = Assembler(LIMITS, SMALL)
    sent = [request((300,), (0, 5), number=number) for number in range(3)]
    arrived = [
        assembler.add(kind(frame))
        for kind, envelope in zip((bytes, bytearray, memoryview), sent, strict=True)
        for frame in to_frames(envelope, SMALL)
    ]
    assert all(same(a, b) for a, b in zip([a for a in arrived if a is not None], sent, strict=True))


@pytest.mark.parametrize("frame_bytes", [SMALL, FRAME_BYTES])
def test_received_blobs_are_aligned_and_their_own(frame_bytes: int) -> None:
    frames = [bytearray(frame) for frame in to_frames(request((1,), (17, 3), (500,), (5, 1)), frame_bytes)]
    envelope = received([bytes(frame) for frame in frames], frame_bytes)
    assert all(tensor.blob.data_ptr() % 64 == 0 for tensor in envelope.tensors.values())
    assert all(tensor.blob.is_contiguous() and tensor.blob.dim() == 1 for tensor in envelope.tensors.values())


def test_limits_may_depend_on_the_type_and_refuse_one() -> None:
    def limits(kind: FrameType) -> Limits:
        if kind == FrameType.WELCOME:
            raise PeerError("welcome: not here")
        return Limits(payload_bytes=64 if kind == FrameType.REQUEST else 1 << 20)

    reply = Envelope(FrameType.REPLY, 1, {}, {"x": packed((100,))})
    assert Assembler(limits).add(to_frames(reply)[0]) is not None
    with pytest.raises(PeerError, match="found payload_bytes 448; expected at most 64"):
        Assembler(limits).add(to_frames(request((100,)))[0])
    with pytest.raises(PeerError, match="welcome: not here"):
        Assembler(limits).add(to_frames(Envelope(FrameType.WELCOME, 0))[0])


# What a sender refuses to send.


def nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


UNSENDABLE: dict[str, tuple[Any, str]] = {
    "nan": ({"x": float("nan")}, "Out of range float.*send plain finite"),
    "infinity": ({"x": float("inf")}, "Out of range float"),
    "huge integer": ({"x": 1 << 64}, "beyond 64 bits"),
    "integer of 10,000 digits": ({"x": 10**9999}, "JSON"),
    "lone surrogate": ({"x": "\ud800"}, "surrogates"),
    "no JSON": ({"x": object()}, "not JSON serializable"),
    "key no JSON": ({(1, 2): 3}, "keys must be"),
    "deep": ({"x": nested(LEVELS)}, "levels"),
    "bottomless": ({"x": nested(5000)}, "recursion|levels"),
    "large": ({"x": "x" * VALUES_BYTES}, "at most 524,288 fit, send fewer"),
}


@pytest.mark.parametrize("case", UNSENDABLE)
def test_values_that_the_peer_would_refuse_are_not_sent(case: str) -> None:
    values, complaint = UNSENDABLE[case]
    with pytest.raises(PeerError, match=complaint) as caught:
        to_frames(Envelope(FrameType.REQUEST, 1, values))
    assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("envelope", "complaint"),
    [
        (Envelope(FrameType.REQUEST, -1), "its number is -1"),
        (Envelope(FrameType.REQUEST, 1 << 63), "its number is 9223372036854775808"),
        (Envelope(FrameType.HELLO, 1), "use 0 to 0"),
        (
            Envelope(FrameType.REPLY, 1, {}, {"x": Packed("none", torch.complex64, (1,), torch.zeros(1).byte())}),
            "torch.complex64",
        ),
        (
            Envelope(FrameType.REPLY, 1, {}, {"x": Packed("none", torch.uint8, (2,), torch.zeros(1).byte())}),
            r"uint8 \[2\]",
        ),
        (Envelope(FrameType.REPLY, 1, {}, {"x": Packed("none", torch.uint8, (2,), torch.zeros(2))}), r"float32 \[2\]"),
    ],
)
def test_an_envelope_that_cannot_be_is_not_sent(envelope: Envelope, complaint: str) -> None:
    with pytest.raises(PeerError, match=complaint):
        to_frames(envelope)


def test_keys_that_are_numbers_arrive_as_text() -> None:
    assert received(to_frames(request(counts={1: [2, 3]}))).values == {"counts": {"1": [2, 3]}}


# What a receiver refuses.


def assert_one_line(error: PeerError) -> None:
    text = str(error)
    assert text and text.isprintable() and len(text) < 700, text


def altered(frame: bytes, **fields: Any) -> bytes:
    """The frame with these header fields replaced."""
    names = ("magic", "version", "type", "flags", "number", "part", "values_bytes", "payload_bytes")
    header = dict(zip(names, HEADER.unpack_from(frame), strict=True)) | fields
    return HEADER.pack(*header.values()) + frame[HEADER.size :]


def raw(text: bytes, payload: int = 0, declared: int | None = None) -> bytes:
    """Part 0 of a request with this JSON and zeros as payload."""
    header = HEADER.pack(b"SPLT", 1, 3, 0, 7, 0, len(text), payload if declared is None else declared)
    return (header + text).ljust(aligned(32 + len(text)), b"\0") + bytes(payload)


def table(*lines: Any, payload: int = 0) -> bytes:
    return raw(json.dumps({"values": {}, "tensors": lines}).encode(), payload)


def line(name: Any = "x", codec_name: Any = "none", dtype: Any = "float32", shape: Any = (0,)) -> bytes:
    return table([name, codec_name, dtype, shape])


ONE = to_frames(request((3,)))[0]
TWO = to_frames(request((300,)), SMALL)
THREE = to_frames(request((600,)), SMALL)
OTHER = to_frames(request((300,), number=8), SMALL)

DEFECTS: dict[str, tuple[list[bytes], str]] = {
    "empty": ([b""], "found 0 bytes; expected a header of 32"),
    "half a header": ([ONE[:31]], "found 31 bytes"),
    "too long": ([ONE.ljust(SMALL + 1, b"\0")], "found 1025 bytes; expected at most 1024"),
    "magic": ([altered(ONE, magic=b"\0\n\xffX")], "found magic"),
    "version": ([altered(ONE, version=2)], "found protocol version 2; expected 1"),
    "type 0": ([altered(ONE, type=0)], "found type 0; expected 1 to 6"),
    "type 7": ([altered(ONE, type=7)], "found type 7"),
    "flags": ([altered(ONE, flags=256)], "found flags 0x0100; expected none"),
    "number": ([altered(ONE, number=1 << 63)], "found number 9223372036854775808"),
    "numbered hello": ([altered(ONE, type=1)], "found number 7; expected at most 0"),
    "starts in the middle": ([TWO[1]], "found part 1 of request 7; expected part 0"),
    "JSON beyond the limit": ([altered(ONE, values_bytes=4097)], "found values_bytes 4097; expected at most 4096"),
    "payload beyond the limit": ([altered(ONE, payload_bytes=1 << 62)], "expected at most 65536"),
    "JSON longer than the frame": ([altered(ONE, values_bytes=1000)], "expected 1088, which hold its JSON"),
    "cut in its JSON": ([ONE[:40]], "found 40 bytes"),
    "padding": ([ONE.replace(b"}\0", b"}\1")], "expected zeros"),
    "padding of a blob": ([ONE[:-1] + b"\1"], "after its blob; expected zeros"),
    "no JSON": ([altered(ONE[:32].ljust(64, b"\0"), values_bytes=0)], "JSON: Expecting value"),
    "bytes after the end": ([ONE + b"\0"], "found 65 bytes of payload; expected 64 at most"),
    "more than is missing": ([TWO[0], TWO[1] + bytes(64)], "of payload; expected"),
    "payload smaller than the table": ([altered(ONE, payload_bytes=0)], "found payload_bytes 0; expected 64"),
    "payload larger than the table": ([altered(ONE, payload_bytes=128)], "found payload_bytes 128; expected 64"),
    "part left out": ([THREE[0], THREE[2]], "found part 2 of request 7 .*expected part 1 of request 7"),
    "part twice": ([*THREE[:2], THREE[1]], "found part 1 .*expected part 2"),
    "part of another number": ([TWO[0], OTHER[1]], "found part 1 of request 8 .*expected part 1 of request 7"),
    "part of another type": ([TWO[0], altered(TWO[1], type=4)], "found part 1 of reply 7"),
    "part with values": ([TWO[0], altered(TWO[1], values_bytes=1)], r"found part 1 of request 7 \(1 \+"),
    "part of another size": ([TWO[0], altered(TWO[1], payload_bytes=64)], r"\(0 \+ 64 bytes\); expected"),
    "part of no bytes": ([TWO[0], TWO[1][:32]], "found no payload; expected at least one byte"),
    "new envelope within one": ([TWO[0], OTHER[0]], "found part 0 of request 8 .*expected part 1 of request 7"),
    "same envelope again": ([TWO[0], TWO[0]], "found part 0 of request 7"),
    "invalid UTF-8": ([raw(b'{"values": {"a": "\xff"}, "tensors": []}')], "can't decode byte 0xff"),
    "UTF-16": ([raw('{"values": {}, "tensors": []}'.encode("utf-16"))], "can't decode|JSON"),
    "lone surrogate": ([raw(rb'{"values": {"a": "\ud800"}, "tensors": []}')], "surrogates not allowed"),
    "surrogate as key": ([raw(rb'{"values": {"\uDFFF": 1}, "tensors": []}')], "surrogates not allowed"),
    "NaN": ([raw(b'{"values": {"a": NaN}, "tensors": []}')], "found NaN"),
    "infinity": ([raw(b'{"values": {"a": -Infinity}, "tensors": []}')], "found -Infinity"),
    "infinite number": ([raw(b'{"values": {"a": 1e999}, "tensors": []}')], "found '1e999', which is infinite"),
    "integer of 65 bits": ([raw(b'{"values": {"a": 18446744073709551616}, "tensors": []}')], "beyond 64 bits"),
    "huge integer": ([raw(b'{"values": ' + b"9" * 4000)], "integer of 4000 characters"),
    "deep": ([raw(b'{"values": {"a": %s}, "tensors": []}' % (b"[" * 64 + b"]" * 64))], "more than 64 levels"),
    "bottomless": ([raw(b"[" * 4000)], "recursion|levels"),
    "bottomless objects": ([raw(b'{"":' * 1000)], "recursion|levels"),
    "two documents": ([raw(b'{"values": {}, "tensors": []} {}')], "Extra data"),
    "cut JSON": ([raw(b'{"values": {}, "tens')], "JSON: Unterminated string"),
    "no object": ([raw(b"[1, 2]")], r"found \[1, 2\]; expected an object of values and tensors"),
    "another key": ([raw(b'{"values": {}, "tensors": [], "more": 1}')], "expected an object of values and tensors"),
    "a key missing": ([raw(b'{"values": {}}')], "expected an object of values and tensors"),
    "values no object": ([raw(b'{"values": [], "tensors": []}')], r"values: found \[\]; expected an object"),
    "table no list": ([raw(b'{"values": {}, "tensors": {}}')], "tensors: found {}; expected a list"),
    "too many tensors": (
        [table(*[["x", "none", "float32", [0]]] * 9)],
        "found 9 tensors; expected a list of at most 8",
    ),
    "line no list": ([table("x")], "found 'x'; expected .name, codec"),
    "line of three": ([table(["x", "none", "float32"])], "expected .name, codec, dtype, shape"),
    "name no text": ([line(name=1)], "tensor name: found 1; expected"),
    "name empty": ([line(name="")], "tensor name: found ''"),
    "name long": ([line(name="x" * 301)], "tensor name: found 'xxx"),
    "name unprintable": ([line(name="a\nb")], r"found 'a\\nb'; expected"),
    "name twice": ([table(["x", "none", "uint8", [0]], ["x", "none", "uint8", [0]])], "a name occurs twice"),
    "codec unknown": ([line(codec_name="zip", shape=[0, 0])], "zip"),
    "codec no text": ([line(codec_name=None)], "found codec None"),
    "codec unhashable": ([line(codec_name=[])], "found codec"),
    "codec long": ([line(codec_name="topk:0." + "1" * 99, shape=[0, 0])], "found codec 'topk"),
    "dtype unknown": ([line(dtype="complex64")], "found dtype 'complex64'; expected one of float64"),
    "dtype unhashable": ([line(dtype=[])], r"found dtype \[\]"),
    "lossy vector": ([line(codec_name="int8", shape=[5])], r"found int8 of float32 \[5\]; expected codec none"),
    "lossy cube": ([line(codec_name="bf16", shape=[1, 1, 1])], "expected codec none"),
    "lossy integers": ([line(codec_name="int8", dtype="int64", shape=[2, 2])], "found int8 of int64"),
    "shape no list": ([line(shape=3)], "found shape 3; expected a list"),
    "nine dims": ([line(shape=[1] * 9)], "at most 8 dims"),
    "dim true": ([line(shape=[True])], "found dim True; expected an integer"),
    "dim float": ([line(shape=[1.0])], "found dim 1.0"),
    "dim null": ([line(shape=[None])], "found dim None"),
    "dim negative": ([line(shape=[-1])], "found dim -1"),
    "dim large": ([line(shape=[(1 << 40) + 1])], "found dim 1099511627777"),
    "product large": ([line(shape=[1 << 40, 1 << 40])], "expected one that 63 bits can count"),
    "product large beside a zero": ([line(shape=[0, 1 << 40, 1 << 40])], "expected one that 63 bits can count"),
    "size beyond the declared": ([line(shape=[1 << 40])], "found payload_bytes 0; expected 4398046511104"),
}


@pytest.mark.parametrize("case", DEFECTS)
def test_each_defect_is_refused_by_what_was_found(case: str) -> None:
    frames, complaint = DEFECTS[case]
    assembler = Assembler(LIMITS, SMALL if case == "too long" else FRAME_BYTES)
    for frame in frames[:-1]:
        assert assembler.add(frame) is None
    with pytest.raises(PeerError, match=complaint) as caught:
        assembler.add(frames[-1])
    assert_one_line(caught.value)
    with pytest.raises(PeerError, match="this stream was refused"):
        assembler.add(ONE)


def test_the_undamaged_frames_of_the_defects_are_accepted() -> None:
    assert all(
        received(frames) for frames in ([ONE], TWO, THREE, OTHER, [line()], [raw(b'{"values":{},"tensors":[]}')])
    )


# Fuzzing: only PeerError escapes, and no buffer is larger than the limit.


class Memory(TorchFunctionMode):
    """Notes the memory behind every tensor that torch makes meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.sizes.add(result.untyped_storage().nbytes())
        return result


def feed(frames: list[bytes]) -> int:
    """Adds all frames to a fresh assembler; how many envelopes came out before a refusal."""
    assembler, complete = Assembler(LIMITS, SMALL), 0
    for frame in frames:
        try:
            complete += assembler.add(frame) is not None
        except PeerError as error:
            assert_one_line(error)
            return complete
    return complete


def corpus() -> list[list[bytes]]:
    lossy = {"h": packed((20, 16), torch.bfloat16, "int8"), "p": packed((7,), torch.int64)}
    sent = [
        Envelope(FrameType.HELLO, 0, {"name": "client-0", "protocol": 1, "lr": 2e-4}),
        request((3,), (0, 5), lengths=[3, 4], micro_batch=[0, 1, 2]),
        request((300,), (17, 9), number=12),
        Envelope(FrameType.REPLY, 3, {"loss": 1.5, "é": "漢\n"}, lossy),
        Envelope(FrameType.ERROR, 3, {"message": "no"}),
    ]
    return [to_frames(envelope, SMALL) for envelope in sent]


def mutated(frames: list[bytes], rng: random.Random) -> list[bytes]:
    """The frames with one to three faults: bits, bytes, cuts, extensions, copies, swaps, losses, foreign headers."""
    frames = list(frames)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(frames))
        frame = bytearray(frames[place])
        at = rng.choice((rng.randrange(32), rng.randrange(160), rng.randrange(SMALL))) % max(1, len(frame))
        match rng.randrange(8):
            case 0 if frame:
                frame[at] ^= 1 << rng.randrange(8)
            case 1 if frame:
                frame[at] = rng.randrange(256)
            case 2:
                del frame[at:]
            case 3:
                frame[at:at] = rng.randbytes(rng.randint(1, 80))
            case 4:
                frames.insert(rng.randrange(len(frames) + 1), bytes(frame))
            case 5:
                other = rng.randrange(len(frames))
                frames[place], frames[other] = frames[other], bytes(frame)
                continue
            case 6:
                frame[at : at + 8] = rng.choice((b"\xff", b"\0", b"9", b"[", b'"', b"\\ud800")) * 8
            case 7:
                del frame[at : at + rng.randint(1, 64)]
        frames[place] = bytes(frame)
    return frames


def test_of_20000_damaged_streams_none_raises_anything_else() -> None:
    rng, streams = random.Random(0), corpus()
    with Memory() as memory:
        complete = sum(feed(mutated(rng.choice(streams) + rng.choice(streams), rng)) for _ in range(20_000))
    assert 5_000 < complete < 30_000  # some faults hit a payload or come late: both outcomes are exercised
    assert 1_000 < max(memory.sizes) <= LIMITS.payload_bytes


@given(st.binary(max_size=200), st.sampled_from([b"", ONE[:32], ONE[:64], ONE]))
def test_arbitrary_bytes_after_a_good_beginning_raise_nothing_else(tail: bytes, head: bytes) -> None:
    assert feed([head + tail]) in (0, 1)


@given(st.binary(max_size=300) | st.text('[]{}",:0123456789eE+-.\\u dnatrflsvo', max_size=120).map(str.encode))
@settings(max_examples=300)
def test_arbitrary_json_raises_nothing_else(text: bytes) -> None:
    assert feed([raw(text)]) == 0
    assert feed([raw(b'{"values": {}, "tensors": [' + text + b"]}")]) in (0, 1)


LINES = st.lists(
    st.one_of(PLAIN, NAMES, st.sampled_from(["none", "int8", *DTYPES]), st.lists(st.integers())), max_size=6
)


@given(st.lists(LINES, max_size=4), st.integers(0, 4))
def test_arbitrary_tables_raise_nothing_else(lines: list[Any], blocks: int) -> None:
    assert feed([table(*lines, payload=64 * blocks)]) in (0, 1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.sampled_from(["none", "bf16", "int8", "int4", "topk:0.1", "topk:nan", "topk:-1", "topk:"]),
            st.sampled_from(list(DTYPES)),
            st.lists(st.sampled_from([0, 1, 2, 1 << 20, 1 << 40]), max_size=9),
        ),
        max_size=3,
    ),
    st.integers(0, 4),
)
def test_tables_that_are_nearly_right_raise_nothing_else(lines: list[Any], blocks: int) -> None:
    assert feed([table(*lines, payload=64 * blocks)]) in (0, 1)


def test_refused_sizes_take_no_memory() -> None:
    frames = [
        altered(ONE, payload_bytes=1 << 40),
        altered(ONE, values_bytes=(1 << 32) - 1),
        line(shape=[1 << 40]),
        raw(
            json.dumps({"values": {}, "tensors": [["x", "none", "uint8", [1 << 16]]]}).encode(), declared=(1 << 16) + 64
        ),
    ]
    tracemalloc.start()
    try:
        with Memory() as memory:
            for frame in frames:
                with pytest.raises(PeerError):
                    Assembler(LIMITS).add(frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not memory.sizes and peak < 100_000


def test_a_payload_that_no_memory_can_hold_is_a_defect() -> None:
    size = 1 << 50
    text = json.dumps({"values": {}, "tensors": [["x", "none", "uint8", [1 << 40, 1 << 10]]]}).encode()
    with pytest.raises(PeerError, match="no memory for them"):
        Assembler(Limits(payload_bytes=size)).add(raw(text, declared=size))


def test_an_envelope_takes_one_buffer_of_its_declared_size() -> None:
    assembler = Assembler(LIMITS, SMALL)
    with Memory() as memory:
        for frame in THREE:
            assembler.add(frame)
    assert memory.sizes == {aligned(600 * 4)}
