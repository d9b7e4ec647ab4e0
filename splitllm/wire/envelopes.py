"""Between a `Message`, which roles exchange, and the envelope that carries it; what is not one is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from splitllm.errors import DivergedError, PeerError, RejoinError, SplitLLMError
from splitllm.wire.codecs import Packed
from splitllm.wire.coding import unpack_all
from splitllm.wire.frames import Envelope, FrameType
from splitllm.wire.message import KINDS, Message

ERRORS: dict[str, type[SplitLLMError]] = {"rejoin": RejoinError, "diverged": DivergedError, "peer": PeerError}
LARGEST = 1 << 53


def request_values(message: Message, received: Sequence[int]) -> dict[str, Any]:
    """The plain values of a request.

    Args:
        message: the request.
        received: numbers of the requests whose answers came since the last one was sent: they need not be kept.
    """
    return {
        "kind": message.kind,
        "micro_batch": list(message.micro_batch),
        "generation": message.generation,
        "received": list(received),
        "header": dict(message.header),
    }


def request_of(envelope: Envelope, sender: str) -> tuple[Message, list[int]]:
    """A request and the numbers of the answers that its sender has.

    Raises:
        PeerError: it is none.
    """
    values, number = envelope.values, envelope.number
    if envelope.type is not FrameType.REQUEST:
        raise PeerError(f"{sender} sent {envelope.type.name.lower()} where only requests and a goodbye are due")
    kind = values.get("kind")
    if kind not in KINDS:
        raise PeerError(f"{sender}: request {number} has kind {_short(kind)}; known are {', '.join(KINDS)}")
    micro_batch = values.get("micro_batch")
    if not (isinstance(micro_batch, list) and len(micro_batch) == 3 and all(_is_number(n, -1) for n in micro_batch)):
        raise PeerError(
            f"{sender}: request {number} has micro_batch {_short(micro_batch)}; step, client and index are due"
        )
    generation, header, received = values.get("generation"), values.get("header"), values.get("received")
    if not _is_number(generation, 0) or not isinstance(header, dict):
        raise PeerError(
            f"{sender}: request {number} has generation {_short(generation)} or a header that is no mapping"
        )
    if not isinstance(received, list) or not all(_is_number(entry, 0) for entry in received):
        raise PeerError(f"{sender}: request {number} says it received {_short(received)}; a list of numbers is due")
    step, client, index = micro_batch
    message = Message(kind, sender, (step, client, index), header, unpack_all(envelope.tensors), int(generation or 0))
    return message, received


def reply_envelope(number: int, reply: Message, packed: Mapping[str, Packed]) -> Envelope:
    """The envelope of an answer."""
    return Envelope(FrameType.REPLY, number, {"header": dict(reply.header)}, packed)


def reply_of(envelope: Envelope, request: Message, sender: str) -> Message:
    """The answer to a request.

    Raises:
        PeerError: it is none.
    """
    header = envelope.values.get("header")
    if not isinstance(header, dict):
        raise PeerError(f"{sender}: the answer to {request.kind} has no header")
    return Message(request.kind, sender, request.micro_batch, header, unpack_all(envelope.tensors), request.generation)


def error_envelope(number: int, error: SplitLLMError) -> Envelope:
    """The envelope that says why there is no answer."""
    name = next((name for name, kind in ERRORS.items() if isinstance(error, kind)), "peer")
    return Envelope(FrameType.ERROR, number, {"error": name, "text": str(error)[:2000]})


def error_of(envelope: Envelope) -> SplitLLMError:
    """The error that an envelope carries."""
    kind = ERRORS.get(str(envelope.values.get("error")), PeerError)
    return kind(str(envelope.values.get("text")))


def _is_number(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < LARGEST


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
