"""Several documents in one row, so that no position is padding. Each keeps its own start, positions and mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from splitllm.data.examples import Example


def pack(documents: Sequence[Example], max_length: int) -> list[Example]:
    """Fill rows greedily, in order: a document joins the current row if it fits whole, else it begins the next one.

    Args:
        documents: unpacked examples; one longer than `max_length` is first split into pieces, each its own document
            (a last piece of one token is left out: nothing in it is learned, and nothing sees it).
        max_length: tokens of a row at most, >= 2.

    Returns:
        Packed rows; the first token of each document is not predicted.
    """
    rows: list[list[Example]] = []
    room = 0
    for document in (piece for whole in documents for piece in _pieces(whole, max_length)):
        if len(document) > room:
            rows.append([])
            room = max_length
        rows[-1].append(document)
        room -= len(document)
    return [_joined(row) for row in rows]


def _pieces(document: Example, max_length: int) -> Iterator[Example]:
    if len(document) <= max_length:
        yield document
        return
    for start in range(0, len(document) - 1, max_length):
        targets = document.targets[start : start + max_length].copy()
        targets[0] = False
        yield Example(document.ids[start : start + max_length], targets)


def _joined(documents: Sequence[Example]) -> Example:
    ends = np.cumsum([len(document) for document in documents]).tolist()
    return Example(
        ids=np.concatenate([document.ids for document in documents]),
        targets=np.concatenate([document.targets for document in documents]),
        starts=(0, *ends[:-1]),
    )
