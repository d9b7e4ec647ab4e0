"""Packed rows hold the same documents, whole where they fit, each with its own start and mask."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from splitllm.data.examples import Example
from splitllm.data.packing import pack


def document(ids: list[int]) -> Example:
    targets = np.ones(len(ids), dtype=np.bool_)
    targets[0] = False
    return Example(np.array(ids, dtype=np.int32), targets)


def unpack(rows: list[Example]) -> list[Example]:
    found = []
    for row in rows:
        for start, stop in zip(row.starts, (*row.starts[1:], len(row)), strict=True):
            found.append(Example(row.ids[start:stop], row.targets[start:stop]))
    return found


texts = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=12), max_size=30)


@given(texts, st.integers(12, 40))
def test_unpacking_gives_the_originals(documents, max_length):
    originals = [document(ids) for ids in documents]
    rows = pack(originals, max_length)
    assert all(len(row) <= max_length for row in rows)
    back = unpack(rows)
    assert [one.ids.tolist() for one in back] == documents
    assert [one.targets.tolist() for one in back] == [one.targets.tolist() for one in originals]


@given(st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=12), max_size=30), st.integers(2, 11))
def test_long_documents_are_split_and_no_target_is_lost_but_the_starts(documents, max_length):
    rows = pack([document(ids) for ids in documents], max_length)
    assert all(len(row) <= max_length for row in rows)
    pieces = [ids[start : start + max_length] for ids in documents for start in range(0, len(ids), max_length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    assert [one.ids.tolist() for one in unpack(rows)] == pieces
    assert [row.labels for row in rows] == [len(row) - len(row.starts) for row in rows]
    assert all(row.labels for row in rows)


def test_a_worked_example():
    rows = pack([document([1, 2, 3]), document([4, 5]), document([6, 7, 8, 9, 10, 11, 12])], 5)
    assert [row.ids.tolist() for row in rows] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12]]
    assert [row.starts for row in rows] == [(0, 3), (0,), (0,)]
    assert rows[0].targets.tolist() == [False, True, True, False, True]
