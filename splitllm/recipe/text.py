"""The recipe as text: a YAML file and `key.path=value` overrides become one nested mapping, or a list of complaints."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
"""What reading a text as YAML can raise: PyYAML lets errors of its own converters (a 13th month) through."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that notes repeated keys and keys that are not text instead of taking the last one silently."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.complaints: list[tuple[int, str]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep=deep)
        first_lines: dict[str, int] = {}
        for entry in list(node.value):
            self._check_key(node, entry, first_lines)
        return super().construct_mapping(node, deep=deep)

    def _check_key(
        self, node: yaml.MappingNode, entry: tuple[yaml.Node, yaml.Node], first_lines: dict[str, int]
    ) -> None:
        key = entry[0]
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            return
        if key.tag != "tag:yaml.org,2002:str":
            shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            self.complaints.append((line, f"key {shown}: YAML does not read this key as text; put it in quotes"))
            node.value.remove(entry)
        elif key.value in first_lines:
            self.complaints.append(
                (line, f"key {key.value} is given twice (first on line {first_lines[key.value]}); keep one")
            )
        else:
            first_lines[key.value] = line


def read_mapping(path: str | Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Reads a recipe file.

    Args:
        path: a YAML file in UTF-8 whose top level is a mapping.

    Returns:
        The mapping (None when there is none to go on with) and every complaint, each naming the file and, where known,
        the line.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return None, [f"{path}: no such recipe file; check the path"]
    except UnicodeDecodeError as error:
        return None, [f"{path}: byte {error.start} is not UTF-8; save the recipe as UTF-8 text"]
    except OSError as error:
        return None, [f"{path}: cannot read the recipe: {error.strerror}"]
    try:
        value, complaints = _parse(text)
    except _UNREADABLE as error:
        return None, [f"{path}{_place(error)}: not valid YAML: {_reason(error)}"]
    problems = [f"{path}:{line}: {complaint}" for line, complaint in complaints]
    if value is None and not problems:
        return None, [f"{path}: the recipe is empty; it must be a mapping such as `seed: 0`"]
    if not isinstance(value, dict):
        return None, [*problems, f"{path}: the recipe is {shown(value)}; it must be a mapping such as `seed: 0`"]
    return value, problems


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Puts `key.path=value` overrides into `raw`, in order; a malformed one is left out and complained about.

    Args:
        raw: the recipe's mapping; changed in place.
        overrides: each `key.path=value`, the value in YAML (`split.cuts=[2, 4]`, `train.clip_norm=null`).

    Returns:
        One complaint for each override that was left out.
    """
    return [complaint for override in overrides if (complaint := _apply(raw, override)) is not None]


def shown(value: object) -> str:
    """`value` for a message: on one line, at most about 80 characters; null, true and false as YAML has them."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _apply(raw: dict[str, Any], override: str) -> str | None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    name = f"override {shown(override)}"
    if not equals or not all(keys):
        return f"{name}: write it as key.path=value, such as train.steps=100"
    if not text.strip():
        return f"{name}: no value; write {path.strip()}=VALUE, or {path.strip()}=null for none"
    try:
        value, complaints = _parse(text)
    except _UNREADABLE as error:
        return f"{name}: the value is not valid YAML: {_reason(error)}"
    if complaints:
        return f"{name}: {complaints[0][1]}"
    section = raw
    for depth, key in enumerate(keys[:-1], start=1):
        below = section.get(key)
        if below is None:
            below = section[key] = {}
        if not isinstance(below, dict):
            return f"{name}: {'.'.join(keys[:depth])} is {shown(below)}, which has no keys below it; set it as a whole"
        section = below
    section[keys[-1]] = value
    return None


def _parse(text: str) -> tuple[Any, list[tuple[int, str]]]:
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data(), loader.complaints
    finally:
        loader.dispose()


def _place(error: Exception) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return f":{mark.line + 1}" if mark is not None else ""


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        return error.problem
    return " ".join(str(error).split())
