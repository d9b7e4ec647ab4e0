"""What a role says of its memory: predicted as it starts, measured after its first steps, and both at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from splitllm.deployment import footprint
from splitllm.deployment.past import Past
from splitllm.deployment.station import Options, Station, open_station
from splitllm.recipe import load_recipe
from splitllm.running.memory import AFTER_STEPS
from tests.tiny import write_recipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("base"))


def station(path: Path, directory: Path, *overrides: str) -> Station:
    return open_station(load_recipe(path, overrides), Options("edge", directory), client=None)


def said(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if record.message == "memory"]  # type: ignore[attr-defined]


def test_a_role_says_what_it_will_hold_and_after_its_first_steps_what_it_does(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "splitllm")
    edge = station(path, tmp_path / "edge")
    [predicted] = said(caplog)
    assert predicted["predicted_mib"] >= predicted["weights"] + predicted["process"] > 0
    past = Past(edge, edge.journal(), edge.worker())
    for step in range(1, AFTER_STEPS + 2):
        past.commit(step, 1)
    [_, measured] = said(caplog)
    assert measured["measured_mib"] > 0 and measured["predicted"] == predicted["predicted_mib"]
    words = past.closing_words()
    assert words["predicted_mib"] == predicted["predicted_mib"] and words["rss_mib"] >= measured["measured_mib"]


def test_only_a_role_with_a_limit_gives_memory_back_at_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(footprint, "one_arena", lambda: None)
    monkeypatch.setattr(footprint, "return_at_once", lambda: asked.append("yes"))
    station(path, tmp_path / "free", "split.memory_mib={client: 100000}")
    assert asked == []
    station(path, tmp_path / "limited", "split.memory_mib={edge: 100000}")
    assert asked == ["yes"]
