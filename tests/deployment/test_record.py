"""What the top writes: every step once whatever was run again, totals that go back with the journal, one summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from splitllm.deployment.past import HELD, Past
from splitllm.deployment.record import Record
from splitllm.deployment.station import Options, Station, open_station
from splitllm.errors import DivergedError
from splitllm.metrics import Metrics, read_records
from splitllm.model.lora import adapter_shapes
from splitllm.recipe import load_recipe
from splitllm.roles.server import StepSums
from tests.tiny import write_recipe

STEPS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("base"))


@pytest.fixture
def station(path: Path, tmp_path: Path) -> Station:
    return open_station(load_recipe(path), Options("cloud", tmp_path), client=None)


def record_of(station: Station) -> Record:
    directory = station.options.directory
    return Record(station, Metrics(directory, steps=STEPS, console=Console(quiet=True)))


def sums(loss: float = 6.0, labels: int = 3, tokens: int = 10) -> StepSums:
    """Of two clients, whose order in the message is not that of their numbers."""
    losses = {1: [loss, labels, tokens], 0: [2 * loss, labels, 2 * tokens]}
    return StepSums(losses, {"client-0": [100, 50], "edge": [10, 5]}, norm=0.5)


def lines(station: Station) -> list[tuple[Any, ...]]:
    found = read_records(station.options.directory / "metrics.jsonl")
    return [(line["event"], line["step"], line["loss"]) for line in found]


def adapter(station: Station) -> dict[str, torch.Tensor]:
    shapes = adapter_shapes(station.plan.config, station.recipe.lora, station.plan.modules)
    return {name: torch.full(shape, 0.5) for name, shape in shapes.items()}


def test_a_step_is_the_sum_over_its_clients(station: Station) -> None:
    record = record_of(station)
    record.stepped(0, sums())
    [line] = read_records(station.options.directory / "metrics.jsonl")
    counted = {key: line[key] for key in ("event", "step", "loss", "tokens", "bytes_up", "bytes_down", "clients")}
    assert counted == {
        "event": "train",
        "step": 1,
        "loss": 3.0,
        "tokens": 30,
        "bytes_up": 110,
        "bytes_down": 55,
        "clients": 2,
    }
    assert line["grad_norm"] == 0.5 and line["lr"] == station.recipe.train.optimizer.lr * station.schedule(0)


def test_steps_between_the_logged_ones_are_counted_with_the_next(path: Path, tmp_path: Path) -> None:
    station = open_station(load_recipe(path, ["train.log_every=3"]), Options("cloud", tmp_path), client=None)
    record = record_of(station)
    for step in range(STEPS):
        record.stepped(step, sums())
    found = read_records(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["tokens"]) for line in found] == [(3, 90), (4, 30)]


def test_what_is_run_again_is_written_and_counted_once(station: Station) -> None:
    record, past = record_of(station), {}
    record.begun(0)
    record.evaluated(0, {0: [8.0, 4, 9]})
    for step in range(3):
        past[step] = json.loads(json.dumps(record.values()))  # the journal keeps JSON
        record.stepped(step, sums(loss=6.0 + step))
    whole = lines(station)
    tokens = record.totals.tokens

    after = record_of(station)  # killed, and started again
    assert after.begun(2) is False
    after.put_back(past[2])
    assert lines(station) == whole[:-1]
    assert after.totals.loss_before == 2.0
    after.stepped(2, sums(loss=8.0))
    assert lines(station) == whole
    assert after.totals.tokens == tokens
    assert read_records(station.options.directory / "metrics.jsonl")[-1]["tokens"] == 30


def test_an_evaluation_that_is_written_is_not_asked_for_again(station: Station) -> None:
    record = record_of(station)
    assert record.begun(0) is False
    record.evaluated(0, {1: [3.0, 1, 2], 0: [1.0, 1, 2]})
    assert record.begun(0) is True
    assert lines(station) == [("eval", 0, 2.0)]
    assert (record.totals.loss_before, record.totals.loss_after) == (2.0, None)


def test_losses_outlive_a_recovery_whose_journal_is_older(station: Station) -> None:
    record, past = record_of(station), dict[int, dict[str, Any]]()
    for step in (0, STEPS):
        past[step] = json.loads(json.dumps(record.values()))
        record.evaluated(step, {0: [float(STEPS - step), 1, 2]})
    for step, found in ((STEPS, (4.0, 0.0)), (0, (4.0, None))):
        again = record_of(station)
        assert again.begun(step) is True
        again.put_back(past[step])
        assert (again.totals.loss_before, again.totals.loss_after) == found


def test_the_last_evaluation_is_forgotten_where_the_run_goes_back_before_it(station: Station) -> None:
    record = record_of(station)
    record.evaluated(STEPS, {0: [3.0, 1, 2]})
    assert record.totals.loss_after == 3.0
    record.begun(STEPS - 1)
    assert record.totals.loss_after is None
    assert lines(station) == []


def test_the_end_is_written_once(station: Station) -> None:
    record, directory = record_of(station), station.options.directory
    record.begun(0)
    record.stepped(0, sums())
    words = {"cloud": {"rss_mib": 100.0, f"{HELD}weights": 1.5}, "client-0": {"rss_mib": 50.0}}
    record.finish(words, adapter(station))
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["train_tokens"] == 30
    assert summary["peak_rss_mib"] == {"cloud": 100.0, "client-0": 50.0}
    assert summary["held_mib"] == {"cloud": {"weights": 1.5}, "client-0": {}}
    written = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in written.values()) == summary["trainable_parameters"]
    assert (directory / "recipe.yaml").exists()

    record.finish({}, {})  # asked again by one who was lost
    assert json.loads((directory / "summary.json").read_text()) == summary


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_counted(station: Station) -> None:
    record = record_of(station)
    told = StepSums({0: [6.0, 3, 10], 1: [None, 3, 10]}, {}, norm=0.5)
    with pytest.raises(DivergedError, match=r"^step 3: the loss is not finite; lower the learning rate$"):
        record.stepped(2, told)
    assert record.totals.tokens == 0


def test_an_end_that_was_cut_short_is_written_anew(station: Station) -> None:
    record, directory = record_of(station), station.options.directory
    record.finish({}, adapter(station))
    (directory / "summary.json").unlink()  # killed between the two
    record.finish({}, adapter(station))
    assert (directory / "summary.json").exists() and (directory / "adapter" / "adapter_config.json").exists()


def test_totals_survive_the_journal(station: Station) -> None:
    record = record_of(station)
    past = Past(station, station.journal(), station.worker(), record.values, record.put_back)
    record.stepped(0, sums())
    past.commit(1, 7000)
    kept = record.values()
    record.stepped(1, sums())
    past.restore(1)
    assert record.values() == {**kept, "logged": list(kept["logged"])}
