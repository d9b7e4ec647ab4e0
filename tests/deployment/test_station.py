"""A role on its machine: refused before it listens or dials, and stopped while it loads."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from splitllm import plan
from splitllm.deployment.station import Options, Station, open_station
from splitllm.deployment.stop import Stop
from splitllm.errors import CertificateError, RecipeError, RunInterrupted
from splitllm.recipe import load_recipe
from splitllm.wire.issuing import issue
from tests.tiny import write_recipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("base"))


def station(path: Path, directory: Path, name: str = "edge", *overrides: str) -> Station:
    return open_station(load_recipe(path, overrides), Options(name, directory), client=None)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["split.tiers={client: 2}", "split.cuts=[]"], r"split\.tiers: a deployment needs at least two tiers"),
        (["train.processes=2", "split.tiers={client: 4, edge: 2, cloud: 1}"], r"train\.processes: 2 is for"),
    ],
)
def test_what_only_one_machine_can_run_is_refused(
    path: Path, tmp_path: Path, overrides: list[str], complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint):
        station(path, tmp_path / "edge", "edge", *overrides)
    assert not (tmp_path / "edge").exists()


def test_certificates_of_another_role_are_refused_before_anything_is_written(path: Path, tmp_path: Path) -> None:
    issue(tmp_path / "certs", ["cloud"])
    with pytest.raises(CertificateError, match="has no folder edge"):
        station(path, tmp_path / "edge", "edge", f"wire.certificates={tmp_path / 'certs'}")
    assert not (tmp_path / "edge").exists()


def test_addresses_that_nobody_gave_are_missed(path: Path, tmp_path: Path) -> None:
    edge = station(path, tmp_path / "edge")
    with pytest.raises(
        RecipeError, match=r"wire\.addresses: cloud is missing, to which edge connects; add cloud: HOST"
    ):
        asyncio.run(_dial(edge))
    with pytest.raises(RecipeError, match=r"wire\.addresses: edge is missing; add edge: HOST:PORT, or give --listen"):
        edge.address()
    edge.options = replace(edge.options, listen="127.0.0.1:0")
    assert edge.address() == "127.0.0.1:0"


async def _dial(edge: Station) -> None:
    edge.uplink()


def test_a_server_reads_no_rows_and_a_client_only_its_own(path: Path, tmp_path: Path) -> None:
    assert not station(path, tmp_path / "edge").plan.corpus.train
    client = open_station(load_recipe(path), Options("client-1", tmp_path / "client-1"), client=1)
    assert not client.plan.corpus.train[0] and client.plan.corpus.train[1]
    assert (client.tier, client.tier_name) == (0, "client")


def test_who_is_asked_to_stop_while_it_loads_stops_at_once(path: Path, tmp_path: Path) -> None:
    edge = station(path, tmp_path / "edge")

    async def run() -> float:
        stop, started = Stop(), time.perf_counter()
        busy = asyncio.create_task(edge.device.run(lambda: time.sleep(2.0)))
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
        with pytest.raises(RunInterrupted, match="stopped before it took part; start it again"):
            await stop.unless_asked(edge.load(None))
        busy.cancel()
        return time.perf_counter() - started

    assert asyncio.run(run()) < 1.5


def test_a_role_without_room_is_refused_before_its_folder_is_made(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_bytes", lambda: 0)
    with pytest.raises(RecipeError, match=r"^memory of this machine: 0 MiB are free, and edge would take"):
        station(path, tmp_path / "edge")
    assert not (tmp_path / "edge").exists()
