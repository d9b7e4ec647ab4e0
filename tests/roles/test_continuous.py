"""The scheduler of whoever is ready, with a real worker: in what order, who waits for whom, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitllm.model.joined import Rows
from splitllm.model.randomness import MicroBatchId
from splitllm.policy.batching import Budget
from splitllm.roles.assembly import Roles
from splitllm.roles.continuous import Continuous
from splitllm.roles.device import Device, DeviceThread, Inline
from splitllm.roles.questions import LossAsk, Upward
from splitllm.roles.runner import Runner
from splitllm.roles.worker import Ask, Pass, Worker
from tests.families import corpus, roles_of
from tests.roles.test_batching import alike, wanted

CLIENTS = 4
WIDTH = 32
PLENTY = 1 << 40
LONG = 1000.0
"""Seconds of patience that no test waits for."""


@dataclass
class Seen:
    """A worker under test, and whose micro-batches it ran forward and backward."""

    worker: Worker
    ran: list[tuple[str, list[int]]] = field(default_factory=list)


@cache
def _roles() -> tuple[Roles, dict[str, torch.Tensor]]:
    """Clients with dropout in their adapters and different cuts, and their state before anything."""
    settings = wanted(
        "llama",
        [2, 4],
        "cloud",
        CLIENTS,
        "float64",
        split={"client_cuts": {f"client-{client}": cut_of(client) for client in range(CLIENTS)}},
        server={"batching": "continuous"},
        lora={"adapters": "per_client", "dropout": 0.2},
    )
    roles = roles_of(settings, corpus(CLIENTS, 5))
    alike(roles)
    return roles, {key: tensor.clone() for key, tensor in roles.state().items()}


def cut_of(client: int) -> int:
    return 1 + client % 3


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen(fresh())
    forward, backward = Worker.forward, Worker.backward

    def note_forward(self: Worker, asks: Sequence[Ask]) -> list[Pass]:
        found.ran.append(("forward", [ask.rows.micro_batch.client for ask in asks]))
        return forward(self, asks)

    def note_backward(self: Worker, runs: Sequence[Pass], gradients: Any, **more: Any) -> Any:
        found.ran.append(("backward", [run.micro_batch.client for run in runs]))
        return backward(self, runs, gradients, **more)

    monkeypatch.setattr(Worker, "forward", note_forward)
    monkeypatch.setattr(Worker, "backward", note_backward)
    return found


def fresh(tier: str = "cloud") -> Worker:
    """The worker as it was made: of the cloud, which has the head, or of an edge, where clients enter apart."""
    roles, state = _roles()
    roles.load(state)
    worker = next(iter(roles.workers[tier].values()))
    worker.expect([MicroBatchId(0, client, number) for client in range(CLIENTS) for number in range(2)])
    return worker


def ask(client: int, number: int = 0, *, train: bool = True, entry: int = 0, lengths: tuple[int, ...] = (5, 7)) -> Ask:
    generator = torch.Generator().manual_seed(10 * client + number)
    hidden_TD = torch.randn(sum(lengths), WIDTH, dtype=torch.float64, generator=generator)
    return Ask(
        Rows(MicroBatchId(0 if train else -1, client, number), lengths, entry),
        hidden_TD,
        train=train,
        input_gradient=True,
    )


def gradient_of(run: Pass) -> torch.Tensor:
    generator = torch.Generator().manual_seed(run.micro_batch.client)
    return torch.randn(run.output_TD.shape, dtype=torch.float64, generator=generator)


def up(run: Pass, positions: int | None = None) -> Upward:
    """Its gradient; of some positions only, where the labels stay with the client."""
    if positions is None:
        return Upward(run, gradient_of(run), run.output_TD)
    output = run.output_TD.index_select(0, torch.arange(positions))
    return Upward(run, gradient_of(run)[:positions], output)


def scheduler(worker: Worker, patience: float = LONG, device: Device | None = None, **more: Any) -> Continuous:
    budget = Budget(4096, more.pop("memory", PLENTY), wait=0.0, starve=more.pop("starve", 10.0))
    return Continuous(Runner(worker, device or Inline()), budget, patience, **more)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def inner() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(inner())


def is_empty(continuous: Continuous) -> bool:
    """Nothing is held, and nothing waits."""
    kept = [continuous._ready, continuous._graphs, continuous._due, continuous._late, continuous._again]
    waiting = continuous.runner.device.occupancy._waiting
    return not any(kept) and continuous._held == 0 and waiting == 0


class Saved:
    """A tensor saved for the backward; it goes when its node of the graph does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@contextmanager
