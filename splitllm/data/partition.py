"""Who gets which rows: every row goes to exactly one client, and the same seed deals the same way again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from splitllm.data.rows import Row, refuse
from splitllm.errors import DataError

if TYPE_CHECKING:
    from splitllm.recipe import PartitionRecipe

PARTITION_KEY = 0x5EED1
"""Sets this use of the recipe's seed apart from the others."""


def partition(rows: Sequence[Row], recipe: PartitionRecipe, *, clients: int, seed: int) -> list[list[int]]:
    """Deal rows to clients.

    Args:
        rows: all training rows.
        recipe: `by` iid (sizes differ by at most one), dirichlet (each value of `field` is shared out in proportions
            drawn from a symmetric Dirichlet of `alpha`, Hsu et al. 2019, https://arxiv.org/abs/1909.06335), field (each
            value goes whole to one client, sizes balanced), file (the i-th file to the i-th client) or own (all to
            the one client there is).
        clients: how many, >= 1.
        seed: the recipe's.

    Returns:
        Row numbers a client, rising; no client is without.

    Raises:
        DataError: fewer rows, values or files than clients; a row without the field; several clients' own rows.
    """
    check_owner(recipe, clients)
    if len(rows) < clients:
        raise DataError(
            f"split.tiers: {clients} clients share {len(rows)} usable training rows (data.source), and each needs "
            "at least one; take fewer clients or more rows"
        )
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, PARTITION_KEY))))
    if recipe.by == "iid":
        dealt = [part.tolist() for part in np.array_split(rng.permutation(len(rows)), clients)]
    elif recipe.by == "own":
        dealt = [list(range(len(rows)))]
    elif recipe.by == "file":
        dealt = _by_file(rows, clients)
    else:
        values = field_values(rows, recipe.field or "")
        dealt = _by_value(values, clients) if recipe.by == "field" else _dirichlet(values, clients, recipe.alpha, rng)
    return [sorted(part) for part in dealt]


def check_owner(recipe: PartitionRecipe, clients: int) -> None:
    """Rows that are a client's `own` cannot be dealt to several.

    Raises:
        DataError: they would be.
    """
    if recipe.by == "own" and clients > 1:
        raise DataError(
            "data.partition.by: own needs one `splitllm client` per device; here every client's rows are dealt from "
            "data.source: use iid, dirichlet, field or file"
        )


def field_values(rows: Sequence[Row], field: str) -> list[str]:
    """The value of `field` in every row, as text.

    Raises:
        DataError: a row has none, or one that is a list or a mapping.
    """
    problems = []
    for row in rows:
        value = row.fields.get(field)
        if value is None:
            has = ", ".join(row.fields)
            problems.append(f"{row.where}: no field {field!r}, named by data.partition.field (the row has: {has})")
        elif isinstance(value, list | dict):
            problems.append(f"{row.where}: field {field!r} is a {type(value).__name__}; partition by a plain value")
    if problems:
        refuse(problems)
    return [_plain(row.fields[field]) for row in rows]


def _plain(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _by_file(rows: Sequence[Row], clients: int) -> list[list[int]]:
    parts: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        parts.setdefault(row.source, []).append(number)
    if len(parts) != clients:
        raise DataError(
            f"data.partition.by: file needs a file a client, but data.source has {len(parts)} with usable rows "
            f"for {clients} clients; change one of them"
        )
    return list(parts.values())


def _by_value(values: Sequence[str], clients: int) -> list[list[int]]:
    """Largest value first, each to the client that has least so far."""
    sizes = Counter(values)
    if len(sizes) < clients:
        raise DataError(
            f"data.partition.field: {len(sizes)} distinct values for {clients} clients, and each needs one; "
            "take fewer clients or another field"
        )
    loads = [0] * clients
    owner = {}
    for value, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        owner[value] = loads.index(min(loads))
        loads[owner[value]] += size
    dealt: list[list[int]] = [[] for _ in range(clients)]
    for number, value in enumerate(values):
        dealt[owner[value]].append(number)
    return dealt


def _dirichlet(values: Sequence[str], clients: int, alpha: float | None, rng: np.random.Generator) -> list[list[int]]:
    """Share out each value in drawn proportions; then clients without rows get one of the largest client's."""
    assert alpha is not None, "the recipe demands alpha"
    by_value: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        by_value.setdefault(value, []).append(number)
    dealt: list[list[int]] = [[] for _ in range(clients)]
    for value in sorted(by_value):
        numbers = rng.permutation(by_value[value])
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * numbers.size).astype(int)
        for part, piece in zip(dealt, np.split(numbers, cuts), strict=True):
            part += piece.tolist()
    for part in dealt:
        if not part:
            part.append(max(dealt, key=len).pop())
    return dealt
