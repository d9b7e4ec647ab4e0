"""A signal is heard while a role waits for something that comes before it takes part."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from splitllm.deployment.stop import Stop
from splitllm.errors import RunInterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop(number: signal.Signals) -> None:
    async def run() -> bool:
        stop = Stop()
        os.kill(os.getpid(), number)
        async with asyncio.timeout(5):
            return await stop.asked.wait()

    assert asyncio.run(run())


def test_what_comes_before_ends_with_its_result_or_with_the_signal() -> None:
    async def run() -> bool:
        stop, never = Stop(), asyncio.get_running_loop().create_future()
        assert await stop.unless_asked(asyncio.sleep(0, "welcome")) == "welcome"
        asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), signal.SIGTERM)
        with pytest.raises(RunInterrupted, match=r"^stopped before it took part; start it again"):
            async with asyncio.timeout(5):
                await stop.unless_asked(never)
        return never.cancelled()

    assert asyncio.run(run())