def counting() -> Iterator[weakref.WeakSet[Saved]]:
    """The large tensors that graphs made meanwhile keep."""
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        if tensor.numel() >= 10 * WIDTH and not isinstance(tensor, torch.nn.Parameter):
            alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        yield alive


def test_what_is_ready_runs_together_and_gradients_go_before_new_activations(seen: Seen) -> None:
    async def test() -> None:
        continuous = scheduler(seen.worker)
        runs = await asyncio.gather(*(continuous.forward(ask(client)) for client in range(3)))
        new = asyncio.create_task(continuous.forward(ask(3)))
        await asyncio.gather(new, *(continuous.backward(up(run)) for run in runs))
        assert seen.ran == [("forward", [0, 1, 2]), ("backward", [0, 1, 2]), ("forward", [3])]
        continuous.abandon(new.result())
        assert is_empty(continuous)

    run(test)


def test_training_and_evaluation_and_losses_never_share_a_batch(seen: Seen) -> None:
    async def test() -> None:
        continuous = scheduler(seen.worker)
        some = torch.tensor([1, 3])
        losses = [LossAsk(ask(client, train=client < 2), some, some, 0.1) for client in range(4)]
        forwards = [ask(client, 1, train=client < 2) for client in range(4)]
        answers = await asyncio.gather(*map(continuous.loss, losses), *map(continuous.forward, forwards))
        batches = [clients for kind, clients in seen.ran if kind == "forward"]
        assert sorted(batches) == [[0, 1], [0, 1], [2, 3], [2, 3]]
        for run in answers[4:6]:
            continuous.abandon(run)  # type: ignore[arg-type]
        assert is_empty(continuous), "what is evaluated holds nothing"

    run(test)


def test_whoever_is_abandoned_is_not_waited_for(seen: Seen) -> None:
    async def test() -> None:
        continuous = scheduler(seen.worker, price=lambda ask: 100)
        runs = await asyncio.gather(*(continuous.forward(ask(client)) for client in range(3)))
        first = asyncio.create_task(continuous.backward(up(runs[0])))
        second = asyncio.create_task(continuous.backward(up(runs[2])))
        await asyncio.sleep(0.01)
        assert not first.done() and continuous._held == 300
        continuous.abandon(runs[1])
        await asyncio.gather(first, second)
        assert seen.ran[1:] == [("backward", [0, 2])] and is_empty(continuous)

        runs = await asyncio.gather(*(continuous.forward(ask(client, 1)) for client in range(2)))
        for each in runs:
            continuous.abandon(each)
        assert is_empty(continuous), "and where all are, nothing is held"

    run(test)


@dataclass
class Learned:
    """What came of one round: gradients of the inputs by client, and of every client's own adapter."""

    inputs: dict[int, torch.Tensor | None]
    own: dict[int, dict[str, torch.Tensor]]


def learn(patience: float, late: int, positions: int | None) -> Learned:
    """One micro-batch of each client below an edge, entering at different layers; the last of them may come late.

    Those who are not late step their adapters before its gradient comes. All of it twice: of the largest batch so far
    the tensors are counted, and then autograd does not notice that one of them has changed.
    """
    learned = Learned({}, {})

    async def once() -> None:
        worker = fresh("edge")
        continuous, clients = scheduler(worker, patience), sorted(worker.own)
        worker.expect([MicroBatchId(0, client, 0) for client in clients])
        runs = await asyncio.gather(*(continuous.forward(ask(client, entry=cut_of(client))) for client in clients))
        groups = [clients[: len(clients) - late], clients[len(clients) - late :]]
        for group in groups:
            answers = (continuous.backward(up(runs[clients.index(client)], positions)) for client in group)
            learned.inputs.update(zip(group, await asyncio.gather(*answers), strict=True))
            for client in group:
                learned.own[client] = {name: t.clone() for name, t in worker.own[client].gradients().items()}
                worker.own[client].apply(learned.own[client], 1.0, 1.0)
        assert is_empty(continuous)

    async def twice() -> None:
        await once()
        await once()

    run(twice)
    return learned


