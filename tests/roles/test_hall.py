"""Rounds that wait for nobody for ever: who is counted, who is late, what is repeated; what a restart brings back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
import torch

from splitllm.errors import DivergedError, PeerError
from splitllm.policy.participation import Rules
from splitllm.roles.convening import Reports
from splitllm.roles.hall import Hall
from tests.roles.halls import Above, Clock, Disk, brought, constant, hall_of, like, paced


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


async def settled() -> None:
    """Until nobody has anything to do."""
    for _ in range(50):
        await asyncio.sleep(0.001)


def test_a_round_of_all_waits_for_all_and_weighs_them() -> None:
    async def test() -> None:
        hall = hall_of(paced(), Rules())
        tasks = [asyncio.create_task(hall.bring(brought(hall, c, 2, float(c), weight=c + 1.0))) for c in range(3)]
        await settled()
        assert not any(task.done() for task in tasks) and hall.book.number == 0
        last = await hall.bring(brought(hall, 3, 2, 3.0, weight=4.0))
        for verdict in (last, *[await task for task in tasks]):
            assert constant(verdict.value) == pytest.approx((0 * 1 + 1 * 2 + 2 * 3 + 3 * 4) / 10)
        assert [report["updates"] for report in last.reports] == [4]

    run(test)


def test_with_a_deadline_who_is_slow_is_left_behind_and_takes_up_what_it_missed() -> None:
    async def test() -> None:
        clock = Clock()
        hall = hall_of(paced(), Rules(deadline=10.0, minimum=2), clock=clock)
        assert all(hall.asks(f"client-{client}", 0) for client in range(4))
        fast = [asyncio.create_task(hall.bring(brought(hall, c, 2, 4.0))) for c in (0, 1)]
        await settled()
        clock.now = 9.9
        hall.look()
        await settled()
        assert not fast[0].done()
        clock.now = 10.0
        hall.look()
        assert [constant((await task).value) for task in fast] == [4.0, 4.0]
        assert not hall.asks("client-3", 1)  # its round is over: it need not go on
        assert hall.asks("client-0", 2)
        late = await hall.bring(brought(hall, 3, 2, 100.0))
        assert constant(late.value) == 4.0 and late.reports == fast[0].result().reports
        rest = [asyncio.create_task(hall.bring(brought(hall, c, 4, 6.0))) for c in range(4)]
        assert {constant((await task).value) for task in rest} == {7.0}  # the server above has added 1

    run(test)


def test_of_more_that_are_asked_than_wanted_the_first_are_counted() -> None:
    async def test() -> None:
        hall = hall_of(paced(), Rules("random", count=2, over=1.5))
        asked = [client for client in range(4) if hall.asks(f"client-{client}", 0)]
        assert len(asked) == 3
        idle = next(client for client in range(4) if client not in asked)
        waiting = asyncio.create_task(hall.bring(brought(hall, idle, 2, 50.0, weight=0.0)))
        first, second, third = asked
        one = asyncio.create_task(hall.bring(brought(hall, first, 2, 1.0)))
        await settled()
        assert not one.done() and not waiting.done()
        assert constant((await hall.bring(brought(hall, second, 2, 3.0))).value) == 2.0
        assert constant((await one).value) == 2.0 == constant((await waiting).value)
        assert constant((await hall.bring(brought(hall, third, 2, 9.0))).value) == 2.0

    run(test)


def test_a_round_below_its_minimum_is_repeated_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        clock = Clock()
        hall = hall_of(paced(), Rules(deadline=10.0, minimum=3), clock=clock)
        assert hall.asks("client-0", 0)
        early = [asyncio.create_task(hall.bring(brought(hall, c, 2, 1.0))) for c in (0, 1)]
        await settled()
        clock.now = 10.0
        hall.look()
        await settled()
        assert not any(task.done() for task in early) and hall.book.number == 0
        assert hall.asks("client-3", 1)
        assert constant((await hall.bring(brought(hall, 2, 2, 4.0))).value) == 2.0
        assert constant((await early[0]).value) == 2.0 and hall.book.number == 1

    run(test)
    assert "round 1, attempt 1 is void and repeated: 2 of at least 3 clients arrived" in caplog.text


def test_a_round_that_cannot_be_held_any_more_is_given_up_and_all_go_on_with_what_they_have() -> None:
    async def test() -> None:
        hall = hall_of(paced(), Rules("random", count=2, minimum=2))
        asked = [client for client in range(4) if hall.asks(f"client-{client}", 0)]
        idle = [client for client in range(4) if client not in asked]
        waiting = [asyncio.create_task(hall.bring(brought(hall, c, 2, 9.0, weight=0.0))) for c in idle]
        one = asyncio.create_task(hall.bring(brought(hall, asked[0], 2, 9.0)))
        await settled()
        hall.over(asked[1])
        verdicts = [await one, *[await task for task in waiting]]
        assert all(verdict.value is None for verdict in verdicts) and hall.book.number == 1
        assert verdicts[0].reports[0]["void"].startswith("round 1, attempt 1 is void")
        left = [client for client in range(4) if client != asked[1]]
        assert sum(hall.asks(f"client-{client}", 2) for client in left) == 2

    run(test)


def test_who_comes_late_to_a_round_that_was_void_keeps_its_own_also_after_a_restart() -> None:
    async def test() -> None:
        disk, rules = Disk(), Rules("random", count=3, minimum=3)
        hall = hall_of(paced(cloud_every=8), rules, disk)
        asked = [client for client in range(4) if hall.asks(f"client-{client}", 0)]
        held = [asyncio.create_task(hall.bring(brought(hall, client, 2, 1.0))) for client in asked]
        assert {constant((await task).value) for task in held} == {1.0}
        early, gone, late = [client for client in range(4) if hall.asks(f"client-{client}", 2)]
        (idle,) = {0, 1, 2, 3} - {early, gone, late}
        here = [asyncio.create_task(hall.bring(brought(hall, c, 4, 9.0, float(c == early)))) for c in (early, idle)]
        await settled()
        hall.over(gone)
        assert [(await task).value for task in here] == [None, None]
        restarted = hall_of(paced(cloud_every=8), rules, disk)
        for one in (hall, restarted):
            verdict = await one.bring(brought(one, late, 4, 9.0))
            assert verdict.value is None and verdict.reports == here[0].result().reports
            assert constant((await one.bring(brought(one, late, 2, 9.0))).value) == 1.0  # that one was not void
        restarted.over(gone)
        held = [asyncio.create_task(restarted.bring(brought(restarted, c, 6, 3.0))) for c in (early, idle, late)]
        assert {constant((await task).value) for task in held} == {3.0}
        assert constant((await restarted.bring(brought(restarted, gone, 4, 9.0))).value) == 3.0

    run(test)


def test_who_is_away_is_not_asked_for_a_new_round_and_who_comes_back_is() -> None:
    async def test() -> None:
        hall = hall_of(paced(), Rules())
        hall.away("client-2")
        assert [hall.asks(f"client-{client}", 0) for client in range(4)] == [True, True, False, True]
        tasks = [asyncio.create_task(hall.bring(brought(hall, c, 2, 5.0))) for c in (0, 1, 3)]
        assert {constant((await task).value) for task in tasks} == {5.0}
        hall.back("client-2")
        assert constant((await hall.bring(brought(hall, 2, 2, 5.0, weight=0.0))).value) == 5.0
        assert all(hall.asks(f"client-{client}", 2) for client in range(4))

    run(test)


def test_who_never_came_costs_one_deadline_and_not_one_a_round() -> None:
    async def test() -> None:
        clock = Clock()
        hall = hall_of(paced(), Rules(deadline=10.0), clock=clock)
        first = [asyncio.create_task(hall.bring(brought(hall, c, 2, 5.0))) for c in (0, 1, 2)]
        await settled()
        assert not first[0].done()
        clock.now = 10.0
        hall.look()
        assert {constant((await task).value) for task in first} == {5.0}
        then = [asyncio.create_task(hall.bring(brought(hall, c, 4, 6.0))) for c in (0, 1, 2)]
        assert {constant((await task).value) for task in then} == {7.0}
        hall.back("client-3")
        assert hall.asks("client-3", 4)

    run(test)


def test_what_is_not_finite_is_left_out_and_named_and_what_all_bring_ends_them() -> None:
    async def test() -> None:
        hall = hall_of(paced(), Rules())
        tasks = [asyncio.create_task(hall.bring(brought(hall, c, 2, 2.0))) for c in (0, 1, 2)]
        await settled()
        verdict = await hall.bring(brought(hall, 3, 2, float("nan"), spoiled=True))
        assert constant(verdict.value) == 2.0 == constant((await tasks[0]).value)
        assert verdict.reports[0]["rejected"] == {"client-3": "not finite"}
        bad = [asyncio.create_task(hall.bring(brought(hall, c, 4, float("nan"), spoiled=True))) for c in range(4)]
        for task in bad:
            with pytest.raises(DivergedError, match="nothing is left to average"):
                await task
        good = [asyncio.create_task(hall.bring(brought(hall, c, 4, 3.0))) for c in range(4)]
        assert {constant((await task).value) for task in good} == {4.0}

    run(test)


def test_what_is_not_finite_does_not_make_up_the_minimum() -> None:
    async def test() -> None:
        clock = Clock()
        hall = hall_of(paced(), Rules(deadline=10.0), clock=clock)
        bad = asyncio.create_task(hall.bring(brought(hall, 3, 2, float("nan"), spoiled=True)))
        await settled()
        clock.now = 10.0
        hall.look()
        await settled()
        assert not bad.done()  # the round is repeated, for the others
        verdict = await hall.bring(brought(hall, 1, 2, 2.0))
        assert constant(verdict.value) == 2.0 == constant((await bad).value)
        assert verdict.reports[0]["rejected"] == {"client-3": "not finite"}

    run(test)


def test_who_brings_the_same_again_is_counted_once_also_after_a_restart() -> None:
    async def test() -> None:
        disk = Disk()
        hall = hall_of(paced(), Rules(), disk)
        first = asyncio.create_task(hall.bring(brought(hall, 0, 2, 8.0)))
        await settled()
        first.cancel()  # its process is lost, and it comes again
        again = asyncio.create_task(hall.bring(brought(hall, 0, 2, 8.0)))
        tasks = [asyncio.create_task(hall.bring(brought(hall, c, 2, 0.0))) for c in (1, 2, 3)]
        assert constant((await again).value) == 2.0 == constant((await tasks[0]).value)
        restarted = hall_of(paced(), Rules(), disk)
        assert restarted.book.number == 1
        assert constant((await restarted.bring(brought(restarted, 0, 2, 8.0))).value) == 2.0
        assert restarted.book.number == 1

    run(test)


def test_what_goes_further_up_is_all_since_the_last_time_and_is_brought_once() -> None:
    async def test() -> None:
        disk, above = Disk(), Above()
        hall = hall_of(paced(2, 1), Rules(), disk, above=above)
        for steps in (2, 4):
            tasks = [asyncio.create_task(hall.bring(brought(hall, c, steps, 2.0, weight=c + 1.0))) for c in range(2)]
            found = {constant((await task).value) for task in tasks}
        assert found == {3.0}
        ((at, weights, _, value),) = above.asked
        assert at == 4 and weights == {0: 2.0, 1: 4.0} and constant(value) == 2.0

        class Lost(Above):
            async def merge(self, *asked: object, **more: object) -> None:  # type: ignore[override]
                raise ConnectionError

        hall = hall_of(paced(2, 1), Rules(), disk, above=Lost())
        tasks = [asyncio.create_task(hall.bring(brought(hall, c, 6, 5.0))) for c in range(2)]
        assert {constant((await task).value) for task in tasks} == {5.0}
        tasks = [asyncio.create_task(hall.bring(brought(hall, c, 8, 6.0))) for c in range(2)]
        for task in tasks:
            with pytest.raises(ConnectionError):
                await task
        above, other = Above(), 7.0  # what is formed anew after a restart is not what was sent
        hall = hall_of(paced(2, 1), Rules(), disk, above=above)
        tasks = [asyncio.create_task(hall.bring(brought(hall, c, 8, other))) for c in range(2)]
        assert {constant((await task).value) for task in tasks} == {7.0}
        ((at, weights, _, value),) = above.asked
        assert at == 8 and constant(value) == 6.0
        assert weights == {0: 2.0, 1: 2.0}  # of both rounds, the second of which was begun twice

    run(test)


def test_a_round_that_is_not_due_is_refused() -> None:
    async def test() -> None:
        hall = hall_of(paced(), Rules())
        with pytest.raises(PeerError, match="client-0 brought round 2, where 1 is due"):
            await hall.bring(brought(hall, 0, 4, 1.0))

    run(test)


def test_nothing_that_was_handed_out_is_shared_with_what_is_handed_out_next() -> None:
    async def test() -> None:
        hall = hall_of(paced(2, 1), Rules())
        start = {name: tensor.clone() for name, tensor in like(hall).items()}
        tasks = [asyncio.create_task(hall.bring(brought(hall, c, 2, 1.0))) for c in range(2)]
        verdict = await tasks[0]
        assert verdict.value is not None
        for tensor in verdict.value.values():
            tensor.fill_(99.0)
        assert constant(like(hall)) == 1.0
        assert all(torch.equal(tensor, start[name]) is False for name, tensor in like(hall).items())

    run(test)


def test_who_comes_after_the_deadline_to_a_round_without_anybody_counts_when_it_is_repeated() -> None:
    async def test() -> None:
        clock = Clock()
        hall = hall_of(paced(), Rules(deadline=1.0, minimum=2), clock=clock)
        assert all(hall.asks(f"client-{client}", 0) for client in range(4))
        clock.now = 5.0  # all are slower than the deadline
        slow = asyncio.create_task(hall.bring(brought(hall, 0, 2, 0.0)))
        await settled()
        assert not slow.done()
        verdict = await hall.bring(brought(hall, 1, 2, 2.0))
        assert constant(verdict.value) == 1.0 == constant((await slow).value)
        assert verdict.reports[0]["updates"] == 2

    run(test)


def test_a_deadline_that_nobody_can_meet_is_tried_again_without_end_and_stops_nothing_else() -> None:
    async def test() -> None:
        hall = hall_of(paced(), Rules(deadline=1e-9, minimum=2), clock=time.monotonic)
        one = asyncio.create_task(hall.bring(brought(hall, 0, 2, 2.0)))
        await settled()
        assert not one.done()
        assert constant((await hall.bring(brought(hall, 1, 2, 4.0))).value) == 3.0 == constant((await one).value)

    run(test)


def test_what_is_not_on_disk_yet_is_not_heard_by_who_comes_late() -> None:
    async def test() -> None:
        class Slow(Disk):
            def __init__(self) -> None:
                super().__init__()
                self.may = threading.Event()

            def write(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
                assert self.may.wait(10)
                super().write(tensors, values)

        clock, disk = Clock(), Slow()
        hall = hall_of(paced(), Rules(deadline=1.0), disk, clock)
        one = asyncio.create_task(hall.bring(brought(hall, 0, 2, 2.0)))
        await settled()
        clock.now = 1.0
        hall.look()
        await settled()
        late = asyncio.create_task(hall.bring(brought(hall, 1, 2, 9.0)))
        await settled()
        assert not one.done() and not late.done()
        disk.may.set()
        assert constant((await late).value) == 2.0 == constant((await one).value)
        assert disk.writes == 1

    run(test)


def test_a_round_of_which_nothing_can_be_told_keeps_nobody_waiting() -> None:
    async def test() -> None:
        def full(_steps: int, _reports: Reports) -> None:
            raise OSError("no space left")

        usual = hall_of(paced(), Rules())
        members = {f"client-{client}": [client] for client in range(4)}
        hall = Hall(usual.book, members, Rules(), every=2, steps=8, seed=0, clock=Clock(), observe=full)
        tasks = [asyncio.create_task(hall.bring(brought(hall, c, 2, 2.0))) for c in range(4)]
        for task in tasks:
            with pytest.raises(OSError, match="no space"):
                await asyncio.wait_for(task, 5)

    run(test)
