"""A row as it was read, with the place it came from, and how complaints about rows are raised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from splitllm.errors import DataError

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        fields: column name -> value.
        source: the file, hub name or built-in corpus it came from.
        line: its first line in a text file; elsewhere its number; both from 1.
    """

    fields: Mapping[str, object]
    source: str
    line: int

    @property
    def where(self) -> str:
        """`file:line`, as complaints name it."""
        return f"{self.source}:{self.line}"


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8; a lone surrogate, which JSON can spell, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse(problems: list[str]) -> NoReturn:
    """Raise `DataError` with the first few problems, one a line, and the number of the others."""
    rest = len(problems) - SHOWN
    raise DataError("\n".join(problems[:SHOWN] + ([f"... and {rest} more like these"] if rest > 0 else [])))