@pytest.mark.parametrize("positions", [None, 4], ids=["all positions", "labelled positions"])
def test_gradients_that_come_late_are_those_of_a_whole_batch(positions: int | None) -> None:
    whole, apart = learn(LONG, 0, positions), learn(0.0, 1, positions)
    for client, gradient in whole.inputs.items():
        assert gradient is not None
        torch.testing.assert_close(apart.inputs[client], gradient, rtol=0, atol=1e-12 * float(gradient.abs().max()))
        for name, own in whole.own[client].items():
            torch.testing.assert_close(apart.own[client][name], own, rtol=0, atol=1e-12 * float(own.abs().max()))
            assert float(own.abs().max()) > 0


def test_those_who_are_late_go_again_in_one_batch(seen: Seen) -> None:
    async def test() -> None:
        continuous = scheduler(seen.worker, 0.0)
        runs = await asyncio.gather(*(continuous.forward(ask(client)) for client in range(4)))
        await continuous.backward(up(runs[3]))
        assert not continuous._graphs and len(continuous._late) == 3
        await asyncio.gather(*(continuous.backward(up(run)) for run in runs[:2]))
        assert seen.ran[1:] == [("backward", [3]), ("forward", [0, 1]), ("backward", [0, 1])]
        continuous.abandon(runs[2])
        assert is_empty(continuous)

    run(test)


@pytest.mark.parametrize("late", [0, 1], ids=["all at once", "one never comes"])
def test_the_graph_goes_with_the_first_backward_whoever_holds_its_outputs(late: int, seen: Seen) -> None:
    async def test() -> None:
        continuous = scheduler(seen.worker, 0.0, price=lambda ask: 7)
        one = torch.tensor([1])
        await asyncio.gather(*(continuous.loss(LossAsk(ask(c), one, one, 0.1)) for c in range(4)))  # the largest batch
        with counting() as alive:
            runs = await asyncio.gather(*(continuous.forward(ask(client, 1)) for client in range(3)))
        gc.collect()
        held = len(alive)
        assert held > 20 and continuous._held == 21
        await asyncio.gather(*(continuous.backward(up(run)) for run in runs[late:]))
        gc.collect()
        assert len(alive) == 0 and continuous._held == 0
        assert [run.output_TD.shape for run in runs] == [(12, WIDTH)] * 3

    run(test)


def test_no_more_memory_is_held_than_there_is_and_what_waits_for_it_runs_at_last(seen: Seen) -> None:
    async def test() -> None:
        continuous = scheduler(seen.worker, memory=250, price=lambda ask: 100)
        asked = [asyncio.create_task(continuous.forward(ask(client))) for client in range(4)]
        await asyncio.sleep(0.01)
        assert [task.done() for task in asked] == [True, True, False, False] and continuous._held == 200
        evaluated = asyncio.create_task(continuous.forward(ask(0, train=False)))
        await asyncio.gather(*(continuous.backward(up(task.result())) for task in asked[:2]))
        await asyncio.gather(*asked, evaluated)
        assert [clients for kind, clients in seen.ran if kind == "forward"] == [[0, 1], [2, 3], [0]]
        await asyncio.gather(*(continuous.backward(up(task.result())) for task in asked[2:]))
        assert is_empty(continuous)

    run(test)


def test_who_holds_memory_and_is_silent_is_late_before_anybody_starves(seen: Seen) -> None:
    async def test() -> None:
        continuous = scheduler(seen.worker, memory=250, price=lambda rows: 100, starve=0.05)
        one = torch.tensor([1])
        await asyncio.gather(
            *(continuous.loss(LossAsk(ask(c, 1), one, one, 0.1)) for c in range(4))
        )  # the largest batch
        seen.ran.clear()
        with counting() as alive:
            silent = await asyncio.gather(*(continuous.forward(ask(client)) for client in range(2)))
        assert len(alive) > 20
        begun = asyncio.get_running_loop().time()
        other = await continuous.forward(ask(2))
        assert 0.05 <= asyncio.get_running_loop().time() - begun < 5 and continuous._held == 100
        gc.collect()
        assert len(alive) == 0, "what is let go is gone"
        gradients = await asyncio.gather(*(continuous.backward(up(run)) for run in (*silent, other)))
        assert all(gradient is not None for gradient in gradients) and is_empty(continuous)
        assert [clients for kind, clients in seen.ran if kind == "forward"] == [[0, 1], [2], [0, 1]]

    run(test)


