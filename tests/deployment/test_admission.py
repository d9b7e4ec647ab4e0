"""Clients are let in with what there is memory for, in a real run over real gRPC: the adapter is that of `train`."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitllm.deployment import admission, server
from splitllm.deployment.client import _attend
from splitllm.deployment.door import EVERYBODY
from splitllm.deployment.journal import Journal
from splitllm.deployment.server import _serve
from splitllm.deployment.station import Options, Station, open_station
from splitllm.errors import PeerError, RecipeError
from splitllm.plan import describe
from splitllm.preflight import prepare
from splitllm.recipe import Recipe, load_recipe
from splitllm.roles.admission import admissions
from splitllm.train import train
from splitllm.wire.message import Message
from splitllm.wire.stream import Refused
from tests.deployment.lanes import adapter, deployed, with_ports
from tests.processes import free_port
from tests.roles.tree import same
from tests.tiny import write_recipe
from tests.wire import serving

TWO = ["split.tiers={client: 2, cloud: 1}", "split.cuts=[2]", "train.threads=1", "server.memory_mib=1"]
SMALLER = [*TWO, "train.batch_size=8", "model.dropout=0.0"]
"""A client of 8 rows takes 0.65 of 1 MiB, one of 5 rows 0.41, and the server itself 0.03."""
ONE_REFUSED = [*TWO, "train.accumulate=7", "train.in_flight=7", "wire.absent=drop", "wire.drop_after=0.5"]
"""Already one row takes 0.53 MiB."""


def recipe_of(folder: Path, *words: str) -> Recipe:
    return load_recipe(write_recipe(folder), [*words, f"wire.addresses={{cloud: 127.0.0.1:{free_port()}}}"])


def stations(recipe: Recipe, folder: Path) -> list[Station]:
    """The cloud, and both clients."""
    names = {"cloud": None, "client-0": 0, "client-1": 1}
    return [open_station(recipe, Options(name, folder / name), client=client) for name, client in names.items()]


async def run(recipe: Recipe, folder: Path) -> None:
    cloud, *clients = stations(recipe, folder)
    async with asyncio.timeout(60):
        await asyncio.gather(_serve(cloud), *map(_attend, clients))


def assert_as_trained(recipe: Recipe, folder: Path) -> None:
    """In one process of `train`."""
    train(recipe, folder / "train")
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert same(load_file(folder / "cloud" / adapter), load_file(folder / "train" / adapter))


def said(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, Any]]:
    return [vars(record)["fields"] for record in caplog.records if record.getMessage() == message]


def test_a_run_with_smaller_batches_gives_the_adapter_of_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(tmp_path, *SMALLER)

    with caplog.at_level(logging.INFO, "splitllm"):
        asyncio.run(run(recipe, tmp_path))
    assert sorted(cut["batch size"] for cut in said(caplog, "cut")) == [5, 6]
    (decided,) = said(caplog, "admission")
    assert decided["smaller batches"] == {0: 6, 1: 5} and decided["refused"] == []
    assert decided["own MiB"] + decided["clients MiB"] <= decided["server.memory_mib"] == 1
    assert_as_trained(recipe, tmp_path)


def test_a_quota_makes_a_run_slower_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rate = 60.0
    words = [f"server.quota.tokens_per_second={rate}", "model.dropout=0.0", "server.memory_mib=null"]
    recipe = recipe_of(tmp_path, *TWO, *words)
    started = time.monotonic()
    with caplog.at_level(logging.INFO, "splitllm.deployment.client"):
        asyncio.run(run(recipe, tmp_path))
    took, tokens = time.monotonic() - started, sum(step["tokens"] for step in said(caplog, "step"))
    assert took > (tokens / 2 - rate) / rate > 0.5, "one of the two has half of them at least, and one second's at once"
    assert_as_trained(recipe, tmp_path)


def test_a_server_that_is_killed_and_comes_back_gives_the_same_batch_sizes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, *SMALLER, "train.steps=8")
    held: list[Journal] = []
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(server, "journals_of", lambda station: {EVERYBODY: held.append(j := station.journal()) or j})

    async def killed_run() -> None:
        cloud, *clients = stations(recipe, tmp_path)
        killed, others = asyncio.create_task(_serve(cloud)), [asyncio.create_task(_attend(one)) for one in clients]
        async with asyncio.timeout(60):
            while len(said(caplog, "step")) < 3:
                await asyncio.sleep(0.001)
            killed.cancel()
            await asyncio.wait([killed])
            held[0].close()  # as the end of a process does
            again = open_station(recipe, Options("cloud", tmp_path / "cloud"), client=None)
            await asyncio.gather(_serve(again), *others)

    with caplog.at_level(logging.INFO, "splitllm"):
        asyncio.run(killed_run())
    assert len(said(caplog, "rejoining")) >= 2
    first, second = said(caplog, "admission")
    assert first == second
    assert_as_trained(recipe, tmp_path)


def test_where_clients_go_at_their_own_pace_one_without_quota_left_holds_up_nobody(tmp_path: Path) -> None:
    lanes = ["server.batching=continuous", "lora.adapters=per_client", "server.tenants.client-1.tokens_per_second=1"]
    recipe = recipe_of(tmp_path, *SMALLER, *lanes)

    async def complete() -> None:
        cloud, first, second = stations(recipe, tmp_path)
        others = [asyncio.create_task(job) for job in (_serve(cloud), _attend(second))]
        async with asyncio.timeout(60):
            await _attend(first)
        assert not any(job.done() for job in others), "its next micro-batch may run in some minutes"
        for job in others:
            job.cancel()
        await asyncio.wait(others)

    asyncio.run(complete())


def test_who_is_refused_hears_the_numbers_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.2)
    recipe = recipe_of(tmp_path, *ONE_REFUSED)
    line = r"^server\.memory_mib: a client of batch size 1 needs 0\.6 MiB of the server's memory, 0\.4 MiB are left: r"

    async def refused_run() -> None:
        cloud, first, second = stations(recipe, tmp_path)
        async with asyncio.timeout(60):
            others = asyncio.gather(_serve(cloud), _attend(first))
            with pytest.raises(Refused, match=line) as refused:
                await _attend(second)
            assert refused.value.reason == "admission"
            await others

    with caplog.at_level(logging.INFO, "splitllm"):
        asyncio.run(refused_run())
    assert (tmp_path / "cloud" / "adapter" / "adapter_model.safetensors").exists()
    assert [cut["batch size"] for cut in said(caplog, "cut")] == [1]
    with pytest.raises(
        RecipeError, match=r"server\.memory_mib: cloud refuses client-1: a client of batch size 1 needs"
    ):
        train(recipe, tmp_path / "train")


def test_more_rows_than_a_client_was_let_in_with_are_refused(tmp_path: Path) -> None:
    plan = prepare(load_recipe(write_recipe(tmp_path), SMALLER), data=False)
    seen: list[Message] = []
    check = admission.checked(seen.append, plan.admissions["cloud"])
    for rows in (1, 5):
        check(Message("forward", "client-1", (0, 1, 0), {"lengths": [3] * rows}))
    too_many = Message("forward", "client-1", (0, 1, 0), {"lengths": [3] * 6})
    with pytest.raises(PeerError, match="client-1 sent forward with 6 rows, where there is memory for 5"):
        check(too_many)
    assert len(seen) == 3
    assert admission.checked(seen.append, None) == seen.append


def test_nothing_but_the_recipe_decides_so_a_server_that_was_restarted_decides_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), SMALLER)
    plans = [prepare(recipe, data=data, client=client) for data, client in ((False, None), (True, 1))]
    first, second = (admissions(recipe, plan.config, plan.modules) for plan in plans)
    assert first == second == plans[0].admissions
    assert admission.rows_for(recipe, plans[0].admissions["cloud"], "client-1") == 5
    assert admission.rows_for(recipe, None, "edge") == recipe.train.batch_size


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.accumulate=7", "train.in_flight=7"], "cloud refuses client-1: a client of batch size 1 needs 0.6 MiB"),
        (["train.accumulate=15", "train.in_flight=15"], "cloud refuses client-0: a client of batch size 1 needs 1.2"),
    ],
)
def test_a_recipe_in_which_somebody_would_be_waited_for_in_vain_is_refused(
    tmp_path: Path, words: list[str], line: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(load_recipe(write_recipe(tmp_path), [*TWO, *words]))
    (problem,) = caught.value.problems
    assert problem.startswith(f"server.memory_mib: {line}")


def test_a_server_that_does_not_hold_its_own_shard_is_refused(tmp_path: Path) -> None:
    wide = "model.random={n_embd: 512, vocab_size: 32}"
    with pytest.raises(RecipeError) as caught:
        prepare(load_recipe(write_recipe(tmp_path), [*TWO, wide, "wire.absent=drop"]))
    (problem,) = caught.value.problems
    assert problem.startswith("server.memory_mib: 1 MiB do not hold cloud itself, which takes ")


def test_validate_tells_whom_the_servers_take_in(tmp_path: Path) -> None:
    three = ["split.tiers={client: 3, edge: 2, cloud: 1}", "server.memory_mib=1", "train.batch_size=9"]
    lines = describe(prepare(load_recipe(write_recipe(tmp_path), three)))
    assert [line for line in lines if line.startswith("memory")] == [
        "memory of edge-0: 0.0 of 1 MiB are its own; of its clients it takes in 2 with batches of 3",
        "memory of edge-1: 0.0 of 1 MiB are its own; of its clients it takes in 1 with batches of 6",
    ]


def test_clients_at_their_own_pace_take_turns_for_memory_and_learn_the_same(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    crowd = ("split.tiers={client: 8, edge: 1, cloud: 1}", "split.cuts=[1, 3]", "split.labels=client")
    words = (*crowd, "lora.adapters=per_client", "server.memory_mib=1", "train.batch_size=4", "model.dropout=0")
    apart = prepare(with_ports(path, *words)).admissions["edge"]
    recipe = with_ports(path, *words, "server.batching=continuous", "server.starve=0.2")
    (edge,) = [taken_in for name, taken_in in prepare(recipe).admissions.items() if name == "edge"]
    assert max(apart.batch_sizes.values()) < 4 and apart.room is None
    assert set(edge.batch_sizes.values()) == {4} and edge.room is not None
    assert edge.room.bytes < 4 * max(edge.room.graphs.values()), "not for all at once"
    held = edge.own + sum(one.bytes for one in edge.admitted.values()) + edge.room.bytes
    assert held + max(edge.room.graphs.values()) <= edge.budget

    async def trained() -> None:
        async with deployed(recipe, tmp_path) as tasks:
            await asyncio.gather(*tasks.values())

    serving.run(trained, 60)
    train(recipe, tmp_path / "alike")
    for client in range(8):
        found, expected = (adapter(tmp_path / place / "adapter" / f"client-{client}") for place in ("cloud", "alike"))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
