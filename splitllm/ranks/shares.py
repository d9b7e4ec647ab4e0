"""Who computes what of a batch: a pure function of its rows and the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Some rows of one micro-batch, one after another.

    Attributes:
        ask: number of the micro-batch in the batch.
        start, stop: its first row, and one past the last.
    """

    ask: int
    start: int
    stop: int


def share_out(lengths: Sequence[Sequence[int]], ranks: int, *, whole: bool = False) -> list[list[Part]]:
    """Cut a batch into one share a rank, in the order of its rows, with about as many tokens each.

    Rank 0 has the first rows; where there are fewer pieces than ranks, some of the others have none.

    Args:
        lengths: of each micro-batch, in the order of the batch, the real tokens of each row.
        ranks: how many there are.
        whole: micro-batches are not cut, since what is drawn for them is drawn for all of their rows.

    Returns:
        The parts of each rank; every row is in one of them.
    """
    assert lengths and ranks > 0
    pieces = _pieces(lengths, whole)
    total = sum(tokens for _, tokens in pieces)
    shares: list[list[Part]] = [[] for _ in range(ranks)]
    before = 0
    for part, tokens in pieces:
        rank = min(ranks - 1, (2 * before + tokens) * ranks // (2 * total)) if before else 0
        before += tokens
        _append(shares[rank], part)
    return shares


def _pieces(lengths: Sequence[Sequence[int]], whole: bool) -> list[tuple[Part, int]]:
    """What is not cut further, with its tokens."""
    if whole:
        return [(Part(ask, 0, len(rows)), sum(rows)) for ask, rows in enumerate(lengths)]
    return [(Part(ask, row, row + 1), rows[row]) for ask, rows in enumerate(lengths) for row in range(len(rows))]


def _append(share: list[Part], part: Part) -> None:
    """Rows that follow each other are one part."""
    if share and share[-1].ask == part.ask and share[-1].stop == part.start:
        share[-1] = Part(part.ask, share[-1].start, part.stop)
    else:
        share.append(part)