def test_whoever_breaks_a_batch_fails_alone(seen: Seen) -> None:
    async def test() -> None:
        continuous = scheduler(seen.worker)
        broken = replace(ask(1), inputs=torch.zeros(12, WIDTH + 1, dtype=torch.float64))
        asks = [ask(0), broken, ask(2)]
        answers = await asyncio.gather(*map(continuous.forward, asks), return_exceptions=True)
        assert [isinstance(answer, Exception) for answer in answers] == [False, True, False]
        for answer in answers[::2]:
            assert isinstance(answer, Pass)
            assert await continuous.backward(up(answer)) is not None
        assert is_empty(continuous)

    run(test)


def test_where_all_who_came_are_gone_their_graph_is_too(seen: Seen) -> None:
    async def test() -> None:
        continuous, one = scheduler(seen.worker, 0.0, price=lambda rows: 7), torch.tensor([1])
        await asyncio.gather(*(continuous.loss(LossAsk(ask(c), one, one, 0.1)) for c in range(4)))  # the largest batch
        with counting() as alive:
            runs = await asyncio.gather(*(continuous.forward(ask(client, 1)) for client in range(2)))
        coming = asyncio.create_task(continuous.backward(up(runs[0])))
        await asyncio.sleep(0)
        coming.cancel()
        await asyncio.sleep(0.05)
        gc.collect()
        assert len(alive) == 0 and continuous._held == 0 and runs[0].output_TD.shape == (12, WIDTH)
        continuous.abandon(runs[1])
        assert is_empty(continuous)

    run(test)


FATES = ("learn", "late", "abandon", "cancel forward", "cancel backward")


@settings(max_examples=25)
@given(
    fates=st.lists(st.tuples(st.sampled_from(FATES), st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=4),
    threaded=st.booleans(),
    memory=st.sampled_from([100, 250, PLENTY]),
)
def test_whatever_is_cancelled_nothing_is_left_behind_and_the_others_learn(
    fates: list[tuple[str, int, int]], threaded: bool, memory: int
) -> None:
    alone = _alone()
    worker = fresh()
    learned: dict[int, torch.Tensor] = {}

    async def live(continuous: Continuous, client: int, fate: str, before: int, pauses: int) -> None:
        for _ in range(before):
            await asyncio.sleep(0)
        forward = asyncio.create_task(continuous.forward(ask(client)))
        if fate == "cancel forward":
            await asyncio.sleep(pauses / 2000)
            forward.cancel()
            if isinstance((await asyncio.gather(forward, return_exceptions=True))[0], Pass):
                continuous.abandon(forward.result())
            return
        found = await forward
        await asyncio.sleep(0.01 if fate == "late" else pauses / 2000)
        if fate == "abandon":
            continuous.abandon(found)
            return
        backward = asyncio.create_task(continuous.backward(up(found)))
        if fate == "cancel backward":
            await asyncio.sleep(pauses / 2000)
            backward.cancel()
            await asyncio.gather(backward, return_exceptions=True)
            return
        gradient = await backward
        assert gradient is not None
        learned[client] = gradient

    async def test() -> None:
        device = DeviceThread(1) if threaded else Inline()
        continuous = scheduler(worker, 0.002, device, memory=memory, price=lambda ask: 100)
        await asyncio.gather(*(live(continuous, client, *fate) for client, fate in enumerate(fates)))
        while continuous._working is not None and not continuous._working.done():
            await asyncio.sleep(0.001)
        assert is_empty(continuous)
        if isinstance(device, DeviceThread):
            device.close()

    run(test)
    assert sorted(learned) == [client for client, (fate, *_) in enumerate(fates) if fate in ("learn", "late")]
    for client, gradient in learned.items():
        own = worker.own[client]._sum
        assert own is not None
        found = {"input": gradient, **own._early.get(MicroBatchId(0, client, 0), own._total or {})}
        for name, tensor in alone[client].items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12 * float(tensor.abs().max()))


@cache
def _alone() -> list[dict[str, torch.Tensor]]:
    """Of every client what it learns when it runs by itself."""
    found = []
    worker = fresh()
    for client in range(CLIENTS):
        (only,) = worker.forward([ask(client)])
        (gradient,) = worker.backward([only], [gradient_of(only)])
        own = worker.own[client]._sum
        assert gradient is not None and own is not None and own._total is not None
        found.append({"input": gradient, **{name: tensor.clone() for name, tensor in own._total.items()}})
    return found
