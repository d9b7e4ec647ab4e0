"""Servers that wait for nobody: what the top makes of differences, each counted once, and the end that all share."""

from __future__ import annotations

import asyncio

import pytest
import torch

from splitllm.errors import DivergedError
from splitllm.federated.rounds import Tensors
from splitllm.roles.book import Arrival, Verdict
from splitllm.roles.buffered import BufferedHall
from splitllm.roles.convening import Reports
from splitllm.roles.device import Inline
from tests.roles.halls import Disk, constant, paced, rounds_in
from tests.roles.test_hall import run, settled

MEMBERS = {"edge-0": [0, 1], "edge-1": [2, 3]}


def top(size: int, disk: Disk | None = None, oldest: int | None = None, told: Reports | None = None) -> BufferedHall:
    wanted = paced(4, 2, buffer={"size": size, "oldest": oldest})

    def observe(steps: int, reports: Reports) -> None:
        if told is not None:
            told.extend(reports)

    return BufferedHall(rounds_in(wanted, "cloud", 2), MEMBERS, disk or Disk(), Inline(), observe)


def start(hall: BufferedHall) -> Tensors:
    return hall.rounds.handed(4, 3)


def change(hall: BufferedHall, edge: int, steps: int, by: float, version: int, weight: float = 1.0) -> Arrival:
    delta = {name: torch.full_like(tensor, by) for name, tensor in start(hall).items()}
    return Arrival(f"edge-{edge}", steps, delta, {2 * edge: weight}, version=version)


def moved(verdict: Verdict, since: Tensors) -> float:
    assert verdict.value is not None
    changes = {name: (tensor - since[name]) for name, tensor in verdict.value.items()}
    return constant({name: change.round(decimals=9) for name, change in changes.items()})


def test_each_gets_the_adapter_as_it_is_and_old_updates_count_less() -> None:
    async def test() -> None:
        told: Reports = []
        hall = top(1, told=told)
        before = start(hall)
        first = await hall.bring(change(hall, 0, 4, 1.0, 0))
        assert first.version == 1 and moved(first, before) == 1.0
        second = await hall.bring(change(hall, 1, 4, 1.0, 0))  # it began a version ago
        assert second.version == 2
        assert moved(second, before) == pytest.approx(1.0 + 2**-0.5, abs=1e-8)
        assert [report["updates"] for report in told] == [1, 1] and told[0]["role"] == "cloud"

    run(test)


def test_it_steps_by_the_weighted_mean_of_as_many_as_are_wanted() -> None:
    async def test() -> None:
        hall = top(2)
        before = start(hall)
        first = await hall.bring(change(hall, 0, 4, 1.0, 0, weight=3.0))
        assert first.version == 0 and moved(first, before) == 0.0
        second = await hall.bring(change(hall, 1, 4, 5.0, 0, weight=1.0))
        assert second.version == 1 and moved(second, before) == 2.0

    run(test)


def test_an_update_is_counted_once_also_after_a_restart() -> None:
    async def test() -> None:
        disk = Disk()
        hall = top(2, disk)
        before = start(hall)
        await hall.bring(change(hall, 0, 4, 1.0, 0))
        again = await hall.bring(change(hall, 0, 4, 1.0, 0))
        assert again.version == 0
        restarted = top(2, disk)
        assert (await restarted.bring(change(restarted, 0, 4, 1.0, 0))).version == 0
        found = await restarted.bring(change(restarted, 1, 4, 3.0, 0))
        assert found.version == 1 and moved(found, before) == 2.0

    run(test)


def test_an_update_that_is_too_old_is_dropped_and_who_counts_nothing_gets_the_adapter() -> None:
    async def test() -> None:
        hall = top(1, oldest=0)
        before = start(hall)
        await hall.bring(change(hall, 0, 4, 1.0, 0))
        assert moved(await hall.bring(change(hall, 1, 4, 50.0, 0)), before) == 1.0
        nothing = await hall.bring(change(hall, 1, 4, 50.0, 1, weight=0.0))
        assert nothing.version == 1 and moved(nothing, before) == 1.0

    run(test)


def test_at_the_end_all_are_waited_for_and_hear_the_same() -> None:
    async def test() -> None:
        hall = top(2)
        before = start(hall)
        await hall.bring(change(hall, 0, 4, 1.0, 0))
        one = asyncio.create_task(hall.bring(change(hall, 0, 8, 1.0, 0)))
        await settled()
        assert not one.done()
        other = await hall.bring(change(hall, 1, 8, 4.0, 1))
        assert moved(await one, before) == moved(other, before) == 1.0 + 4.0  # 2 updates, and the rest at the end

    run(test)


def test_who_has_ended_otherwise_is_not_waited_for() -> None:
    async def test() -> None:
        hall = top(2)
        before = start(hall)
        one = asyncio.create_task(hall.bring(change(hall, 0, 8, 1.0, 0)))
        await settled()
        hall.over(2)
        await settled()
        assert not one.done()
        hall.over(3)
        assert moved(await one, before) == 1.0

    run(test)


def test_what_is_not_finite_is_left_out() -> None:
    async def test() -> None:
        told: Reports = []
        hall = top(2, told=told)
        before = start(hall)
        await hall.bring(change(hall, 0, 4, 1.0, 0))
        found = await hall.bring(change(hall, 1, 4, float("nan"), 0))
        assert moved(found, before) == 1.0 and told[0]["rejected"] == {"edge-1": "not finite"}

    run(test)


def test_at_the_end_nobody_waits_for_one_whose_changes_are_of_no_use() -> None:
    async def test() -> None:
        hall = top(1)
        before = start(hall)
        first = asyncio.create_task(hall.bring(change(hall, 0, 8, 1.0, 0)))
        await settled()
        with pytest.raises(DivergedError):
            await hall.bring(change(hall, 1, 8, float("nan"), 1))
        assert moved(await asyncio.wait_for(first, 5), before) == 1.0

    run(test)


def test_what_is_stepped_since_others_have_ended_is_on_disk_before_it_is_heard() -> None:
    async def test() -> None:
        disk = Disk()
        hall = top(2, disk)
        before = start(hall)
        first = asyncio.create_task(hall.bring(change(hall, 0, 8, 1.0, 0)))
        await settled()
        assert not first.done()
        hall.over(2)
        hall.over(3)
        assert moved(await asyncio.wait_for(first, 5), before) == 1.0
        again = top(2, disk)
        assert float((start(again)[name := next(iter(before))] - before[name]).max()) == 1.0

    run(test)
