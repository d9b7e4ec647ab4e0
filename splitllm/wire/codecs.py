"""Codecs: how a tensor becomes the bytes that travel, and back.

| name | bytes for [T, D] | what is lost |
|---|---|---|
| none | as in memory | nothing |
| bf16, fp16 | 2 T D | mantissa; what is beyond the range saturates |
| int8 | T (D + 4 + 2 M) + 2 M, M = ceil(D / 128) | rounding to 1/127 of the token's largest value |
| int4 | T (ceil(D / 2) + 2 + ceil(D / 32) + 2 M) + 2 M, M = ceil(D / 256) | dithered, to 1/8 of the largest of 32 |
| topk:F | 4 T ceil(F D) | all but the F D largest entries of each token |

The M outlier channels, those of largest magnitude in the tensor, travel in bf16. Above 65,536 channels their numbers
take 4 bytes instead of 2. The same values give the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial

import torch
from torch import Tensor

from splitllm.errors import DivergedError, PeerError
from splitllm.wire import quantizers as q

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
_MOST_ELEMENTS = 1 << 40
_TOPK = re.compile(r"topk:(0\.\d{1,6}|1|1\.0)", re.ASCII)


@dataclass(frozen=True)
class Codec:
    """One way to write a tensor as bytes.

    Attributes:
        name: as recipes and messages have it.
        size: (shape, dtype) -> bytes, exactly.
        encode: contiguous, finite tensor on the CPU -> that many bytes, a uint8 tensor.
        decode: (bytes, shape, dtype) -> tensor; PeerError where the bytes cannot have been encoded.
        feedback: training adds what this codec lost to the next values of the same row.
    """

    name: str
    size: Callable[[Sequence[int], torch.dtype], int]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Sequence[int], torch.dtype], Tensor]
    feedback: bool = False

    @property
    def lossy(self) -> bool:
        """Whether it takes 2-D tensors of floats only."""
        return self.name != "none"


@dataclass(frozen=True)
class Packed:
    """A tensor as it travels.

    Attributes:
        codec: its name.
        dtype, shape: of the tensor.
        blob: the bytes, uint8 [size], on the CPU.
    """

    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blob: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.blob.numel()


def pack(tensor: Tensor, codec_name: str, name: str = "a tensor") -> Packed:
    """Encode a tensor; `none` copies nothing that is contiguous and on the CPU.

    Raises:
        PeerError: there is no such codec.
        DivergedError: a value is not finite; `name` says of what.
    """
    chosen = codec(codec_name)
    assert tensor.dtype in DTYPES, f"{name}: {tensor.dtype} does not travel"
    assert not chosen.lossy or _is_matrix(tensor.shape, tensor.dtype), f"{name}: {codec_name} is for 2-D floats"
    values = tensor.detach().cpu().contiguous()
    check_finite(values, name)
    return Packed(codec_name, tensor.dtype, tuple(tensor.shape), chosen.encode(values))


def unpack(packed: Packed, name: str = "a tensor") -> Tensor:
    """Decode a tensor; `none` gives a view of the blob.

    Raises:
        PeerError: codec, dtype, shape or number of bytes do not fit together, or a value is not finite; `name` says of
            what.
    """
    try:
        _check_declared(packed)
        values = codec(packed.codec).decode(packed.blob, packed.shape, packed.dtype)
        if not math.isfinite(peak := _peak(values)):
            raise PeerError(f"a value is {peak}")
    except PeerError as error:
        raise PeerError(f"{name} {_described(packed)}: {error}") from None
    return values


def check_finite(values: Tensor, name: str) -> None:
    """Raise DivergedError if a float among the values, called `name`, is not finite."""
    if not math.isfinite(peak := _peak(values)):
        raise DivergedError(f"{name}: a value is {peak}; lower the learning rate")


def codec(name: str) -> Codec:
    """The codec of this name.

    Raises:
        PeerError: there is none.
    """
    return CODECS[name] if name in CODECS else _topk(name)


def _half(name: str, to: torch.dtype) -> Codec:
    return _lossy(name, lambda tokens, width: [(to, (tokens, width))], partial(q.half_encode, to=to), _only)


def _only(parts: list[Tensor], _: int) -> Tensor:
    return parts[0]


@lru_cache(maxsize=64)
def _topk(name: str) -> Codec:
    found = _TOPK.fullmatch(name)
    if found is None or not (fraction := Fraction(found[1])):
        names = ", ".join([*CODECS, "topk:FRACTION"])
        raise PeerError(f"codec: unknown {name[:40]!r}; choose one of {names}, with 0 < FRACTION <= 1")
    parts, encode = partial(q.topk_parts, fraction=fraction), partial(q.topk_encode, fraction=fraction)
    return _lossy(name, parts, encode, q.topk_decode, feedback=True)


def _lossy(
    name: str,
    parts: Callable[[int, int], list[q.Part]],
    encode: Callable[[Tensor], list[Tensor]],
    decode: Callable[[list[Tensor], int], Tensor],
    *,
    feedback: bool = False,
) -> Codec:
    """A codec of 2-D floats, whose blob is its parts one after another; nothing becomes no bytes."""

    def size(shape: Sequence[int], _: torch.dtype) -> int:
        tokens, width = shape
        return sum(dtype.itemsize * math.prod(part) for dtype, part in parts(tokens, width)) if tokens * width else 0

    def write(values: Tensor) -> Tensor:
        if not values.numel():
            return torch.empty(0, dtype=torch.uint8)
        return torch.cat([part.reshape(-1).view(torch.uint8) for part in encode(values)])

    def read(blob: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tokens, width = shape
        if not tokens * width:
            return torch.empty(tuple(shape), dtype=dtype)
        found, start = [], 0
        for kind, part in parts(tokens, width):
            stop = start + kind.itemsize * math.prod(part)
            found.append(blob[start:stop].view(kind).view(part))
            start = stop
        return decode(found, width).to(dtype)

    return Codec(name, size, write, read, feedback)


def _plain_size(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _plain_decode(blob: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool and blob.numel() and int(blob.max()) > 1:
        raise PeerError(f"a bool is {int(blob.max())}, which is neither 0 nor 1")
    return blob.view(dtype).view(tuple(shape)) if blob.numel() else torch.empty(tuple(shape), dtype=dtype)


CODECS: dict[str, Codec] = {
    "none": Codec("none", _plain_size, lambda values: values.reshape(-1).view(torch.uint8), _plain_decode),
    "bf16": _half("bf16", torch.bfloat16),
    "fp16": _half("fp16", torch.float16),
    "int8": _lossy("int8", q.int8_parts, q.int8_encode, q.int8_decode),
    "int4": _lossy("int4", q.int4_parts, q.int4_encode, q.int4_decode, feedback=True),
}


def _peak(values: Tensor) -> float:
    """The largest magnitude of floats, NaN where there is one; 0 of anything else."""
    if not values.is_floating_point() or not values.numel():
        return 0.0
    low, high = torch.aminmax(values)
    return float(torch.maximum(-low, high))


def _is_matrix(shape: Sequence[int], dtype: torch.dtype) -> bool:
    return len(shape) == 2 and dtype.is_floating_point


def _check_declared(packed: Packed) -> None:
    """What the header says must be possible, and the blob of the size that follows from it."""
    chosen, shape, dtype = codec(packed.codec), packed.shape, packed.dtype
    if dtype not in DTYPES:
        raise PeerError("this dtype does not travel")
    if any(extent < 0 for extent in shape) or math.prod(max(extent, 1) for extent in shape) > _MOST_ELEMENTS:
        raise PeerError("no tensor has this shape")
    if chosen.lossy and not _is_matrix(shape, dtype):
        raise PeerError("this codec is for 2-D floats")
    if packed.nbytes != (size := chosen.size(shape, dtype)):
        raise PeerError(f"{packed.nbytes} bytes, but it takes {size}")


def _described(packed: Packed) -> str:
    return f"({packed.codec}, {str(packed.dtype).removeprefix('torch.')} {list(packed.shape)})"
