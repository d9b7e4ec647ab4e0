"""Clients are let in with what there is memory for, in a real run over real gRPC: the adapter is that of `train`."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from splitllm.deployment import admission
from splitllm.deployment.client import _attend
from splitllm.deployment.server import _serve
from splitllm.deployment.station import Options, Station, open_station
from splitllm.errors import PeerError, RecipeError
from splitllm.preflight import prepare
from splitllm.recipe import Recipe, load_recipe
from splitllm.roles.admission import admissions
from splitllm.train import train
from splitllm.wire.message import Message
from splitllm.wire.stream import Refused
from tests.processes import free_port
from tests.roles.tree import same
from tests.tiny import write_recipe

TWO = ["split.tiers={client: 2, cloud: 1}", "split.cuts=[2]", "train.threads=1", "server.memory_mib=1"]
SMALLER = [*TWO, "train.batch_size=8"]
"""A client of 8 rows takes 1.7 of 1 MiB, one of 2 rows 0.4, and the server itself 0.03."""
ONE_REFUSED = [*TWO, "train.accumulate=5", "train.in_flight=5", "wire.absent=drop", "wire.drop_after=0.5"]
"""Already one row takes 0.55 MiB."""


def recipe_of(folder: Path, *words: str) -> Recipe:
    return load_recipe(write_recipe(folder), [*words, f"wire.addresses={{cloud: 127.0.0.1:{free_port()}}}"])


def stations(recipe: Recipe, folder: Path) -> list[Station]:
    """The cloud, and both clients."""
    names = {"cloud": None, "client-0": 0, "client-1": 1}
    return [open_station(recipe, Options(name, folder / name), client=client) for name, client in names.items()]


def said(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, Any]]:
    return [vars(record)["fields"] for record in caplog.records if record.getMessage() == message]


def test_a_run_with_smaller_batches_gives_the_adapter_of_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(tmp_path, *SMALLER)

    async def run() -> None:
        cloud, *clients = stations(recipe, tmp_path)
        async with asyncio.timeout(60):
            await asyncio.gather(_serve(cloud), *map(_attend, clients))

    with caplog.at_level(logging.INFO, "splitllm"):
        asyncio.run(run())
    assert [cut["batch size"] for cut in said(caplog, "cut")] == [2, 2]
    (decided,) = said(caplog, "admission")
    assert decided["smaller batches"] == {0: 2, 1: 2} and decided["refused"] == []
    assert decided["own MiB"] + decided["clients MiB"] <= decided["server.memory_mib"] == 1
    train(recipe, tmp_path / "train")
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert same(load_file(tmp_path / "cloud" / adapter), load_file(tmp_path / "train" / adapter))


def test_who_is_refused_hears_the_numbers_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(tmp_path, *ONE_REFUSED)
    line = r"client-1: a client of batch size 1 needs 1 MiB of the server's memory, 0 MiB are free: raise server\.mem"

    async def run() -> None:
        cloud, first, second = stations(recipe, tmp_path)
        async with asyncio.timeout(60):
            others = asyncio.gather(_serve(cloud), _attend(first))
            with pytest.raises(Refused, match=line) as refused:
                await _attend(second)
            assert refused.value.reason == "admission"
            await others

    with caplog.at_level(logging.INFO, "splitllm"):
        asyncio.run(run())
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
    for rows in (1, 2):
        check(Message("forward", "client-1", (0, 1, 0), {"lengths": [3] * rows}))
    too_many = Message("forward", "client-1", (0, 1, 0), {"lengths": [3] * 3})
    with pytest.raises(PeerError, match="client-1 sent forward with 3 rows, where there is memory for 2"):
        check(too_many)
    assert len(seen) == 3
    assert admission.checked(seen.append, None) == seen.append


def test_nothing_but_the_recipe_decides_so_a_server_that_was_restarted_decides_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), SMALLER)
    plans = [prepare(recipe, data=data, client=client) for data, client in ((False, None), (True, 1))]
    first, second = (admissions(recipe, plan.config, plan.modules) for plan in plans)
    assert first == second == plans[0].admissions
    assert admission.rows_for(recipe, plans[0].admissions["cloud"], "client-1") == 2
    assert admission.rows_for(recipe, None, "edge") == recipe.train.batch_size


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.accumulate=5", "train.in_flight=5"], "cloud refuses client-1: a client of batch size 1 needs 1 MiB"),
        (["train.accumulate=10", "train.in_flight=10"], "cloud refuses client-0: a client of batch size 1 needs 2 MiB"),
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
    from splitllm.preflight import describe

    three = ["split.tiers={client: 3, edge: 2, cloud: 1}", "server.memory_mib=1", "train.batch_size=9"]
    lines = describe(prepare(load_recipe(write_recipe(tmp_path), three)))
    assert [line for line in lines if line.startswith("memory")] == [
        "memory of edge-0: 0.0 of 1 MiB are its own; of its clients it takes in 1 with batches of 2, 1 with batches of 3",
        "memory of edge-1: 0.0 of 1 MiB are its own; of its clients it takes in 1 with batches of 5",
    ]
