"""A role on its machine: refused before it listens or dials, and put back as its journal tells."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splitllm.deployment.station import Options, Past, Station, Stop, Told, check_secure, open_station
from splitllm.errors import CertificateError, CheckpointError, PeerError, RecipeError, RunInterrupted
from splitllm.recipe import Recipe, load_recipe, start_digest
from splitllm.wire.certificates import load_credentials
from splitllm.wire.issuing import issue
from tests.tiny import write_recipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("base"))


def recipe_of(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, overrides)


def station(path: Path, directory: Path, name: str = "edge", *overrides: str) -> Station:
    return open_station(recipe_of(path, *overrides), Options(name, directory), client=None)


def past(found: Station, **both: Any) -> Past:
    return Past(found, found.journal(), found.worker(), **both)


def shift(worker: Any, by: float) -> None:
    for parameter in worker.trainable.parameters.values():
        parameter.data.add_(by)


@pytest.mark.parametrize("address", ["127.0.0.1:7100", "127.8.9.1:1", "localhost:7100", "[::1]:7100", "127.0.0.1:0"])
def test_plain_tcp_is_allowed_on_this_machine(address: str) -> None:
    check_secure(address, None, Options("edge", Path()))


@pytest.mark.parametrize(
    "address", ["0.0.0.0:7100", "10.0.0.1:7100", "[::]:7100", "[::12]:7100", "localhost.example.org:1", "127.org:7"]
)
def test_plain_tcp_beyond_it_needs_to_be_asked_for(address: str, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^wire\.certificates: missing, but .* is beyond this machine; .*--insecure$"
    ):
        check_secure(address, None, Options("edge", Path()))
    check_secure(address, None, Options("edge", Path(), insecure=True))
    issue(tmp_path, ["edge"])
    check_secure(address, load_credentials(tmp_path, "edge"), Options("edge", Path()))


@pytest.mark.parametrize("address", ["7100", "localhost", ":7100", "127.0.0.1:", "127.0.0.1:99999", ""])
def test_what_is_no_address_is_refused_in_one_line(address: str) -> None:
    with pytest.raises(RecipeError, match=r"^--listen: .* is not HOST:PORT; give --listen [^\n]*$"):
        check_secure(address, None, Options("edge", Path()))


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
    client = open_station(recipe_of(path), Options("client-1", tmp_path / "client-1"), client=1)
    assert not client.plan.corpus.train[0] and client.plan.corpus.train[1]
    assert (client.tier, client.tier_name, client.replicas) == (0, "client", 2)


def test_a_fresh_role_stands_at_step_0_and_a_killed_one_is_put_back(path: Path, tmp_path: Path) -> None:
    edge, told = station(path, tmp_path / "edge"), {"tokens": 0}
    first = past(edge, values=lambda: told)
    assert (first.standing().tier, first.standing().states) == ("edge", ((0, "new"),))
    shift(first.worker, 1.0)
    told["tokens"] = 7
    first.commit(1, 7000)
    kept = {name: tensor.clone() for name, tensor in first.state().items()}
    shift(first.worker, 1.0)
    told["tokens"] = 9
    first.commit(2, 7001)
    first.journal.close()

    heard: list[Any] = []
    again = past(station(path, tmp_path / "edge"), put_back=heard.append)
    assert again.standing().states == ((2, "7001"), (1, "7000"))
    again.restore(1)
    assert heard == [{"tokens": 7}]
    assert again.standing().states == ((1, "7000"),)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.state().items())
    assert again.adapter().keys() == again.worker.trainable.parameters.keys()


def test_the_state_of_another_role_is_taken_over_and_kept(path: Path, tmp_path: Path) -> None:
    donor, heir = (past(station(path, tmp_path / name, name)) for name in ("client-0", "client-1"))
    shift(donor.worker, 0.5)
    for step in (1, 2):
        heir.commit(step, 7000)
    heir.adopt(9, "7009", donor.state())
    assert heir.standing().states == ((9, "7009"), (2, "7000"))
    heir.adopt(1, "7008", donor.state())
    assert heir.standing().states == ((1, "7008"),)
    heir.restore(1)
    assert all(torch.equal(tensor, donor.state()[name]) for name, tensor in heir.state().items())


def test_the_mark_of_the_end_outlives_the_process(path: Path, tmp_path: Path) -> None:
    first = past(station(path, tmp_path / "edge"))
    assert not first.journal.finished
    first.mark_finished()
    first.journal.close()
    assert station(path, tmp_path / "edge").journal().finished


def test_a_role_runs_once_and_a_journal_serves_one_run(path: Path, tmp_path: Path) -> None:
    edge = station(path, tmp_path / "edge")
    first = past(edge)
    with pytest.raises(CheckpointError, match=r"another process runs edge here; stop it, or give --output-dir$"):
        edge.journal()
    first.journal.close()
    with pytest.raises(
        CheckpointError, match=r"holds the journal of another run \(recipe .*; give a new --output-dir$"
    ):
        station(path, tmp_path / "edge", "edge", "seed=4").journal()


def test_closing_words_tell_the_memory_of_this_process(path: Path, tmp_path: Path) -> None:
    words = past(station(path, tmp_path / "edge")).closing_words()
    assert words["rss_mib"] > 50
    assert all(name == "rss_mib" or name.startswith("held: ") for name in words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop(number: signal.Signals) -> None:
    async def run() -> bool:
        stop = Stop()
        os.kill(os.getpid(), number)
        async with asyncio.timeout(5):
            return await stop.asked.wait()

    assert asyncio.run(run())


WELCOME = {"shard": [0, 2], "batch_size": 4, "accumulate": 1, "in_flight": 3}


def test_a_welcome_that_says_nothing_of_use_is_one_line() -> None:
    assert Told.from_welcome({**WELCOME, "name": "edge"}, "edge", 4) == Told((0, 2), 4, 1, 3)
    wrong = [{**WELCOME, key: junk} for key in WELCOME for junk in (None, 0, -1, "2", [2], [3, 1], [0, 5], [0.0, 2])]
    for welcome in [{}, *wrong]:
        with pytest.raises(
            PeerError, match=r"^edge: its welcome names no blocks of the 4, or no sizes of batches: .*$"
        ):
            Told.from_welcome(welcome, "edge", 4)


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


def test_another_start_is_another_origin(path: Path, tmp_path: Path) -> None:
    first = past(station(path, tmp_path / "edge"))
    digests = []
    for content in (b"one", b"other"):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        digests.append(start_digest(recipe_of(path, f"lora.start_from={tmp_path}")))
    assert len({*digests, "new"}) == 3 and all(len(digest) == 16 for digest in digests)
    assert first.standing().states == ((0, start_digest(recipe_of(path))),)
