"""What a role goes back to: kept step by step, put back as its journal tells, and of one run only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitllm.deployment.past import HELD, Past
from splitllm.deployment.station import Options, Station, open_station
from splitllm.errors import CheckpointError, RejoinError
from splitllm.recipe import load_recipe, start_digest
from splitllm.roles.recovery import Standing
from tests.tiny import write_recipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("base"))


def station(path: Path, directory: Path, name: str = "edge", *overrides: str) -> Station:
    return open_station(load_recipe(path, overrides), Options(name, directory), client=None)


def past(found: Station, **both: Any) -> Past:
    return Past(found, found.journal(), found.worker(), **both)


def shift(worker: Any, by: float) -> None:
    for parameter in worker.trainable.parameters.values():
        parameter.data.add_(by)


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


def test_a_commit_in_two_parts_keeps_the_state_of_the_first_whatever_is_trained_meanwhile(
    path: Path, tmp_path: Path
) -> None:
    told = {"tokens": 7}
    edge = past(station(path, tmp_path), values=lambda: told)
    shift(edge.worker, 1.0)
    kept = {name: tensor.clone() for name, tensor in edge.state().items()}
    write = edge.committing(1, 7000)
    shift(edge.worker, 1.0)
    told["tokens"] = 8
    write()
    assert edge.standing().states == ((1, "7000"), (0, "new"))
    tensors, values = edge.journal.read(1)
    assert values["beside"] == {"tokens": 7}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items()) and tensors.keys() == kept.keys()


def test_a_commit_that_is_late_changes_nothing_that_was_told(path: Path, tmp_path: Path) -> None:
    edge = past(station(path, tmp_path))
    early, late = edge.committing(1, 7000), edge.committing(2, 7000)
    early()
    told = edge.standing()
    with pytest.raises(RejoinError, match="step 2 was not committed"):
        late()
    assert edge.standing() == told == Standing("edge", ((1, "7000"), (0, "new")))
    edge.restore(0)
    edge.committing(1, 7001)()
    assert edge.standing().states == ((1, "7001"), (0, "new"))


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
    with pytest.raises(
        CheckpointError,
        match=r"another process uses this folder for edge; stop that one, or give another --output-dir$",
    ):
        edge.journal()
    first.journal.close()
    with pytest.raises(
        CheckpointError, match=r"holds the journal of another run \(recipe .*; give a new --output-dir$"
    ):
        station(path, tmp_path / "edge", "edge", "seed=4").journal()


def test_closing_words_tell_the_memory_of_this_process(path: Path, tmp_path: Path) -> None:
    words = past(station(path, tmp_path / "edge")).closing_words()
    assert words["rss_mib"] > 50 and words["predicted_mib"] > 50
    assert all(name in ("rss_mib", "predicted_mib") or name.startswith(HELD) for name in words)


def test_another_start_is_another_origin(path: Path, tmp_path: Path) -> None:
    first = past(station(path, tmp_path / "edge"))
    digests = []
    for content in (b"one", b"other"):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        digests.append(start_digest(load_recipe(path, [f"lora.start_from={tmp_path}"])))
    assert len({*digests, "new"}) == 3 and all(len(digest) == 16 for digest in digests)
    assert first.standing().states == ((0, start_digest(load_recipe(path))),)
