"""What travels between an edge's process and an engine of rounds on the same machine: a small JSON and safetensors.

No torch here: an engine may start a process for every round, and torch takes seconds to load. One connection is one
call; values and outcomes have the names of `rounds.py`.

| call | answer |
|---|---|
| `{"call": "take"}` | `{"step", "weight", "last", "rules", "bfloat16"}` and a value, when due; or `{"over": true}` |
| `{"call": "give", "step", "bfloat16"}` and the outcome | `{}` |
| `{"call": "end", "why"}` | `{}`: the edge is told that there is no outcome, and why |

A call that fails is answered with {"error": text}. NumPy has no bfloat16: such tensors travel as uint16, and "bfloat16"
names them. A frame is the length of the JSON (4 bytes), that of the tensors (8 bytes), big-endian, and both.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from splitllm.errors import PeerError
from splitllm.recipe.addresses import place_here

LENGTHS = struct.Struct(">IQ")
VALUES_BYTES = 1 << 20
TENSORS_BYTES = 1 << 32
AGAIN_SECONDS = 0.2


@dataclass(frozen=True)
class Parcel:
    """One frame.

    Attributes:
        values: plain JSON.
        tensors: a safetensors file; empty: none.
    """

    values: dict[str, Any]
    tensors: bytes = b""

    def packed(self) -> bytes:
        """The frame."""
        text = json.dumps(self.values, allow_nan=False).encode()
        return LENGTHS.pack(len(text), len(self.tensors)) + text + self.tensors


def lengths(head: bytes) -> tuple[int, int]:
    """Of the JSON and of the tensors, from the first bytes of a frame.

    Raises:
        PeerError: no frame is that long.
    """
    text, tensors = LENGTHS.unpack(head)
    if text > VALUES_BYTES or tensors > TENSORS_BYTES:
        raise PeerError(f"a frame of {text} and {tensors} bytes; expected at most {VALUES_BYTES} and {TENSORS_BYTES}")
    return text, tensors


def parsed(text: bytes, tensors: bytes) -> Parcel:
    """A frame that was read.

    Raises:
        PeerError: the JSON is not one, or not an object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PeerError("a frame's JSON cannot be read; is this a splitllm role's address for rounds?") from error
    if not isinstance(values, dict):
        raise PeerError(f"a frame's JSON is a {type(values).__name__}; expected an object")
    return Parcel(values, tensors)


def place(address: str) -> str | tuple[str, int]:
    """Where an address is: the path of a Unix socket, or host and port.

    Args:
        address: `unix:PATH` or `127.0.0.1:PORT`.

    Raises:
        PeerError: it is neither; adapters in the clear do not leave the machine.
    """
    try:
        return place_here(address)
    except ValueError as error:
        raise PeerError(f"address {address!r} is not on this machine; use unix:PATH or 127.0.0.1:PORT") from error


def take(address: str, patience: float) -> Parcel:
    """What the edge has trained, as soon as its round is due; the same again until the outcome is given.

    Args:
        address: of the edge's `Exchange`.
        patience: seconds to wait for an edge that cannot be reached, or has gone away meanwhile.

    Returns:
        `step`, `weight`, `last`, `rules`, `bfloat16` and the value; or `over`.

    Raises:
        PeerError: the edge refused, or cannot be reached.
    """
    return _called(address, Parcel({"call": "take"}), patience)


def give(address: str, step: int, bfloat16: list[str], tensors: bytes, patience: float) -> None:
    """Hand the edge the outcome of a step's round, with which it goes on; once more does no harm.

    Args:
        address: of the edge's `Exchange`.
        step: for which it was taken.
        bfloat16: names of the tensors that are views of bfloat16.
        tensors: a safetensors file.
        patience: as that of `take`.

    Raises:
        PeerError: the edge refused, or cannot be reached.
    """
    _called(address, Parcel({"call": "give", "step": step, "bfloat16": bfloat16}, tensors), patience)


def end(address: str, why: str, patience: float) -> None:
    """Tell the edge that its rounds cannot go on.

    Args:
        address: of the edge's `Exchange`.
        why: one line.
        patience: as that of `take`.

    Raises:
        PeerError: the edge refused, or cannot be reached.
    """
    _called(address, Parcel({"call": "end", "why": why}), patience)


def _called(address: str, question: Parcel, patience: float) -> Parcel:
    deadline = time.monotonic() + patience
    while True:
        try:
            answer = _asked(place(address), question)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerError(f"no edge at {address} ({error}); start it, or correct the address") from error
        time.sleep(AGAIN_SECONDS)
    if "error" in answer.values:
        raise PeerError(f"the edge at {address} refused: {answer.values['error']}")
    return answer


def _asked(where: str | tuple[str, int], question: Parcel) -> Parcel:
    """One call; how long the edge takes to answer is its own affair."""
    kind = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET6 if ":" in where[0] else socket.AF_INET
    with socket.socket(kind, socket.SOCK_STREAM) as connection:
        connection.connect(where)
        connection.sendall(question.packed())
        with connection.makefile("rb") as stream:
            text, tensors = lengths(_exactly(stream.read(LENGTHS.size), LENGTHS.size))
            return parsed(_exactly(stream.read(text), text), _exactly(stream.read(tensors), tensors))


def _exactly(found: bytes, size: int) -> bytes:
    if len(found) < size:
        raise ConnectionResetError("the edge ended the connection")
    return found
