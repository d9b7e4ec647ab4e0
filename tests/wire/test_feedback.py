"""Error feedback: nothing is lost for good, a step run again is the same, and memory is bounded."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitllm.errors import DivergedError
from splitllm.wire.codecs import pack, unpack
from splitllm.wire.feedback import ErrorMemory
from tests.grids import counts

ROOM = 1 << 24
CODED = ["int4", "topk:0.25"]
LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=4)


def rows_of(lengths: list[int], width: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("name", "left", "rounding"), [("int4", 0.2, 1e-3), ("topk:0.25", 5.0, 1e-2)])
@pytest.mark.parametrize("count", counts(30, 100))
def test_the_mean_of_what_arrives_converges_to_what_was_sent(
    count: int, name: str, left: float, rounding: float
) -> None:
    @settings(max_examples=count)
    @given(LENGTHS, st.integers(1, 70), st.floats(-4, 4), st.integers(0, 99))
    def check(lengths: list[int], width: int, exponent: float, seed: int) -> None:
        values, steps = rows_of(lengths, width, seed) * 10**exponent, 25
        memory, keys = ErrorMemory(ROOM), list(range(len(lengths)))
        total = torch.zeros(values.shape, dtype=torch.float64)
        for step in range(steps):
            total += unpack(memory.encode(name, values, keys, lengths, step))
        off = (total / steps - values).abs().amax(1)
        assert bool((off <= (left / steps + rounding) * values.abs().amax(1)).all())

    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CODED)
def test_feedback_brings_the_mean_closer_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    values, memory = rows_of([40], 64, dtype=dtype), ErrorMemory(ROOM)
    sent = [memory.encode(name, values, ["row"], [40], step) for step in range(20)]
    assert {packed.dtype for packed in sent} == {dtype}
    mean = torch.stack([unpack(packed).double() for packed in sent]).mean(0)
    once = unpack(pack(values, name)).double()
    assert (mean - values.double()).norm() < 0.25 * (once - values.double()).norm()


Visit = tuple[int, list[int]]  # seed of the values, keys


@pytest.mark.parametrize("count", counts(40, 100))
def test_a_step_that_is_run_again_sends_the_same_bytes_in_whatever_order(count: int) -> None:
    """Three steps of the same visits; then the last of them again, its micro-batches in other orders; then one more."""

    def run(memory: ErrorMemory, keys_of_visits: list[list[int]], step: int, order: list[int]) -> dict[int, bytes]:
        sent = {}
        for index in order:
            keys = keys_of_visits[index]
            values = rows_of([2] * len(keys), seed=100 * step + index)
            packed = memory.encode("int4", values, keys, [2] * len(keys), step, index=index)
            sent[index] = packed.blob.numpy().tobytes()
        return sent

    @settings(max_examples=count)
    @given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=5), st.data())
    def check(visits: list[list[int]], data: st.DataObject) -> None:
        again, order = data.draw(st.permutations(range(len(visits)))), list(range(len(visits)))
        undisturbed, disturbed = ErrorMemory(ROOM), ErrorMemory(ROOM)
        expected = [run(undisturbed, visits, step, order) for step in range(4)]
        found = [run(disturbed, visits, step, order) for step in range(3)]
        for part in range(len(again) + 1):  # cut short anywhere
            assert run(disturbed, visits, 2, again[:part]) == {index: expected[2][index] for index in again[:part]}
        assert [*found, run(disturbed, visits, 3, again)] == expected

    check()


def test_several_visits_of_a_row_in_one_step_all_read_the_error_from_before_it() -> None:
    memory, values = ErrorMemory(ROOM), rows_of([3])
    memory.encode("topk:0.25", values, ["row"], [3], 0)
    first, second = (memory.encode("topk:0.25", values, ["row"], [3], 1, index=index) for index in range(2))
    twice = memory.encode("topk:0.25", torch.cat([values, values]), ["row", "row"], [3, 3], 1, index=2)
    assert torch.equal(first.blob, second.blob)
    assert not torch.equal(first.blob, pack(values, "topk:0.25").blob)
    assert torch.equal(unpack(twice)[:3], unpack(twice)[3:])


def test_rows_do_not_mix_and_need_not_come_in_the_same_company() -> None:
    """Top-k of one row does not depend on its neighbours, so each row alone tells what it must be."""
    name, lengths = "topk:0.25", {"a": 2, "b": 3, "c": 1}
    values = {key: rows_of([length], seed=length) for key, length in lengths.items()}
    together, alone = ErrorMemory(ROOM), {key: ErrorMemory(ROOM) for key in lengths}
    for step, keys in enumerate(["abc", "cb", "a", "ba", "bca"]):
        sizes = [lengths[key] for key in keys]
        packed = together.encode(name, torch.cat([values[key] for key in keys]), list(keys), sizes, step)
        for key, row in zip(keys, unpack(packed).split(sizes), strict=True):
            assert torch.equal(row, unpack(alone[key].encode(name, values[key], [key], [lengths[key]], step)))


def test_the_error_of_a_row_of_another_shape_counts_as_zero() -> None:
    memory, longer = ErrorMemory(ROOM), rows_of([4])
    memory.encode("int4", rows_of([3]), ["row"], [3], 0)
    assert torch.equal(memory.encode("int4", longer, ["row"], [4], 1).blob, pack(longer, "int4").blob)


@given(st.integers(0, 8000), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), max_size=30))
def test_memory_is_below_its_limit_when_a_step_begins(limit: int, visits: list[tuple[int, int]]) -> None:
    memory = ErrorMemory(limit)
    for step, (key, length) in enumerate(visits):
        memory.encode("int4", rows_of([30, length]), ["large", key], [30, length], step)
        held = list(memory._entries.values())
        assert memory.nbytes == sum(entry.nbytes for entry in held) <= limit + sum(map(bytes_of, (30, length)))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for e in held for t in tensors(e)}
        assert sum(storages.values()) <= memory.nbytes
        memory.encode("int4", rows_of([0]), ["empty"], [0], step + 1)
        assert memory.nbytes <= limit + bytes_of(0) and len(memory._highest) == len(memory._entries)


def tensors(entry: object) -> list[torch.Tensor]:
    return [value for value in vars(entry).values() if isinstance(value, torch.Tensor)]


def bytes_of(length: int, width: int = 24) -> int:
    """That a row takes in memory."""
    return 1024 + 2 * 2 * length * width


def epochs(memory: ErrorMemory, seed: int, rows: int, count: int = 3) -> list[float]:
    """Send every row once an epoch, in another order each; what share met its error, by epoch after the first."""
    chance, shares = random.Random(seed), []
    for epoch in range(count):
        order, met = chance.sample(range(rows), rows), 0
        for step, row in enumerate(order, epoch * rows):
            met += memory._read(row, torch.Size((1, 24)), step) is not None
            memory.encode("topk:0.25", rows_of([1]), [row], [1], step)
        shares.append(met / rows)
    return shares[1:]


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0]))
def test_the_share_of_rows_that_meet_their_error_is_that_of_the_memory(seed: int, share: float) -> None:
    rows = 100
    for found in epochs(ErrorMemory(int(share * rows) * bytes_of(1)), seed, rows):
        assert share - 0.02 <= found <= share + 0.02


@settings(max_examples=40)
@given(st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=6), max_size=6), st.data())
def test_what_is_kept_does_not_depend_on_the_order_of_a_steps_micro_batches(
    steps: list[list[tuple[int, int]]], data: st.DataObject
) -> None:
    """Rows of the same key have the same length, as rows of the data have."""
    one, other = ErrorMemory(5 * bytes_of(2)), ErrorMemory(5 * bytes_of(2))
    for step, visits in enumerate(steps):
        lengths = [key % 4 for key, _ in visits]
        order = data.draw(st.permutations(range(len(visits))))
        sent: list[dict[int, bytes]] = []
        for memory, indices in ((one, range(len(visits))), (other, order)):
            packed = {
                index: memory.encode(
                    "int4",
                    rows_of([lengths[index]], seed=index),
                    [visits[index][0]],
                    [lengths[index]],
                    step,
                    index=index,
                )
                for index in indices
            }
            sent.append({index: one_of_them.blob.numpy().tobytes() for index, one_of_them in packed.items()})
        assert sent[0] == sent[1]
    one._forget()
    other._forget()
    assert one._entries.keys() == other._entries.keys() and one.nbytes == other.nbytes


def test_a_row_that_was_forgotten_is_never_kept_again() -> None:
    memory, values = ErrorMemory(3 * bytes_of(1)), rows_of([1])
    kept = []
    for step in range(30):
        memory.encode("int4", values, [step % 10], [1], step)
        if step >= 10:
            kept.append(set(memory._entries))
    assert all(keys == kept[0] for keys in kept) and len(kept[0]) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CODED)
def test_values_at_the_end_of_the_range_stay_finite_for_ever(name: str, dtype: torch.dtype) -> None:
    values, memory = torch.full((2, 40), torch.finfo(dtype).max, dtype=dtype), ErrorMemory(ROOM)
    for step in range(8):
        assert bool(unpack(memory.encode(name, values, [0], [2], step)).isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_and_leaves_no_error(value: float) -> None:
    memory = ErrorMemory(ROOM)
    with pytest.raises(DivergedError, match="hidden_TD"):
        memory.encode("int4", torch.full((1, 4), value), ["row"], [1], 0, what="hidden_TD")
    assert memory.nbytes == 0
