"""Which cases of a grid are fast: the rest of them is for `make test-system` or `make soak`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def fast_if(here: bool, otherwise: str = "system") -> list[pytest.MarkDecorator]:
    """The marks of a case: none for a fast one, else `system` or `soak`."""
    return [] if here else [getattr(pytest.mark, otherwise)]


def cases(every: Iterable[Sequence[Any]], fast: Callable[..., bool], otherwise: str = "system") -> list[Any]:
    """The cases of a grid, named by their values; those of whose values `fast` is not true are `system` or `soak`."""
    return [pytest.param(*case, marks=fast_if(fast(*case), otherwise), id="-".join(map(_name, case))) for case in every]


def _name(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def each_fast(*fast: Any, slow: Sequence[Any]) -> list[Any]:
    """Values of which some are fast and the others `system`."""
    return [*fast, *(pytest.param(value, marks=fast_if(False)) for value in slow)]


def in_turn(*places: int) -> bool:
    """True of every second cell of a table, as the black squares of a board are: each row and column has some."""
    return sum(places) % 2 == 0


def counts(fast: int, all_of_them: int) -> list[Any]:
    """How often something random is tried: a few times, and many times in the system tests."""
    return [fast, pytest.param(all_of_them, marks=fast_if(False))]
