"""Frames that no peer should send: made from the recorded ones in `corpus/`, each the same for the same seed."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from splitllm.wire.frames import ALIGNMENT, HEADER, MAGIC, VERSION, FrameType, aligned

CORPUS = Path(__file__).parent / "corpus"
Mutator = Callable[[Random, bytes], list[bytes]]
EDGES = (0, 1, 2, 31, 32, 63, 64, 255, 256, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40)
WIDE = (*EDGES, (1 << 53) - 1, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
FIELDS = {0: "<I", 4: "<B", 5: "<B", 6: "<H", 8: "<Q", 16: "<I", 20: "<I", 24: "<Q"}
CODECS = (
    "none",
    "bf16",
    "fp16",
    "int8",
    "int4",
    "topk:0.1",
    "topk:1",
    "topk:0",
    "topk:0.000001",
    "topk:9",
    "pickle",
    "",
)
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool", "object", "complex64")
DIMS = (0, 1, 2, 3, 16, 17, 63, 64, 65537, 1 << 20, 1 << 31, 1 << 40, (1 << 40) + 1, 1 << 63, -1)
NUMBERS = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e300, 1e-320, -0.0)
DEEP = json.loads("[" * 70 + "]" * 70)
LEAVES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 64, 0.5, 1e308, "", "x", "-1", "1", "\0",
    "\u2028", "w" * 400, "client-0", "cloud", "../../x", [], {}, [[]], [0] * 300, {"0": [1]}, {"x": {}}, DEEP,
)  # fmt: skip
TEXTS = (b"NaN", b"Infinity", b"1e999", b"9" * 30, b'"\\ud800"', b"\xff\xfe", b"[" * 500, b'{"a":1,"a":2}', b"\0", b"")


def corpus() -> dict[str, bytes]:
    """The recorded frames by name; each is a whole envelope."""
    return {path.stem: path.read_bytes() for path in sorted(CORPUS.glob("*.bin"))}


def opened(frame: bytes) -> tuple[int, int, dict[str, Any], bytes]:
    """Type, number, JSON and payload of a valid frame."""
    _, _, kind, _, number, _, size, _ = HEADER.unpack_from(frame)
    return kind, number, json.loads(frame[HEADER.size : HEADER.size + size]), frame[aligned(HEADER.size + size) :]


def framed(kind: int, number: int, text: bytes, payload: bytes, size: int | None = None) -> bytes:
    """A frame with a right header, but for the payload's size where another is given."""
    header = HEADER.pack(MAGIC, VERSION, kind, 0, number, 0, len(text), len(payload) if size is None else size)
    return header + text.ljust(aligned(HEADER.size + len(text)) - HEADER.size, b"\0") + payload


