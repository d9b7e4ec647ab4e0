"""Sixty-four clients on one edge over mutual TLS: no growth, and every step accounted for by all who count.

Two are real. The others are connections of one process without torch (`load.py`), which replays what they sent in a
run in one process. `SOAK_SECONDS=60` chooses how long it lasts.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from splitllm.model.loading import Checkpoint
from splitllm.recipe import Recipe, fingerprint, load_recipe
from splitllm.wire.coding import Coding
from splitllm.wire.envelopes import request_values
from splitllm.wire.frames import Envelope, FrameType, to_frames
from splitllm.wire.message import Message
from tests.processes import ROOT, free_port
from tests.soak.roles import Roles
from tests.soak.watch import Watch, watching
from tests.tiny import save_base, write_rows
from tests.wire.corpus.record import run_in_process

LONG = float(os.environ.get("SOAK_SECONDS", "600"))
REAL = ("client-0", "client-1")
GROWTH = 0.05
SECOND_QUARTER, LAST_QUARTER = (0.25, 0.5), (0.75, 1.0)
MOST_STEPS = 1_000_000
RECORDED_STEPS = 2


def write_wide_recipe(folder: Path, clients: int, steps: int) -> Path:
    """Many clients, one edge, one cloud; each client keeps its labels, and all are waited for."""
    content = {
        "seed": 3,
        "model": {"base": str(save_base(folder / "base") if not (folder / "base").exists() else folder / "base")},
        "split": {"tiers": {"client": clients, "edge": 1, "cloud": 1}, "cuts": [1, 3], "labels": "client"},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "data": {
            "source": str(write_rows(folder / "rows.jsonl", 10 * clients)),
            "max_length": 24,
            "eval_fraction": 0.1,
        },
        "train": {"steps": steps, "batch_size": 2, "accumulate": 1, "optimizer": {"lr": 1e-4}, "threads": 1},
    }
    path = folder / f"recipe-{steps}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def record(recipe: Recipe, folder: Path) -> None:
    """What every client sent in the first steps of a run: a file for each request."""
    evaluations: dict[str, int] = {}
    for message, _ in run_in_process(recipe).seen:
        name = _file_of(message, evaluations)
        if name is None or message.sender in (*REAL, "edge"):
            continue
        frames = to_frames(Envelope(FrameType.REQUEST, 1, request_values(message, []), Coding().pack_request(message)))
        assert len(frames) == 1, message.kind
        (folder / message.sender).mkdir(parents=True, exist_ok=True)
        (folder / message.sender / f"{name}.bin").write_bytes(frames[0])


def _file_of(message: Message, evaluations: dict[str, int]) -> str | None:
    if message.kind in ("open", "forward", "backward", "close") and message.step >= 0:
        return f"{message.kind}-{message.step}"
    if message.kind == "forward":
        return f"evaluation-{message.micro_batch[2]}"
    if message.kind == "evaluated" and message.step == 0:
        return "evaluated"
    return None


@dataclass
class Outcome:
    """What those who count say."""

    watch: Watch
    load: dict[str, Any]
    scraped: dict[str, dict[str, float]]
    seconds: float


def scrape(port: int) -> dict[str, dict[str, float]]:
    """What the edge tells Prometheus: name -> label -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
        families = text_string_to_metric_families(page.read().decode())
    found: dict[str, dict[str, float]] = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name, {})[",".join(sample.labels.values())] = sample.value
    return found


async def run_under_load(roles: Roles, recorded: Path, seconds: float) -> Outcome:
    """All processes from start to the moment when the load has stopped between two steps."""
    metrics, names = free_port(), [name for name in roles.names if name.startswith("client") and name not in REAL]
    config = {
        "address": f"127.0.0.1:{roles.port['edge']}",
        "server": "edge",
        "certificates": str(roles.folder / "certificates"),
        "recorded": str(recorded),
        "clients": names,
        "hello": {"recipe": fingerprint(roles.recipe), "model": Checkpoint(roles.recipe.model.base).digest()},
        "batch_size": roles.recipe.train.batch_size,
        "seconds": seconds,
    }
    path = roles.folder / "load.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    roles.start("cloud")
    roles.start("edge", "--metrics", f"127.0.0.1:{metrics}")
    for name in REAL:
        roles.start(name)
    pipe = asyncio.subprocess.PIPE
    load = await asyncio.create_subprocess_exec(
        sys.executable, "tests/soak/load.py", str(path), cwd=ROOT, stdin=pipe, stdout=pipe, limit=1 << 24
    )
    try:
        await roles.until(lambda: roles.step() >= 1 or load.returncode is not None, "the first step")
        started = time.monotonic()
        with watching(roles.running["edge"].pid, lambda: min(1.0, (time.monotonic() - started) / seconds)) as watch:
            told = await _last_line(load)
        taken = time.monotonic() - started
        assert told, roles.tails()
        last = max(told["steps"].values())
        await roles.until(lambda: all(steps_logged(roles, name)[-1] == last for name in REAL), f"step {last}")
        scraped = await asyncio.to_thread(scrape, metrics)
    finally:
        load.kill()
        await load.wait()
    return Outcome(watch, told, scraped, taken)


