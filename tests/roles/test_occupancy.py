"""The time of a device is counted once, by whether it is busy and whether work waits for it."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.roles.device import DeviceThread
from splitllm.roles.occupancy import Occupancy


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_drawn() -> None:
    r"""
    work      2 s idle   |1 begins 3 s   another comes, 4 s|  ends, 5 s idle, taken away, 6 s
    """
    clock = Clock()
    occupancy = Occupancy(clock)
    occupancy.waits()
    clock.now += 2
    occupancy.begins()
    clock.now += 3
    occupancy.waits()
    clock.now += 4
    occupancy.ends()
    clock.now += 5
    occupancy.waits(-1)
    clock.now += 6
    assert occupancy.seconds() == {(False, True): 7, (True, False): 3, (True, True): 4, (False, False): 6}


def test_nothing_is_counted_before_the_first_work() -> None:
    clock = Clock()
    occupancy = Occupancy(clock)
    clock.now += 9
    assert occupancy.seconds() == {}


@given(st.lists(st.tuples(st.sampled_from(("waits", "begins", "ends", "seconds")), st.integers(0, 9))))
def test_every_second_is_counted_once(events: list[tuple[str, int]]) -> None:
    clock = Clock()
    occupancy = Occupancy(clock)
    occupancy.waits()
    for name, seconds in events:
        getattr(occupancy, name)()
        clock.now += seconds
    assert sum(occupancy.seconds().values()) == sum(seconds for _, seconds in events)


def test_a_job_in_the_queue_of_a_busy_device_waits_and_one_that_nobody_wants_does_not() -> None:
    async def run() -> dict[tuple[bool, bool], float]:
        device = DeviceThread(1)
        first, second, third = (asyncio.create_task(device.run(lambda: time.sleep(0.1))) for _ in range(3))
        await asyncio.sleep(0.02)
        third.cancel()
        await asyncio.gather(first, second)
        device.close()
        return device.occupancy.seconds()

    spent = asyncio.run(run())
    assert spent[True, True] == pytest.approx(0.08, abs=0.07)
    assert spent[True, True] + spent[True, False] >= 0.2 and spent.get((False, True), 0.0) < 0.1
