"""A neighbour that stays away is named once, with what can be done."""

from __future__ import annotations

import asyncio
import logging

import pytest

from splitllm.deployment.reach import WayUp, say_who_is_missing
from splitllm.roles.absence import Absence


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_role_above_that_stays_away_is_named_once_an_absence(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        told = WayUp("cloud", "10.0.0.3:7100", seconds=0.05)
        for state in ("refused", "connected", "refused", "reset", "connected"):
            told(state)
        await asyncio.sleep(0.1)
        assert not warnings(caplog)
        for _ in range(2):
            told("refused")
            told("no route")
            await asyncio.sleep(0.12)
            told("connected")

    with caplog.at_level(logging.INFO, "splitllm"):
        asyncio.run(run())
    assert [line.partition(":")[0] for line in warnings(caplog)] == [
        "cloud has been away for 0.05 seconds and is waited for"
    ] * 2


def test_a_role_above_that_never_was_reached_is_named_with_its_address(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        told = WayUp("cloud", "10.0.0.3:7100", seconds=0.05)
        for state in ("refused", "no route"):
            told(state)
            await asyncio.sleep(0.08)

    asyncio.run(run())
    [line] = warnings(caplog)
    assert line.startswith(
        "cloud has not been reached at 10.0.0.3:7100 for 0.05 seconds and is waited for: start it, "
        "or correct wire.addresses.cloud"
    )


def test_roles_below_that_stay_away_are_named_once_an_absence(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        absence = Absence(["client-0", "client-1", "client-2"], None)
        absence.back("client-0")
        absence.left("client-2")
        task = asyncio.create_task(say_who_is_missing(absence.missing, seconds=0.05))
        await asyncio.sleep(0.15)
        absence.back("client-1")
        await asyncio.sleep(0.05)
        absence.away("client-1")
        await asyncio.sleep(0.15)
        task.cancel()

    asyncio.run(run())
    assert warnings(caplog) == ["client-1 has been away for 0.05 seconds and is waited for: start it"] * 2


def test_whom_the_recipe_leaves_out_is_not_waited_for() -> None:
    async def run() -> list[str]:
        absence = Absence(["client-0"], 0.01)
        await asyncio.sleep(0.05)
        return absence.missing(0.02)

    assert asyncio.run(run()) == []
