"""Turns pydantic's complaints about a recipe into lines that name the key, the value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from splitllm.recipe.text import shown

Location = tuple[str, ...]


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line a complaint (more where several keys do not fit together).

    Args:
        error: what validating a mapping against `root` raised.
        root: the model of the whole recipe; tells the known keys.
    """
    lines: list[str] = []
    for entry in error.errors(include_url=False):
        location = tuple(str(part) for part in entry["loc"])
        if entry["type"] == "together":
            lines += entry["ctx"]["lines"]
        else:
            lines.append(_line(root, location, entry["type"], entry["msg"], entry["input"]))
    return lines


def locations(error: ValidationError) -> list[Location]:
    """The paths of the keys complained about; the empty path for complaints about keys that do not fit together."""
    return list(dict.fromkeys(tuple(str(part) for part in entry["loc"]) for entry in error.errors(include_url=False)))


def _line(root: type[BaseModel], location: Location, kind: str, message: str, value: Any) -> str:
    key = ".".join(location)
    match kind:
        case "extra_forbidden":
            return f"{key}: unknown key; {_nearest(root, location)}"
        case "missing":
            return f"{key}: missing; give {_wanted(root, location)}"
        case "allowed":
            remedy = f"use {message}{_or_null(root, location)}"
        case "literal_error" | "model_type" | "model_attributes_type":
            remedy = f"use {_wanted(root, location)}{_or_null(root, location)}"
        case "dict_type":
            remedy = f"use a mapping of names, each with {_wanted(root, (*location, 'name'))}"
        case _:
            remedy = message
    return f"{key}: {shown(value)} is not allowed; {remedy}"


def _nearest(root: type[BaseModel], location: Location) -> str:
    parent = _section(root, location[:-1])
    prefix = "".join(f"{part}." for part in location[:-1])
    here = list(parent.model_fields) if parent is not None else []
    almost = difflib.get_close_matches(location[-1], here, n=1, cutoff=0.9)
    near = [f"{prefix}{name}" for name in difflib.get_close_matches(location[-1], here, n=1)]
    elsewhere: dict[str, list[str]] = {}
    for dotted in _known(root):
        elsewhere.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    if location[-1] in elsewhere and not almost:
        near = [_closest(elsewhere[location[-1]], location)]
    elif not near:
        names = difflib.get_close_matches(location[-1], elsewhere, n=1, cutoff=0.75)
        near = [_closest(elsewhere[name], location) for name in names]
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(here)}"


def _closest(keys: Sequence[str], location: Location) -> str:
    """Of several keys the first that has most sections in common with a place."""
    return max(keys, key=lambda key: sum(one == other for one, other in zip(key.split("."), location, strict=False)))


def _known(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in model.model_fields:
        yield f"{prefix}{name}"
        below = _section(model, (name,))
        if below is not None:
            yield from _known(below, f"{prefix}{name}.")


def _wanted(root: type[BaseModel], location: Location) -> str:
    section = _section(root, location)
    if section is not None:
        return f"a mapping with keys among {', '.join(section.model_fields)}"
    parent = _section(root, location[:-1])
    assert parent is not None, location
    field = parent.model_fields[location[-1]]
    return field.description or " or ".join(str(choice) for choice in get_args(field.annotation))


def _or_null(root: type[BaseModel], location: Location) -> str:
    parent = _section(root, location[:-1])
    if parent is None or location[-1] not in parent.model_fields:
        return ""
    return ", or null" if NoneType in get_args(parent.model_fields[location[-1]].annotation) else ""


def _section(root: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The model at a path of keys; None where the path leads to a value."""
    kind: Any = root
    for name in location:
        if get_origin(kind) is dict:  # of names to sections
            kind = get_args(kind)[1]
        elif _is_section(kind) and name in kind.model_fields:
            kind = kind.model_fields[name].annotation
        else:
            return None
    return kind if _is_section(kind) else None


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