def content(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


def changed(frame: bytes, number: int | None = None, **values: Any) -> bytes:
    """The same with another number and other values."""
    kind, old, said, payload = opened(frame)
    said["values"].update(values)
    return framed(kind, old if number is None else number, content(said), payload)


def mutated(rng: Random, frame: bytes) -> list[bytes]:
    """One to a few frames with a defect; now and then the defect is none."""
    return rng.choice(MUTATORS)(rng, frame)


def _flip(rng: Random, frame: bytes) -> list[bytes]:
    found = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        reach = len(found) if rng.random() < 0.5 else min(len(found), 256)
        found[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return [bytes(found)]


def _truncate(rng: Random, frame: bytes) -> list[bytes]:
    return [frame[: rng.choice((rng.randrange(len(frame)), rng.randrange(min(len(frame), 64)), len(frame) - 1))]]


def _extend(rng: Random, frame: bytes) -> list[bytes]:
    more = rng.choice((1, 31, 64, 65, 4096))
    return [frame + (bytes(more) if rng.random() < 0.5 else rng.randbytes(more))]


def _field(rng: Random, frame: bytes) -> list[bytes]:
    found, offset = bytearray(frame), rng.choice(list(FIELDS))
    largest = (1 << (8 * struct.calcsize(FIELDS[offset]))) - 1
    struct.pack_into(FIELDS[offset], found, offset, rng.choice([wide for wide in WIDE if wide <= largest]))
    return [bytes(found)]


def _text(rng: Random, frame: bytes) -> list[bytes]:
    """JSON that is none, under a right header."""
    kind, number, said, payload = opened(frame)
    text = content(said)
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice((rng.choice(TEXTS), rng.randbytes(2))) + text[at + rng.choice((0, 0, 1, 5)) :]
    return [framed(kind, number, text, payload)]


def _leaf(rng: Random, frame: bytes) -> list[bytes]:
    """A plain value replaced, dropped or added somewhere."""
    kind, number, said, payload = opened(frame)
    for _ in range(rng.choice((1, 1, 2))):
        _put(rng, said["values"] if rng.random() < 0.9 and isinstance(said.get("values"), dict) else said)
    return [framed(kind, number, content(said), payload)]


def _put(rng: Random, place: Any) -> None:
    while True:
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if rng.random() < 0.15:
            del place[key]
        else:
            place[key] = deepcopy(rng.choice(LEAVES))
        return
    if isinstance(place, dict):
        place[rng.choice(("0", "x", "values", "client-0"))] = deepcopy(rng.choice(LEAVES))
    elif isinstance(place, list):
        place.append(deepcopy(rng.choice(LEAVES)))


def _kind(rng: Random, frame: bytes) -> list[bytes]:
    kinds = ("join", "share", "open", "forward", "backward", "close", "evaluated", "finish", "diverged", "exec", "")
    kind, number, said, payload = opened(frame)
    said["values"]["kind"] = rng.choice(kinds)
    return [framed(kind, number, content(said), payload)]


def _place(rng: Random, frame: bytes) -> list[bytes]:
    """Another step, client, micro-batch, generation, and other answers that arrived."""
    places = (-2, -1, 0, 1, 2, 7, 63, 64, 1 << 31, (1 << 53) - 1)
    values: dict[str, Any] = {"micro_batch": [rng.choice(places) for _ in range(3)]}
    if rng.random() < 0.3:
        values["generation"] = rng.choice(places)
    if rng.random() < 0.3:
        values["received"] = [rng.choice(WIDE) for _ in range(rng.choice((1, 3, 5000)))]
    return [changed(frame, rng.choice(WIDE[:-2]), **values)]


def _table(rng: Random, frame: bytes) -> list[bytes]:
    """A hostile tensor table, with the old payload, one that fits, or none."""
    kind, number, said, payload = opened(frame)
    table = said["tensors"] = said["tensors"] or [["hidden_TD", "none", "float32", [2, 16]]]
    line = rng.choice(table)
    for column in rng.sample(range(4), rng.choice((1, 1, 2, 3))):
        line[column] = _cell(rng, column)
    if rng.random() < 0.1:
        table.extend([list(line)] * rng.choice((1, 100, 5000)))
    size = rng.choice((None, None, 0, 64, aligned(_bytes(line)), 1 << 40, 1 << 62, (1 << 63) - 64, 1 << 63))
    if rng.random() < 0.3 and size is not None and size <= 1 << 16:
        payload = rng.randbytes(size)
    return [framed(kind, number, content(said), payload, size)]


def _cell(rng: Random, column: int) -> Any:
    if rng.random() < 0.1:
        return deepcopy(rng.choice(LEAVES))
    if column == 0:
        return rng.choice(("hidden_TD", "targets_N", "gradient_ND", "position_ids_BS", "x", "a/b", "w" * 301, "\n"))
    if column == 3:
        return [rng.choice(DIMS) for _ in range(rng.choice((0, 1, 2, 2, 2, 3, 8, 9)))]
    return rng.choice(CODECS if column == 1 else DTYPES)


def _bytes(line: list[Any]) -> int:
    try:
        return min(math.prod(line[3]) * 4, 1 << 62) if line[3] and min(line[3]) >= 0 else 0
    except TypeError:
        return 0


def _payload(rng: Random, frame: bytes) -> list[bytes]:
    """NaN, infinities, huge values, or anything, where the numbers are."""
    kind, number, said, payload = opened(frame)
    if not payload:
        return [framed(kind, number, content(said), rng.randbytes(ALIGNMENT))]
    found = bytearray(payload)
    for _ in range(rng.choice((1, 4, 64))):
        at = rng.randrange(0, len(found) - 8) & ~7
        wanted = rng.choice(NUMBERS)
        if rng.random() < 0.5:
            struct.pack_into("<d", found, at, wanted)
        elif abs(wanted) < 4e38 or not math.isfinite(wanted):
            struct.pack_into("<f", found, at, wanted)
        else:
            found[at : at + 8] = rng.randbytes(8)
    return [framed(kind, number, content(said), bytes(found))]


def _parts(rng: Random, frame: bytes) -> list[bytes]:
    """The envelope in several parts: out of order, doubled, missing, or between those of another."""
    kind, number, said, payload = opened(frame)
    text, first = content(said), b""
    first = framed(kind, number, text, b"", len(payload))
    parts, size = [first], rng.choice((1, 64, 100, 1000))
    for part, at in enumerate(range(0, min(len(payload), 8 * size), size), 1):
        head = HEADER.pack(MAGIC, VERSION, kind, 0, number, part, 0, len(payload))
        parts.append(head + payload[at : at + size])
    trouble = rng.randrange(5)
    if trouble == 0:
        rng.shuffle(parts)
    elif trouble == 1:
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(parts))
    elif trouble == 2:
        del parts[rng.randrange(len(parts))]
    elif trouble == 3:
        parts.insert(rng.randrange(len(parts) + 1), framed(FrameType.GOODBYE, 0, b'{"values":{},"tensors":[]}', b""))
    return parts or [b""]


def _noise(rng: Random, frame: bytes) -> list[bytes]:
    size = rng.choice((0, 1, 31, 32, 33, 1000))
    return [rng.randbytes(size) if rng.random() < 0.5 else frame[: HEADER.size] + rng.randbytes(size)]


def _huge(rng: Random, frame: bytes) -> list[bytes]:
    """A table and a header that agree on a payload which nobody has memory for."""
    kind, number, said, _ = opened(frame)
    rows = rng.choice((1 << 20, 1 << 30, 1 << 40))
    said["tensors"] = [["hidden_TD", rng.choice(("none", "int8", "topk:0.1", "topk:0.000001")), "float32", [rows, 16]]]
    sizes: Mapping[str, int] = {"none": rows * 64, "int8": rows * 22 + 2, "topk:0.1": rows * 8}
    size = aligned(sizes.get(said["tensors"][0][1], rows * 4))
    return [framed(kind, number, content(said), rng.randbytes(64), size)]


MUTATORS: tuple[Mutator, ...] = (
    _flip, _truncate, _extend, _field, _text, _leaf, _leaf, _kind, _place, _table, _table, _payload, _parts, _noise,
    _huge,
)  # fmt: skip
