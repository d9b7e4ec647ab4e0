"""Which codec each tensor of a message gets, the same for every link.

Only activations and their gradients are coded, by direction; all else travels as it is, and so does an evaluation: it
measures the adapter, not the codec. What a codec loses of a gradient is carried on by row, if the codec wants that and
the forward names the rows of the training data that the micro-batch consists of. Activations are not summed over steps
as gradients are: an old error would only be noise on top of the new one.
Suffixes: T real tokens, N labelled positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from splitllm.errors import PeerError
from splitllm.wire.codecs import Packed, codec, pack, unpack
from splitllm.wire.feedback import ErrorMemory
from splitllm.wire.message import Message

UP = ("hidden_TD", "gradient_ND")
DOWN = ("gradient_TD", "rows_ND")
SUMMED = frozenset({"gradient_ND", "gradient_TD"})
"""What is lost of these is made up for the next time."""


@dataclass(frozen=True)
class _Rows:
    """Of what a micro-batch consists: its rows' numbers, and by suffix how many tokens of a tensor belong to each."""

    keys: list[tuple[int, int]]
    lengths: dict[str, list[int]]


class Coding:
    """Codes what one end of a link sends: one at the end that asks, another at the end that answers.

    Args:
        up: codec of requests.
        down: codec of replies.
        feedback_bytes: memory for the errors of the rows that this end sends.

    Raises:
        PeerError: there is no such codec.
    """

    def __init__(self, up: str = "none", down: str = "none", feedback_bytes: int = 256 << 20) -> None:
        self._up, self._down = codec(up), codec(down)
        self._memory = ErrorMemory(feedback_bytes)
        self._rows: dict[tuple[int, int, int], _Rows] = {}

    @property
    def lossy(self) -> bool:
        """Whether anything is changed on the way."""
        return self._up.lossy or self._down.lossy

    def pack_request(self, message: Message) -> dict[str, Packed]:
        """What goes up.

        Raises:
            DivergedError: a value is not finite.
        """
        self.note_request(message)
        return self._pack(message, message, dict.fromkeys(UP, self._up.name))

    def pack_reply(self, request: Message, reply: Message) -> dict[str, Packed]:
        """What comes down as the reply to a request.

        Raises:
            PeerError: the request's rows, lengths and labelled positions do not fit together.
            DivergedError: a value is not finite.
        """
        self.note_request(request)
        packed = self._pack(request, reply, dict.fromkeys(DOWN, self._down.name))
        if request.kind == "backward":
            self._rows.pop(request.micro_batch, None)
        return packed

    def request_bytes(self, message: Message) -> int:
        """Bytes of a request's tensors as they travel."""
        return self._size(message, message, dict.fromkeys(UP, self._up.name))

    def reply_bytes(self, request: Message, reply: Message) -> int:
        """Bytes of the tensors of the reply to a request, as they travel."""
        return self._size(request, reply, dict.fromkeys(DOWN, self._down.name))

    def note_request(self, message: Message) -> None:
        """Remember the rows of a training micro-batch, for what is sent of it later.

        Raises:
            PeerError: its rows, lengths and labelled positions do not fit together.
        """
        feedback = self._up.feedback or self._down.feedback
        if not feedback or message.kind != "forward" or not _trains(message) or "rows" not in message.header:
            return
        for stale in [micro_batch for micro_batch in self._rows if micro_batch[0] < message.step]:
            del self._rows[stale]
        self._rows[message.micro_batch] = _rows_of(message)

    def _pack(self, request: Message, message: Message, codecs: Mapping[str, str]) -> dict[str, Packed]:
        packed, codecs = {}, _used(request, codecs)
        for name, tensor in message.tensors.items():
            chosen, what = codecs.get(name, "none"), f"{name} of {message.sender}"
            carries = name in SUMMED and codec(chosen).feedback
            rows = self._rows.get(request.micro_batch) if carries else None
            packed[name] = (
                pack(tensor, chosen, what) if rows is None else self._carry(name, tensor, request, rows, what)
            )
        return packed

    def _size(self, request: Message, message: Message, codecs: Mapping[str, str]) -> int:
        used, tensors = _used(request, codecs), message.tensors
        return sum(codec(used.get(name, "none")).size(each.shape, each.dtype) for name, each in tensors.items())

    def _carry(self, name: str, tensor: Tensor, request: Message, rows: _Rows, what: str) -> Packed:
        """Pack with what was lost of the same rows before."""
        lengths = rows.lengths[name.rpartition("_")[2]]
        if len(tensor) != sum(lengths):
            raise PeerError(f"{what} has {len(tensor)} rows, not the {sum(lengths)} of {request.micro_batch}'s forward")
        step, _, index = request.micro_batch
        keys = [(name, *key) for key in rows.keys]
        codec_name = self._up.name if name in UP else self._down.name
        return self._memory.encode(codec_name, tensor, keys, lengths, step, index=index, what=what)


def unpack_all(packed: Mapping[str, Packed]) -> dict[str, Tensor]:
    """The tensors of a message that arrived.

    Raises:
        PeerError: one of them is not what it says.
    """
    return {name: unpack(one, name) for name, one in packed.items()}


def _used(request: Message, codecs: Mapping[str, str]) -> Mapping[str, str]:
    """An evaluation measures the adapter, not the codec."""
    return codecs if _trains(request) else {}


def _trains(request: Message) -> bool:
    return request.kind == "backward" or (request.kind == "forward" and bool(request.header.get("train")))


def _rows_of(message: Message) -> _Rows:
    """Rows and lengths of a forward, checked, since it may come from a peer."""
    ranks = {name: message.tensors[name].dim() for name in message.tensors.keys() & {"hidden_TD", "positions_N"}}
    if ranks != {"hidden_TD": 2, "positions_N": 1}:
        raise _unfit(message, "hidden_TD or positions_N is missing or of another rank")
    rows, lengths = message.header["rows"], message.header.get("lengths", ())
    tokens = message.tensors["hidden_TD"].shape[0]
    if not _counts(rows) or not _counts(lengths) or len(rows) != len(lengths) or sum(lengths) != tokens:
        raise _unfit(message, f"{tokens} tokens do not fit its rows and their lengths")
    positions_N = message.tensors["positions_N"].cpu().long()
    if len(positions_N) and (int(positions_N.min()) < 0 or int(positions_N.max()) >= tokens):
        raise _unfit(message, f"labels lie outside its {tokens} tokens")
    row_N = torch.bucketize(positions_N, torch.tensor(lengths, dtype=torch.long).cumsum(0), right=True)
    if bool((row_N.diff() < 0).any()):
        raise _unfit(message, "labelled positions are not in the order of its rows")
    counts = torch.bincount(row_N, minlength=len(rows)).tolist()
    return _Rows([(message.micro_batch[1], row) for row in rows], {"TD": list(lengths), "ND": counts})


def _unfit(message: Message, why: str) -> PeerError:
    return PeerError(f"micro-batch {tuple(message.micro_batch)} of {message.sender}: {why}")


def _counts(values: object) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, int) and value >= 0 for value in values)
