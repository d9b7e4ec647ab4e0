"""The device thread: gradients first, otherwise in the order of asking; what nobody waits for is never computed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitllm.roles.device import Device, DeviceThread, Inline
from tests.families import corpus, recipe, roles_of
from tests.roles.tree import same
from tests.test_exactness import adapter_of


@pytest.fixture
def device() -> Iterator[DeviceThread]:
    thread = DeviceThread(1)
    yield thread
    thread.close()


async def blocked(device: DeviceThread) -> threading.Event:
    """Keeps the thread busy until the event is set."""
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def job() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(10)

    device.blocker = asyncio.create_task(device.run(job))  # type: ignore[attr-defined]
    await begun.wait()
    return go_on


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), max_size=12))
def test_urgent_jobs_go_first_and_equals_in_the_order_of_asking(urgent: list[bool]) -> None:
    async def run() -> list[int]:
        device, ran = DeviceThread(1), list[int]()
        go_on = await blocked(device)
        jobs = [asyncio.create_task(device.run(lambda n=n: ran.append(n), urgent=u)) for n, u in enumerate(urgent)]
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(*jobs)
        device.close()
        return ran

    order = [number for wanted in (True, False) for number, urgency in enumerate(urgent) if urgency is wanted]
    assert asyncio.run(run()) == order


def test_a_job_cancelled_before_its_turn_is_never_run(device: DeviceThread) -> None:
    async def run() -> list[str]:
        ran: list[str] = []
        go_on = await blocked(device)
        first, second = (asyncio.create_task(device.run(lambda n=name: ran.append(n))) for name in ("first", "second"))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await second
        with pytest.raises(asyncio.CancelledError):
            await first
        return ran

    assert asyncio.run(run()) == ["second"]


def test_a_job_cancelled_in_its_turn_ends_before_the_next_begins(device: DeviceThread) -> None:
    async def run() -> list[str]:
        ran, begun, go_on = list[str](), asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def slow() -> None:
            loop.call_soon_threadsafe(begun.set)
            assert go_on.wait(10)
            ran.append("slow")

        job = asyncio.create_task(device.run(slow))
        await begun.wait()
        job.cancel()
        after = asyncio.create_task(device.run(lambda: ran.append("after"), urgent=True))
        await asyncio.sleep(0)
        go_on.set()
        await after
        return ran

    assert asyncio.run(run()) == ["slow", "after"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_reaches_whoever_asked_and_the_thread_goes_on(device: DeviceThread, kind: type[BaseException]) -> None:
    def fail() -> None:
        raise kind("broken")

    async def run() -> int:
        with pytest.raises(kind, match="broken"):
            await device.run(fail)
        return await device.run(lambda: 7)

    assert asyncio.run(run()) == 7


def test_what_waits_is_computed_before_the_thread_ends() -> None:
    async def run() -> list[int]:
        device, ran = DeviceThread(1), list[int]()
        go_on = await blocked(device)
        jobs = [asyncio.create_task(device.run(lambda n=n: ran.append(n))) for n in range(3)]
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.to_thread(device.close)
        await asyncio.gather(*jobs)
        return ran

    assert asyncio.run(run()) == [0, 1, 2]


def test_a_loop_that_ended_does_not_end_the_thread(device: DeviceThread) -> None:
    go_on = asyncio.run(blocked(device))  # the loop is closed while the job runs
    go_on.set()
    assert asyncio.run(device.run(lambda: 3)) == 3


def test_torch_computes_with_as_many_threads_as_were_said(device: DeviceThread) -> None:
    before = torch.get_num_threads()
    assert asyncio.run(device.run(torch.get_num_threads)) == 1
    assert torch.get_num_threads() == before


def test_inline_computes_at_once() -> None:
    assert asyncio.run(Inline().run(lambda: threading.current_thread() is threading.main_thread()))


@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_a_run_on_the_thread_equals_one_inline_bit_for_bit(labels: str, device: DeviceThread) -> None:
    wanted = recipe("gpt2", [2, 4], labels, lora={"rank": 4, "alpha": 8, "dropout": 0.2}, train={"in_flight": 2})

    async def train(device: Device) -> dict[str, torch.Tensor]:
        roles = roles_of(wanted, corpus(2))
        links = [link for above in roles.links.values() for link in above]
        servers = [link._handler.__self__ for link in links]  # type: ignore[attr-defined]
        for role in [*servers, *roles.clients]:
            role.device = device
        for step in range(2):
            await asyncio.gather(*(client.step(step) for client in roles.clients))
        return adapter_of(roles)

    assert same(asyncio.run(train(device)), asyncio.run(train(Inline())))
