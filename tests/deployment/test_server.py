"""What a server says before it serves, and how a role stops that still waits for the one above."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path

import pytest

from splitllm.deployment.client import _attend
from splitllm.deployment.door import _say_what_is_left_out
from splitllm.deployment.server import _serve
from splitllm.deployment.station import Options, open_station
from splitllm.errors import RecipeError, RunInterrupted
from splitllm.recipe import load_recipe
from tests.tiny import write_recipe


def test_what_only_splitllm_train_does_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_recipe(tmp_path)
    with caplog.at_level(logging.INFO, "splitllm"):
        _say_what_is_left_out(load_recipe(path))
        assert not caplog.records
        _say_what_is_left_out(load_recipe(path, ["train.verify_adapter=true", "train.trackers=[tensorboard]"]))
    fields = [vars(record)["fields"] for record in caplog.records]
    assert [said["key"] for said in fields] == ["train.verify_adapter", "train.trackers"]


CLOUD = "wire.addresses={cloud: 127.0.0.1:9, edge: 127.0.0.1:10}"  # nobody is there


def test_a_server_whose_address_nobody_gave_does_not_wait_for_the_one_above(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["wire.addresses={cloud: 127.0.0.1:9}"])

    async def run() -> None:
        async with asyncio.timeout(10):
            await _serve(open_station(recipe, Options("edge", tmp_path / "edge"), client=None))

    with pytest.raises(RecipeError, match=r"wire\.addresses: edge is missing; add edge: HOST:PORT, or give --listen"):
        asyncio.run(run())


@pytest.mark.parametrize("name", ["edge", "client-0"])
def test_a_role_that_waits_for_the_one_above_stops_at_once(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), [CLOUD])
    station = open_station(recipe, Options(name, tmp_path / name), client=None if name == "edge" else 0)

    async def run() -> None:
        asyncio.get_running_loop().call_later(0.5, os.kill, os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(5):
            await (_serve if name == "edge" else _attend)(station)

    with pytest.raises(RunInterrupted, match="stopped before it took part; start it again"):
        asyncio.run(run())