def steps_logged(roles: Roles, name: str) -> list[int]:
    return [event["step"] for event in roles.events(name) if event["event"] == "step"]


async def _last_line(load: asyncio.subprocess.Process) -> dict[str, Any]:
    assert load.stdout is not None
    while line := await load.stdout.readline():
        said: dict[str, Any] = json.loads(line)
        if "steps" in said:
            return said
    return {}


def assert_accounted_for(roles: Roles, outcome: Outcome, clients: int) -> int:
    """The same steps and bytes by the load, the real clients, the edge and the cloud; the steps."""
    records, load, scraped = roles.steps(), outcome.load, outcome.scraped
    steps = len(records)
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert {record["clients"] for record in records} == {clients}
    assert load["steps"] == dict.fromkeys(load["traffic"], steps) and len(load["steps"]) == clients - len(REAL)
    assert load["joins"] == dict.fromkeys(load["traffic"], 1), "nobody had to join again"
    assert load["sent"] == load["answered"] and not load["modules"]
    for name in REAL:
        assert steps_logged(roles, name) == list(range(1, steps + 1))
    requests = scraped["splitllm_requests_total"]
    for kind in ("open", "backward", "close"):
        assert load["sent"][kind] == (clients - len(REAL)) * steps and requests[kind] == clients * steps, kind
    assert requests["join"] == requests["evaluated"] == clients
    assert scraped["splitllm_step"][""] == steps and scraped["splitllm_children_connected"][""] == clients
    assert scraped.get("splitllm_refused_connections_total", {}) == {}
    for name, (up, down) in load["traffic"].items():
        assert scraped["splitllm_received_bytes_total"][name] == up, name
        assert scraped["splitllm_sent_bytes_total"][name] == down, name
    assert [roles.complaints(name) for name in roles.running] == [""] * len(roles.running)
    return steps


def stop(roles: Roles) -> dict[str, int]:
    """As an operator does; everybody can go on later."""
    for name in (*REAL, "edge", "cloud"):
        roles.running[name].send_signal(signal.SIGTERM)
    return {name: process.wait(60) for name, process in roles.running.items()}


@pytest.mark.soak
def test_64_connections_on_one_edge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_the_edge_carries(tmp_path, capsys, 64, LONG)


@pytest.mark.soak
def test_12_connections_on_one_edge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_the_edge_carries(tmp_path, capsys, 12, 8.0)


def assert_the_edge_carries(folder: Path, capsys: pytest.CaptureFixture[str], clients: int, seconds: float) -> None:
    record(load_recipe(write_wide_recipe(folder, clients, RECORDED_STEPS), ()), folder / "recorded")
    roles = Roles(write_wide_recipe(folder, clients, MOST_STEPS), folder / "run")
    try:
        outcome = asyncio.run(run_under_load(roles, folder / "recorded", seconds))
        steps = assert_accounted_for(roles, outcome, clients)
        stop(roles)
    finally:
        roles.close()
    second, last = (outcome.watch.rss_between(*part) for part in (SECOND_QUARTER, LAST_QUARTER))
    requests = sum(outcome.scraped["splitllm_requests_total"].values())
    with capsys.disabled():
        sys.stdout.write(
            f"\n{clients} connections, {outcome.seconds:.0f} s, {steps} steps, {requests:.0f} requests\n"
            f"{outcome.watch.table()}\nresident: {second:.1f} MiB in the second quarter, {last:.1f} MiB in the last\n"
        )
    assert last <= second * (1 + GROWTH)
    assert outcome.watch.descriptors_between(*LAST_QUARTER) <= outcome.watch.descriptors_between(*SECOND_QUARTER)
