"""Prometheus asks a server while it takes part in a real run over real gRPC."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from splitllm.deployment.client import _attend
from splitllm.deployment.observe import Metered, Observer
from splitllm.deployment.server import _serve
from splitllm.deployment.station import Options, open_station
from splitllm.recipe import load_recipe
from splitllm.roles.account import Account
from splitllm.roles.occupancy import Occupancy
from splitllm.wire.assembling import Limits
from splitllm.wire.coding import Coding
from splitllm.wire.message import Message
from splitllm.wire.sessions import Reception, Sessions
from tests.processes import free_port
from tests.tiny import write_recipe

STEPS, BATCH = 12, 3
Samples = dict[tuple[str, str], float]


def scraped(port: int) -> Samples:
    """(name, values of its labels) -> value."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, ",".join(sample.labels.values())): sample.value for sample in samples}


async def run_and_scrape(folder: Path, *more: str) -> list[Samples]:
    """A cloud and two clients in one event loop; what Prometheus got every few milliseconds."""
    write_recipe(folder)
    metrics = free_port()
    words = ["split.tiers={client: 2, cloud: 1}", "split.cuts=[2]", "train.threads=1", f"train.batch_size={BATCH}"]
    address = f"wire.addresses={{cloud: 127.0.0.1:{free_port()}}}"
    recipe = load_recipe(
        folder / "recipe.yaml", [*words, address, f"train.steps={STEPS}", "train.checkpoint_every=1", *more]
    )
    cloud = open_station(recipe, Options("cloud", folder / "cloud", metrics=f"127.0.0.1:{metrics}"), client=None)
    clients = [
        open_station(recipe, Options(f"client-{index}", folder / f"client-{index}"), client=index) for index in (0, 1)
    ]
    tasks = [asyncio.create_task(job) for job in (_serve(cloud), *map(_attend, clients))]
    found: list[Samples] = []
    while not all(task.done() for task in tasks):
        with suppress(OSError):  # not there yet, or no longer
            found.append(await asyncio.to_thread(scraped, metrics))
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(scraped, metrics)
    return found


def test_a_server_is_asked_while_it_runs(tmp_path: Path) -> None:
    found = asyncio.run(asyncio.wait_for(run_and_scrape(tmp_path), 60))
    assert any(samples[("splitllm_children_connected", "")] == 2 for samples in found)
    assert any(0 < samples[("splitllm_step", "")] < STEPS for samples in found)
    assert any(samples[("splitllm_requests_under_way", "")] > 0 for samples in found)
    assert all(0 <= samples[("splitllm_batch_fill_ratio", "")] <= 1 for samples in found)
    last = found[-1]
    assert last[("splitllm_batch_fill_ratio", "")] > 0
    for kind in ("join", "open", "forward", "close"):
        assert last[("splitllm_requests_total", kind)] >= 2
    for child in ("client-0", "client-1"):
        assert last[("splitllm_received_bytes_total", child)] > 1000
        assert last[("splitllm_sent_bytes_total", child)] > 1000
    assert last[("splitllm_step_seconds_count", "")] == last[("splitllm_step", "")]
    assert last[("splitllm_step_seconds_sum", "")] > 0
    for child in ("client-0", "client-1"):
        assert last[("splitllm_tenant_tokens_total", child)] > 100
        for direction in ("up", "down"):
            name = {"up": "received", "down": "sent"}[direction]
            frames = last[(f"splitllm_{name}_bytes_total", child)]
            assert 0.2 * frames < last[("splitllm_tenant_bytes_total", f"{direction},{child}")] < frames
        assert 0 < last[("splitllm_tenant_device_seconds_total", child)] < 60
    micro_batches, batches = last[("splitllm_batch_micro_batches_total", "")], last[("splitllm_batches_total", "")]
    assert micro_batches == batches > 2 * STEPS and last[("splitllm_batch_size", "")] == 1
    assert last[("splitllm_batch_positions_total", "token")] > last[("splitllm_batch_positions_total", "padding")] > 0
    assert all(0 <= samples[("splitllm_batch_padding_ratio", "")] < 1 for samples in found)
    names = ("splitllm_requests_total", "splitllm_received_bytes_total", "splitllm_step_seconds_count")
    for before, after in pairwise(found):
        for key in before:
            assert key[0] not in names or after[key] >= before[key]


def test_batches_of_several_tenants_are_counted_and_their_time_shared_out(tmp_path: Path) -> None:
    started = time.perf_counter()
    run = run_and_scrape(tmp_path, "server.batching=synchronous", "model.dropout=0.0")
    last = asyncio.run(asyncio.wait_for(run, 60))[-1]
    assert last[("splitllm_batch_size", "")] in (1, 2)
    batches, micro_batches = last[("splitllm_batches_total", "")], last[("splitllm_batch_micro_batches_total", "")]
    assert batches < micro_batches <= 2 * batches
    seconds = [last[("splitllm_tenant_device_seconds_total", f"client-{index}")] for index in (0, 1)]
    assert all(seconds) and sum(seconds) < time.perf_counter() - started


def test_the_page_lists_what_can_be_asked() -> None:
    observer, page = Observer(1), (Path(__file__).resolve().parents[2] / "docs" / "deployment.md").read_text()
    metered = Metered(**vars(reception()), account=Account(), occupancy=Occupancy(), tenants={0: "client-0"})
    observer.watched(metered)
    observer.serve(None, Sessions(metered))()
    told = {metric.name for metric in observer.registry.collect() if metric.name.startswith("splitllm_")}
    listed = {name.removesuffix("_total") for name in re.findall(r"`(\w+)`", page.split("| `splitllm_` |")[1])}
    assert {name.removeprefix("splitllm_") for name in told} <= listed


def nobody() -> Sessions:
    """Sessions of a server that nobody talks to."""
    return Sessions(reception())


def reception() -> Reception:
    async def answer(message: Message) -> Message:
        return message

    return Reception(
        admit=lambda hello, identity: ("", {}),
        answer=answer,
        check=lambda message: None,
        room=lambda child: 1,
        coding=Coding,
        limits=Limits(),
        back=lambda child: None,
        away=lambda child: None,
        left=lambda child: None,
        fatal=lambda error: None,
    )


def test_refusals_are_counted_by_reason() -> None:
    observer = Observer(1)
    sessions = nobody()
    port = free_port()
    stop = observer.serve(f"127.0.0.1:{port}", sessions)
    sessions.refused["identity"] = 3
    assert scraped(port)[("splitllm_refused_connections_total", "identity")] == 3
    stop()


def test_an_address_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=re.escape(f"--metrics {address}")):
            Observer(1).serve(address, nobody())


def test_of_clients_at_their_own_pace_the_one_furthest_behind_counts() -> None:
    observer = Observer(1, lanes=[0, 1])
    watched = observer.watched(reception())

    def step() -> float | None:
        return observer.registry.get_sample_value("splitllm_step")

    async def asked(client: int, step: int) -> None:
        for kind in ("open", "close"):
            await watched.answer(Message(kind, "edge", (step, client, 0), {}, {}, 1))  # type: ignore[arg-type]

    async def run() -> None:
        for number in range(3):
            await asked(0, number)
        assert step() == 0
        await asked(1, 0)
        assert step() == 1
        await asked(1, 1)
        assert step() == 2

    asyncio.run(run())
    assert observer.registry.get_sample_value("splitllm_step_seconds_count") == 5
