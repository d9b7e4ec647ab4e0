"""What travels in a secure sum: plain headers as JSON can hold them, and one array."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from splitllm.errors import PeerError
from splitllm.privacy.fixedpoint import Words
from splitllm.privacy.sealing import COMMITMENT_BYTES, PUBLIC_BYTES, SEAL_BYTES
from splitllm.privacy.shamir import SHARE_BYTES

SEALED_BYTES = 2 * SHARE_BYTES + SEAL_BYTES


def _unhex(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("expected a string of hexadecimal digits")
    return bytes.fromhex(value)


Name = Annotated[StrictStr, Field(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")]
_Hex = Annotated[bytes, BeforeValidator(_unhex), PlainSerializer(bytes.hex)]
PublicKey = Annotated[_Hex, Field(min_length=PUBLIC_BYTES, max_length=PUBLIC_BYTES)]
Share = Annotated[_Hex, Field(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
Sealed = Annotated[_Hex, Field(min_length=SEALED_BYTES, max_length=SEALED_BYTES)]
Commitment = Annotated[_Hex, Field(min_length=COMMITMENT_BYTES, max_length=COMMITMENT_BYTES)]


@dataclass(frozen=True)
class Keys:
    """A member's public keys: one to seal shares with, one to agree on masks."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    round: Name
    member: Name
    sealing: PublicKey
    masking: PublicKey


@dataclass(frozen=True)
class Roster:
    """Sealing and masking key of every member, by name."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    round: Name
    keys: dict[Name, tuple[PublicKey, PublicKey]]


@dataclass(frozen=True)
class Shares:
    """A member's sealed shares by receiver, and what fixes the seed of its own mask."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    round: Name
    member: Name
    commitment: Commitment
    sealed: dict[Name, Sealed]


@dataclass(frozen=True)
class Delivery:
    """The sealed shares for one member, by sender."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    round: Name
    sealed: dict[Name, Sealed]


@dataclass(frozen=True)
class Masked:
    """A member's words behind its masks; the only array that travels."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    round: Name
    member: Name
    words: InstanceOf[np.ndarray]


@dataclass(frozen=True)
class Survivors:
    """Whose words are in the sum. Their masks come off, and those that they have in common with who is lost."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    round: Name
    members: list[Name]


@dataclass(frozen=True)
class Unmasking:
    """A member's shares: of the survivors' seeds, and of the masking keys of who was lost on the way."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    round: Name
    member: Name
    seeds: dict[Name, Share]
    keys: dict[Name, Share]


Up = Keys | Shares | Masked | Unmasking
Down = Roster | Delivery | Survivors
M = TypeVar("M", Keys, Roster, Shares, Delivery, Masked, Survivors, Unmasking)


def to_header(message: Up | Down) -> dict[str, Any]:
    """All of a message that JSON can hold: all but `Masked.words`. Bytes are hexadecimal digits."""
    header: dict[str, Any] = _ADAPTERS[type(message)].dump_python(message, mode="json", exclude={"words"})
    return header


def from_header(kind: type[M], header: Mapping[str, Any], words: Words | None = None) -> M:
    """The message that `to_header` was given.

    Args:
        kind: what it has to be.
        header: whatever came.
        words: of `Masked`, and only there.

    Raises:
        PeerError: the header is not that of such a message.
    """
    try:
        message: M = _ADAPTERS[kind].validate_python({**header, **({} if words is None else {"words": words})})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"]) or "header"
        line = f"{kind.__name__}: {where}: {first['msg']}"
        raise PeerError(line.encode("unicode_escape").decode()) from error
    return message


_KINDS: tuple[type[Any], ...] = (Keys, Roster, Shares, Delivery, Masked, Survivors, Unmasking)
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in _KINDS}
