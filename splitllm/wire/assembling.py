"""From frames to envelopes: what a peer sends is checked before memory is taken for it (layout: `frames.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from splitllm.errors import PeerError
from splitllm.wire.codecs import Packed
from splitllm.wire.contents import Entry, parse
from splitllm.wire.frames import (
    ALIGNMENT,
    FRAME_BYTES,
    HEADER,
    LARGEST_NUMBER,
    MAGIC,
    UNNUMBERED,
    VALUES_BYTES,
    VERSION,
    Envelope,
    FrameType,
    aligned,
)

_ZEROS = bytes(ALIGNMENT)
_TYPES = frozenset(FrameType)


@dataclass(frozen=True)
class Limits:
    """How large an envelope may be.

    Attributes:
        values_bytes: of its JSON.
        payload_bytes: of its tensors, with their alignment.
        tensors: their count.
    """

    values_bytes: int = VALUES_BYTES
    payload_bytes: int = 256 << 20
    tensors: int = 4096


class _Header(NamedTuple):
    type: FrameType
    number: int
    part: int
    values_bytes: int
    payload_bytes: int

    def __str__(self) -> str:
        return f"part {self.part} of {self.type.name.lower()} {self.number}"


class _Partial(NamedTuple):
    """An envelope under way: what part 0 said, and the buffer that its payload fills."""

    header: _Header
    values: dict[str, Any]
    entries: list[Entry]
    buffer: torch.Tensor


class Assembler:
    """Puts the frames of one stream together. After a defect the stream is refused whole: close it.

    Args:
        limits: of every envelope, or of one by its type; such a function may itself refuse a type with a `PeerError`.
        frame_bytes: of one frame at most.
    """

    def __init__(self, limits: Limits | Callable[[FrameType], Limits], frame_bytes: int = FRAME_BYTES) -> None:
        self._limits: Callable[[FrameType], Limits] = (lambda _: limits) if isinstance(limits, Limits) else limits
        self._frame_bytes = frame_bytes
        self._partial: _Partial | None = None
        self._part, self._filled = 0, 0
        self._defect: str | None = None

    def add(self, frame: bytes | bytearray | memoryview) -> Envelope | None:
        """Take the next frame.

        Returns:
            the envelope that it completes, whose blobs start at multiples of 64 bytes; None while parts are to come.

        Raises:
            PeerError: what was found in this frame, or in an earlier one, and what was expected.
        """
        if self._defect is not None:
            raise PeerError(f"this stream was refused: {self._defect}")
        try:
            return self._take(memoryview(frame if isinstance(frame, bytes) else bytes(frame)))
        except PeerError as error:
            self._defect, self._partial = str(error), None
            raise

    def _take(self, frame: memoryview) -> Envelope | None:
        if len(frame) > self._frame_bytes:
            raise PeerError(f"frame: found {len(frame)} bytes; expected at most {self._frame_bytes}")
        header = _read_header(frame)
        if self._partial is None:
            self._partial, start = _begin(header, frame, self._limits(header.type))
            self._part, self._filled = 0, 0
        else:
            start = HEADER.size
            self._check_next(header, self._partial.header, len(frame) - start)
        self._fill(self._partial, frame[start:])
        if self._filled < self._partial.header.payload_bytes:
            return None
        envelope, self._partial = _open(self._partial), None
        return envelope

    def _check_next(self, header: _Header, first: _Header, size: int) -> None:
        expected = first._replace(part=self._part + 1, values_bytes=0)
        if header != expected:
            details = f"found {header} ({header.values_bytes} + {header.payload_bytes} bytes)"
            raise PeerError(f"frame: {details}; expected {expected} (0 + {expected.payload_bytes} bytes)")
        if size == 0:
            raise PeerError(f"{header}: found no payload; expected at least one byte")
        self._part += 1

    def _fill(self, partial: _Partial, piece: memoryview) -> None:
        missing = partial.header.payload_bytes - self._filled
        if len(piece) > missing:
            found = f"found {len(piece)} bytes of payload"
            raise PeerError(
                f"part {self._part} of envelope {partial.header.number}: {found}; expected {missing} at most"
            )
        partial.buffer.numpy().data[self._filled : self._filled + len(piece)] = piece
        self._filled += len(piece)


def _read_header(frame: memoryview) -> _Header:
    if len(frame) < HEADER.size:
        raise PeerError(f"frame: found {len(frame)} bytes; expected a header of {HEADER.size}")
    magic, version, kind, flags, *rest = HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise PeerError(f"frame: found magic {magic!r}; expected {MAGIC!r}")
    if version != VERSION:
        raise PeerError(f"frame: found protocol version {version}; expected {VERSION}, install the same splitllm")
    if kind not in _TYPES:
        raise PeerError(f"frame: found type {kind}; expected {min(FrameType)} to {max(FrameType)}")
    if flags:
        raise PeerError(f"frame: found flags {flags:#06x}; expected none")
    header = _Header(FrameType(kind), *rest)
    largest = 0 if header.type in UNNUMBERED else LARGEST_NUMBER
    if header.number > largest:
        raise PeerError(f"{header}: found number {header.number}; expected at most {largest}")
    return header


def _begin(header: _Header, frame: memoryview, limits: Limits) -> tuple[_Partial, int]:
    """Check part 0, take memory for the payload, and say where in the frame it starts."""
    if header.part != 0:
        raise PeerError(f"frame: found {header}; expected part 0 of an envelope")
    for key in ("values_bytes", "payload_bytes"):
        if getattr(header, key) > getattr(limits, key):
            raise PeerError(f"{header}: found {key} {getattr(header, key)}; expected at most {getattr(limits, key)}")
    end, start = HEADER.size + header.values_bytes, aligned(HEADER.size + header.values_bytes)
    if len(frame) < start:
        raise PeerError(f"{header}: found {len(frame)} bytes; expected {start}, which hold its JSON")
    if frame[end:start] != _ZEROS[: start - end]:
        raise PeerError(f"{header}: found other bytes after its JSON; expected zeros")
    values, entries = parse(bytes(frame[HEADER.size : end]), limits.tensors)
    size = sum(aligned(entry.size) for entry in entries)
    if size != header.payload_bytes:
        raise PeerError(f"{header}: found payload_bytes {header.payload_bytes}; expected {size} for its tensors")
    decoded = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)
    if decoded > limits.payload_bytes:
        raise PeerError(f"{header}: found {decoded} bytes of tensors, decoded; expected {limits.payload_bytes} at most")
    return _Partial(header, values, entries, _buffer(size)), start


def _buffer(size: int) -> torch.Tensor:
    try:
        buffer = torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:  # torch's word for no memory
        raise PeerError(f"payload: found {size} bytes, and no memory for them; expected fewer") from error
    assert buffer.data_ptr() % ALIGNMENT == 0, "torch aligns its memory to 64 bytes"
    return buffer


def _open(partial: _Partial) -> Envelope:
    tensors, start, payload = {}, 0, partial.buffer.numpy().data
    for name, codec, dtype, shape, size in partial.entries:
        end, following = start + size, start + aligned(size)
        if payload[end:following] != _ZEROS[: following - end]:
            raise PeerError(f"tensor {name[:40]!r}: found other bytes after its blob; expected zeros")
        tensors[name] = Packed(codec, dtype, shape, partial.buffer[start:end])
        start = following
    return Envelope(partial.header.type, partial.header.number, partial.values, tensors)
