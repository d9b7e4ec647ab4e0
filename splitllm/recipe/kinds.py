"""The kinds of values a recipe may hold. Each says in plain words what it allows."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, Strict, WrapValidator
from pydantic_core import PydanticCustomError

from splitllm.recipe.addresses import host_and_port, place_here
from splitllm.recipe.roles import shared_name

_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_TIER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_CODEC = re.compile(r"none|bf16|fp16|int8|int4|topk:0\.(?P<digits>[0-9]{1,6})")
BUILTIN_SOURCES = ("builtin:stdlib-docstrings",)


def _allows(text: str) -> WrapValidator:
    """Replaces whatever pydantic says by one complaint of type `allowed`, whose message is `text`."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValueError:
            raise PydanticCustomError("allowed", "{allowed}", {"allowed": text}) from None

    return WrapValidator(check)


def _number(value: Any) -> Any:
    """YAML 1.1 reads `2e-4` (no dot) as text; a recipe means the number."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    return [_numbers(entry) for entry in value] if isinstance(value, list) else _number(value)


def _rising(cuts: tuple[int, ...]) -> tuple[int, ...]:
    if any(low >= high for low, high in itertools.pairwise(cuts)):
        raise ValueError
    return cuts


def _known_source(source: str) -> str:
    if source.startswith("builtin:") and source not in BUILTIN_SOURCES:
        raise ValueError
    return source


def _address(value: str) -> str:
    host_and_port(value)
    return value


def _here(value: str) -> str:
    place_here(value)
    return value


def _codec(value: str) -> str:
    found = _CODEC.fullmatch(value)
    if found is None or (found["digits"] is not None and int(found["digits"]) == 0):
        raise ValueError
    return value


def mapping_of(text: str) -> BeforeValidator:
    """Leaves the complaints about the entries of a mapping to their own kind; `text` is for what is no mapping."""

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise PydanticCustomError("allowed", "{allowed}", {"allowed": text})
        return value

    return BeforeValidator(check)


def _tiers(value: Any) -> dict[str, int]:
    """Tiers bottom-up: 1 to 5 names, counts that never grow upwards, and one machine at the top of two or more."""
    reason = None
    if not isinstance(value, dict) or not 1 <= len(value) <= 5:
        reason = "use a mapping of 1 to 5 tiers, bottom-up, such as {client: 4, edge: 2, cloud: 1}"
    elif bad := [name for name in value if not isinstance(name, str) or not _TIER_NAME.fullmatch(name)]:
        reason = f"{bad[0]!r} is no tier name; use letters, digits, - and _, beginning with a letter"
    elif bad := [name for name, count in value.items() if type(count) is not int or count < 1]:
        reason = f"the count of {bad[0]} must be a whole number of at least 1"
    elif list(value.values()) != sorted(value.values(), reverse=True):
        reason = "counts must not grow upwards (tiers are listed bottom-up)"
    elif len(value) > 1 and list(value.values())[-1] != 1:
        reason = f"the top tier ({list(value)[-1]}) must be 1"
    elif (name := shared_name(value)) is not None:
        reason = f"two roles would be called {name}; give one of the tiers another name"
    if reason is not None:
        raise PydanticCustomError("reason", "{reason}", {"reason": reason})
    return dict(value)


Switch = Annotated[bool, Strict(), _allows("true or false")]
Text = Annotated[str, Field(min_length=1), _allows("text (in quotes where YAML reads something else)")]

Count = Annotated[int, Strict(), Field(ge=1), _allows("a whole number of at least 1")]
Intervals = Annotated[
    Annotated[int, Strict(), Field(ge=1)]
    | Annotated[tuple[Annotated[int, Strict(), Field(ge=1)], ...], Field(min_length=1)],
    _allows("a number of steps, or a list with one for each tier, bottom-up, such as [2, 10]"),
]
NonNegative = Annotated[int, Strict(), Field(ge=0), _allows("a whole number of at least 0")]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**63), _allows("a whole number from 0 to below 2**63")]
Length = Annotated[int, Strict(), Field(ge=2), _allows("a whole number of tokens, at least 2")]

_Real = Annotated[float, Strict(), Field(allow_inf_nan=False), BeforeValidator(_number)]
Positive = Annotated[_Real, Field(gt=0), _allows("a number above 0")]
NotNegative = Annotated[_Real, Field(ge=0), _allows("a number of at least 0")]
Probability = Annotated[_Real, Field(ge=0, lt=1), _allows("a number from 0 to below 1")]
Fraction = Annotated[_Real, Field(gt=0, lt=1), _allows("a number between 0 and 1")]
AtLeastOne = Annotated[_Real, Field(ge=1), _allows("a number of at least 1")]
Share = Annotated[_Real, Field(gt=0, le=1), _allows("a number above 0 and at most 1")]
Betas = Annotated[tuple[Probability, Probability], _allows("two numbers from 0 to below 1, such as [0.9, 0.999]")]

Cuts = Annotated[
    tuple[NonNegative, ...], AfterValidator(_rising), _allows("block numbers from 1 that rise strictly, such as [2, 4]")
]
ClientCuts = Annotated[
    dict[str, Annotated[int, Strict(), Field(ge=1), _allows("a block number of at least 1")]],
    mapping_of("a mapping of clients to block numbers, such as {client-1: 4}"),
]
Limits = Annotated[dict[str, Count], mapping_of("a mapping of tiers to MiB, such as {client: 850, edge: 8192}")]
Tiers = Annotated[dict[str, int], BeforeValidator(_tiers)]
ZeroStage = Annotated[Literal[1, 2, 3], _allows("1, 2 or 3")]
TierNames = Annotated[tuple[Text, ...], Field(min_length=1), _allows("a list of tier names, such as [edge, cloud]")]
Targets = Annotated[
    Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)],
    _allows("all-linear, or a list of module-name endings such as [q_proj, v_proj]"),
]

_Source = Annotated[Text, AfterValidator(_known_source)]
Sources = Annotated[
    _Source | Annotated[tuple[_Source, ...], Field(min_length=1)],
    _allows(f"a path, a glob, a list of them, hub:NAME or {' or '.join(BUILTIN_SOURCES)}"),
]
Fields = Annotated[dict[Text, Text], _allows("a mapping of names, such as {prompt: question}")]
Mapping = Annotated[
    dict[str, JsonValue], AfterValidator(_numbers), _allows("a mapping of config keys, such as {n_layer: 12}")
]
Trackers = Annotated[tuple[Literal["tensorboard"], ...], _allows("a list, [] or [tensorboard]")]
Address = Annotated[
    Text,
    AfterValidator(_address),
    _allows("HOST:PORT, such as 10.0.0.2:7000, edge.example.org:7000 or '[2001:db8::1]:7000' (in quotes)"),
]
Addresses = Annotated[
    dict[str, Address], mapping_of("a mapping of server roles to HOST:PORT, such as {edge-0: 10.0.0.2:7000}")
]
PlaceHere = Annotated[
    Text,
    AfterValidator(_here),
    _allows("unix:PATH, with a path of at most 107 bytes, or 127.0.0.1:PORT, such as unix:out/edge-0.sock"),
]
Codec = Annotated[
    Text,
    AfterValidator(_codec),
    _allows("none, bf16, fp16, int8, int4 or topk:FRACTION with a fraction between 0 and 1, such as topk:0.05"),
]
ComputeDtype = Annotated[Literal["float32", "bfloat16"], _allows("float32 or bfloat16")]
MixedPrecision = Annotated[
    Literal["no", "bf16"],
    BeforeValidator(lambda value: "no" if value is False else value),
    _allows('"no" or bf16'),
]
