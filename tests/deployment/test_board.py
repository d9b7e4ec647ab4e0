"""What the top writes of clients at their own pace: every step of each once, and a summary of those who end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from splitllm.deployment.board import Board, LaneRecord
from splitllm.deployment.station import Options, Station, open_station
from splitllm.metrics import Metrics, read_records
from splitllm.model.lora import adapter_shapes
from splitllm.recipe import load_recipe
from splitllm.roles.server import StepSums
from splitllm.roles.worker import TENANT
from tests.tiny import write_recipe

WORDS = (
    "split.tiers={client: 3, edge: 1, cloud: 1}",
    "lora.adapters=per_client",
    "lora.clients={client-1: {rank: 2}}",
    "server.batching=continuous",
    "model.dropout=0",
    "train.steps=4",
    "train.log_every=1",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("base"))


@pytest.fixture
def station(path: Path, tmp_path: Path) -> Station:
    return open_station(load_recipe(path, WORDS), Options("cloud", tmp_path), client=None)


def board_of(station: Station) -> Board:
    return Board(station, Metrics(station.options.directory, steps=4, console=Console(quiet=True)))


def sums(client: int, loss: float | None = 6.0) -> StepSums:
    return StepSums({client: [loss, 3, 10]}, {f"client-{client}": [100, 50], "edge": [10, 5]}, norm=0.5)


def lines(station: Station) -> list[tuple[Any, ...]]:
    found = read_records(station.options.directory / "metrics.jsonl")
    return [(line["client"], line["event"], line["step"], line["loss"]) for line in found]


def adapter(station: Station, client: int) -> dict[str, torch.Tensor]:
    plan, rank = station.plan, 2 if client == 1 else 4
    lora = station.recipe.lora.model_copy(update={"rank": rank})
    shapes = adapter_shapes(plan.config, lora, plan.modules)
    return {f"{TENANT}{client}/{name}": torch.full(shape, 0.5) for name, shape in shapes.items()}


def finish(station: Station, record: LaneRecord) -> None:
    record.finish(
        {f"client-{record.client}": {"rss_mib": 2.0}, "cloud": {"rss_mib": 1.0}}, adapter(station, record.client)
    )


def summary(station: Station) -> dict[str, Any] | None:
    path = station.options.directory / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_a_client_that_goes_back_takes_back_its_own_lines_only(station: Station) -> None:
    board = board_of(station)
    first, second = board.records[0], board.records[1]
    assert not first.begun(0)
    first.evaluated(0, {0: [6.0, 3, 10]})
    for step in range(3):
        first.stepped(step, sums(0))
        second.stepped(step, sums(1))
    assert first.begun(1) is False and first.evaluations == {0: (2.0, 3)}
    assert first.begun(0) is True
    first.stepped(0, sums(0))
    mine, other = ([line for line in lines(station) if line[0] == name] for name in ("client-0", "client-1"))
    assert mine == [("client-0", "eval", 0, 2.0), ("client-0", "train", 1, 2.0)]
    assert [line[2] for line in other] == [1, 2, 3]


def test_a_restarted_top_knows_what_each_has_evaluated(station: Station) -> None:
    board_of(station).records[1].evaluated(2, {1: [6.0, 4, 10]})
    again = board_of(station)
    assert again.records[1].evaluations == {2: (1.5, 4)} and not again.records[0].evaluations
    assert again.records[1].begun(2) and not again.records[0].begun(2)


def test_totals_go_back_with_the_journal(station: Station) -> None:
    record = board_of(station).records[0]
    record.stepped(0, sums(0))
    kept = json.loads(json.dumps(record.values()))
    record.stepped(1, sums(0))
    assert (record.totals.tokens, record.totals.bytes_up) == (20, 220)
    record.put_back(kept)
    assert (record.totals.tokens, record.totals.bytes_up, record.values()) == (10, 110, kept)


def test_a_loss_that_is_not_finite_is_said_with_the_clients_name_and_ends_nothing(
    station: Station, caplog: pytest.LogCaptureFixture
) -> None:
    record = board_of(station).records[2]
    with caplog.at_level(logging.WARNING):
        record.stepped(0, sums(2, None))
    assert [entry.fields for entry in caplog.records] == [{"client": "client-2", "step": 1}]  # type: ignore[attr-defined]
    assert lines(station) == [("client-2", "train", 1, None)]


def test_the_summary_comes_with_the_last_adapter(station: Station) -> None:
    board = board_of(station)
    for record in board.records.values():
        assert summary(station) is None
        record.evaluated(0, {record.client: [9.0, 3, 10]})
        record.stepped(0, sums(record.client))
        record.evaluated(4, {record.client: [6.0 + record.client, 1 + record.client, 10]})
        finish(station, record)
    found = summary(station)
    assert found is not None
    assert (found["train_tokens"], found["eval_loss_before"]) == (30, 3.0)
    assert found["eval_loss_after"] == pytest.approx((6.0 + 7.0 + 8.0) / 6)
    assert found["trainable_parameters"] == sum(
        t.numel() for client in range(3) for t in adapter(station, client).values()
    )
    assert found["peak_rss_mib"] == {"client-0": 2.0, "client-1": 2.0, "client-2": 2.0, "cloud": 1.0}


@pytest.mark.parametrize("last", ["an adapter", "a client that diverged"])
def test_who_has_diverged_is_not_waited_for_nor_counted(last: str, station: Station) -> None:
    board = board_of(station)
    for record in board.records.values():
        record.stepped(0, sums(record.client))
    finish(station, board.records[0])
    if last == "an adapter":
        board.over(1)
        assert summary(station) is None
        finish(station, board.records[2])
    else:
        finish(station, board.records[2])
        assert summary(station) is None
        board.over(1)
    found = summary(station)
    assert found is not None and found["train_tokens"] == 20
    assert {place.name for place in (station.options.directory / "adapter").iterdir()} == {"client-0", "client-2"}


def test_without_any_adapter_there_is_no_summary(station: Station) -> None:
    board = board_of(station)
    for client in board.records:
        board.over(client)
    assert summary(station) is None


def test_a_run_that_was_complete_is_not_written_again(station: Station) -> None:
    board = board_of(station)
    for record in board.records.values():
        finish(station, record)
    before = (station.options.directory / "summary.json").stat().st_mtime_ns
    board_of(station).done()
    assert (station.options.directory / "summary.json").stat().st_mtime_ns == before
