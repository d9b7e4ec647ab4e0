"""From an envelope to the frames that carry it: the layout of the wire, version 1.

An envelope is one hello, request, reply, ...: plain values and packed tensors. It travels as one frame or several, at
most `FRAME_BYTES` each, one after another and never interleaved with those of another envelope of the same stream. All
integers are little-endian and unsigned. Every frame starts with the same 32 bytes:

| offset | bytes | field | |
|---|---|---|---|
| 0 | 4 | magic | `SPLT` |
| 4 | 1 | version | 1 |
| 5 | 1 | type | 1 hello, 2 welcome, 3 request, 4 reply, 5 error, 6 goodbye |
| 6 | 2 | flags | 0 |
| 8 | 8 | number | of the request, below 2**63; a reply or error has its request's; hello, welcome and goodbye 0 |
| 16 | 4 | part | 0, 1, 2, ... within the envelope |
| 20 | 4 | values_bytes | V, length of the JSON, in part 0; 0 in all others |
| 24 | 8 | payload_bytes | P, length of the whole envelope's payload, the same in every part |

What follows in part 0:

| offset | bytes | |
|---|---|---|
| 32 | V | JSON (`contents.py`): values and the table of tensors; all of it is in part 0, so at most `VALUES_BYTES` |
| 32 + V | 0 to 63 | zeros, up to the next multiple of 64 |
| then | the rest | the payload's first bytes, as many as fit |

What follows in parts 1, 2, ...: the payload's next bytes, at least one, at most what is missing.

The payload, over all parts: the blobs in the order of the table, each followed by 0 to 63 zeros up to the next multiple
of 64. So P is a multiple of 64, and every blob starts at one. An envelope without payload is complete in part 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from splitllm.errors import PeerError
from splitllm.wire.codecs import Packed
from splitllm.wire.contents import describe

MAGIC = b"SPLT"
VERSION = 1
FRAME_BYTES = 1 << 20
VALUES_BYTES = 512 << 10
ALIGNMENT = 64
LARGEST_NUMBER = (1 << 63) - 1
HEADER = struct.Struct("<4sBBHQIIQ")


class FrameType(IntEnum):
    """What an envelope is."""

    HELLO = 1
    WELCOME = 2
    REQUEST = 3
    REPLY = 4
    ERROR = 5
    GOODBYE = 6


UNNUMBERED = frozenset({FrameType.HELLO, FrameType.WELCOME, FrameType.GOODBYE})


@dataclass(frozen=True)
class Envelope:
    """One hello, request, reply, ...

    Attributes:
        type: what it is.
        number: of the request, 0 to 2**63 - 1; a reply or error has its request's; hello, welcome and goodbye have 0.
        values: plain values, as JSON can hold them.
        tensors: packed tensors by name.
    """

    type: FrameType
    number: int
    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Packed] = field(default_factory=dict)


def to_frames(envelope: Envelope, frame_bytes: int = FRAME_BYTES) -> list[bytes]:
    """The frames of an envelope, in the order in which they are sent.

    Args:
        envelope: its blobs are contiguous and in main memory.
        frame_bytes: of one frame, header included, at most.

    Raises:
        PeerError: the values or a tensor cannot travel, or the JSON is too large.
    """
    first, text = _first(envelope, frame_bytes)
    parts: list[list[bytes | memoryview]] = [[first]]
    room = frame_bytes - HEADER.size - len(first)
    for piece in _payload(envelope.tensors):
        while len(piece) > 0:
            if room == 0:
                parts.append([])
                room = frame_bytes - HEADER.size
            parts[-1].append(piece[:room])
            taken = min(room, len(piece))
            piece, room = piece[taken:], room - taken
    size = payload_bytes(envelope.tensors)
    return [b"".join((_header(envelope, part, 0 if part else text, size), *rest)) for part, rest in enumerate(parts)]


def frames_bytes(envelope: Envelope, frame_bytes: int = FRAME_BYTES) -> int:
    """Bytes of all the frames that `to_frames` makes of it, without making them.

    Raises:
        PeerError: as `to_frames`.
    """
    first, _ = _first(envelope, frame_bytes)
    size = payload_bytes(envelope.tensors)
    later = max(0, size - (frame_bytes - HEADER.size - len(first)))
    parts = 1 + -(-later // (frame_bytes - HEADER.size))
    return parts * HEADER.size + len(first) + size


def payload_bytes(tensors: Mapping[str, Packed]) -> int:
    """Bytes of the payload that holds these tensors."""
    return sum(aligned(packed.blob.numel()) for packed in tensors.values())


def aligned(size: int) -> int:
    """The next multiple of 64."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _first(envelope: Envelope, frame_bytes: int) -> tuple[bytes, int]:
    """What lies between header and payload in part 0, and how much of it is the JSON."""
    text = describe(envelope.values, envelope.tensors)
    most = min(VALUES_BYTES, (frame_bytes // ALIGNMENT) * ALIGNMENT - HEADER.size)
    if len(text) > most:
        size = f"{len(text):,} bytes of values and tensor table"
        raise PeerError(f"{envelope.type.name.lower()} {envelope.number}: {size}; at most {most:,} fit, send fewer")
    return text.ljust(aligned(HEADER.size + len(text)) - HEADER.size, b"\0"), len(text)


def _header(envelope: Envelope, part: int, values: int, payload: int) -> bytes:
    largest = 0 if envelope.type in UNNUMBERED else LARGEST_NUMBER
    if not 0 <= envelope.number <= largest:
        raise PeerError(f"{envelope.type.name.lower()}: its number is {envelope.number}; use 0 to {largest}")
    return HEADER.pack(MAGIC, VERSION, envelope.type, 0, envelope.number, part, values, payload)


def _payload(tensors: Mapping[str, Packed]) -> Iterator[memoryview]:
    for packed in tensors.values():
        yield packed.blob.numpy().data
        yield memoryview(bytes(-packed.blob.numel() % ALIGNMENT))
