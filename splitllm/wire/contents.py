"""The JSON at the head of an envelope: `{"values": {...}, "tensors": [[name, codec, dtype, [dim, ...]], ...]}`.

It is UTF-8, and stricter than JSON: no NaN or infinity, integers fit into 64 bits, at most 64 levels, no lone
surrogates. What is written is read back by the same rules, so nothing leaves that the peer would refuse. Dictionary
keys become strings.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from splitllm.errors import PeerError
from splitllm.wire import codecs

LEVELS = 64
NAME_CHARACTERS = 300
CODEC_CHARACTERS = 40
DIMS = 8
LARGEST_DIM = 1 << 40

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in codecs.DTYPES}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One line of the tensor table, and the exact bytes of its blob."""

    name: str
    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int


def describe(values: Mapping[str, Any], tensors: Mapping[str, codecs.Packed]) -> bytes:
    """The JSON of an envelope.

    Raises:
        PeerError: the values or a tensor cannot travel, or a blob has not the size that its codec states.
    """
    table = [[name, p.codec, _NAMES.get(p.dtype, str(p.dtype)), list(p.shape)] for name, p in tensors.items()]
    try:
        content = json.dumps({"values": values, "tensors": table}, ensure_ascii=False, allow_nan=False)
        text = content.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise PeerError(f"values: JSON cannot hold them ({_line(error)}); send plain finite values") from error
    for entry in parse(text, len(tensors))[1]:
        blob = tensors[entry.name].blob
        if blob.dtype != torch.uint8 or blob.shape != (entry.size,):
            found = f"{str(blob.dtype).removeprefix('torch.')} {list(blob.shape)}"
            raise PeerError(
                f"tensor {_short(entry.name)}: its blob is {found}; {entry.codec} makes uint8 [{entry.size}]"
            )
    return text


def parse(text: bytes, tensors: int) -> tuple[dict[str, Any], list[Entry]]:
    """The values and the tensor table.

    Args:
        text: the JSON; its length has been checked.
        tensors: how many there may be.

    Raises:
        PeerError: it is not such a JSON, or the table is not one of at most so many tensors that can exist.
    """
    content = _load(text)
    if not isinstance(content, dict) or content.keys() != {"values", "tensors"}:
        raise PeerError(f"JSON: found {_short(content)}; expected an object of values and tensors")
    values, table = content["values"], content["tensors"]
    if not isinstance(values, dict):
        raise PeerError(f"values: found {_short(values)}; expected an object")
    if not isinstance(table, list) or len(table) > tensors:
        found = f"{len(table)} tensors" if isinstance(table, list) else _short(table)
        raise PeerError(f"tensors: found {found}; expected a list of at most {tensors}")
    entries = [_entry(line) for line in table]
    if len({entry.name for entry in entries}) < len(entries):
        raise PeerError("tensors: a name occurs twice; expected each once")
    return values, entries


def _load(text: bytes) -> Any:
    try:
        content = json.loads(
            text.decode(), parse_constant=_constant, parse_int=_integer, parse_float=_finite
        )  # decoded here, because json would also take UTF-16 and 32
        _check_depth(content)
        if b"\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()  # fails at a lone surrogate, which only an escape can make
    except (ValueError, RecursionError) as error:
        raise PeerError(f"JSON: {_line(error)}; expected strict JSON in UTF-8, at most {LEVELS} levels deep") from error
    return content


def _constant(text: str) -> float:
    raise ValueError(f"found {text}")


def _integer(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 64:
        raise ValueError(f"found an integer of {len(text)} characters beyond 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"found {_short(text)}, which is infinite")
    return value


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(LEVELS + 1):
        below = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [child for children in below for child in children]
        if not level:
            return
    raise ValueError(f"more than {LEVELS} levels")


def _entry(line: Any) -> Entry:
    if not isinstance(line, list) or len(line) != 4:
        raise PeerError(f"tensors: found {_short(line)}; expected [name, codec, dtype, shape]")
    name, codec, dtype, shape = line
    if not _is_text(name, NAME_CHARACTERS):
        raise PeerError(f"tensor name: found {_short(name)}; expected 1 to {NAME_CHARACTERS} printable characters")
    try:
        kind, dims = _dtype(dtype), _dims(shape)
        return Entry(name, codec, kind, dims, _size(codec, kind, dims))
    except PeerError as error:
        raise PeerError(f"tensor {_short(name)}: {error}") from None


def _dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise PeerError(f"found dtype {_short(name)}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _dims(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > DIMS:
        raise PeerError(f"found shape {_short(shape)}; expected a list of at most {DIMS} dims")
    for dim in shape:
        if type(dim) is not int or not 0 <= dim <= LARGEST_DIM:  # True is an int too
            raise PeerError(f"found dim {_short(dim)}; expected an integer from 0 to {LARGEST_DIM}")
    return tuple(shape)


def _size(name: Any, dtype: torch.dtype, dims: tuple[int, ...]) -> int:
    """Bytes of the blob: exact, of any codec."""
    if not _is_text(name, CODEC_CHARACTERS):
        raise PeerError(f"found codec {_short(name)}; expected the name of one")
    codec = codecs.codec(name)
    if codec.lossy and not (len(dims) == 2 and dtype.is_floating_point):
        found = f"{name} of {str(dtype).removeprefix('torch.')} {_short(list(dims))}"
        raise PeerError(f"found {found}; expected codec none of all but two-dimensional floating tensors")
    if math.prod(max(dim, 1) for dim in dims) * dtype.itemsize >= 1 << 63:  # an empty tensor has strides too
        raise PeerError(f"found shape {_short(list(dims))}; expected one that 63 bits can count")
    return codec.size(dims, dtype)


def _is_text(value: Any, characters: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= characters and value.isprintable()


def _short(value: Any) -> str:
    return reprlib.repr(value)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
