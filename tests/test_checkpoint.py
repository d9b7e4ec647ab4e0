"""Training checkpoints: read back as written, whole or not at all, and clear words for one that is torn."""

from __future__ import annotations

import json
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splitllm import checkpoint
from splitllm.checkpoint import TrainingState, folder_of, newest
from splitllm.errors import CheckpointError


def state(step: int) -> TrainingState:
    tensors = {
        "adapter/a": torch.arange(6.0).reshape(2, 3).T + step,  # not contiguous
        "step/a": torch.tensor(float(step)),
        "adapter/half": torch.full((3,), 0.1, dtype=torch.bfloat16),
        "adapter/wide": torch.full((2,), 1 / 3, dtype=torch.float64),
    }
    recipe = {"seed": 1, "split": {"tiers": {"edge": 2, "cloud": 1}}}
    return TrainingState(step, recipe, "digest", {"tokens": 5, "logged": [1, 0.1]}, tensors)


def save(run: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        checkpoint.save(folder_of(run, step), state(step), keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found, written = newest(tmp_path), state(7)
    assert found is not None
    assert replace(found, tensors={}) == replace(written, tensors={})
    assert list(found.recipe["split"]["tiers"]) == ["edge", "cloud"]  # bottom-up, not sorted
    assert set(found.tensors) == set(written.tensors)
    for name, tensor in written.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_the_newest_by_number_is_read_and_only_so_many_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 8, 9, 10, keep=2)
    assert names(tmp_path) == ["step-10", "step-9"]
    found = newest(tmp_path)
    assert found is not None and found.step == 10


def test_nothing_is_found_where_nothing_was_saved(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    (tmp_path / "checkpoints" / "step-x").mkdir(parents=True)
    assert newest(tmp_path) is None


def test_what_a_killed_process_left_unfinished_is_ignored_and_then_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    torn = tmp_path / "checkpoints" / ".step-2.writing"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"half")
    found = newest(tmp_path)
    assert found is not None and found.step == 1
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-1", "step-3"]


def test_a_checkpoint_that_is_there_is_not_touched(tmp_path: Path) -> None:
    save(tmp_path, 1)
    files = {path: path.stat().st_mtime_ns for path in folder_of(tmp_path, 1).iterdir()}
    save(tmp_path, 1)
    assert {path: path.stat().st_mtime_ns for path in folder_of(tmp_path, 1).iterdir()} == files


def test_nothing_is_there_under_its_name_before_all_of_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 1)
    assert newest(tmp_path) is None


def test_a_full_disk_is_an_os_error_that_names_the_place_and_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=r"step-2\.writing"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-1"]


def test_another_folder_of_its_name_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    folder_of(tmp_path, 1).mkdir(parents=True)
    save(tmp_path, 1)
    found = newest(tmp_path)
    assert found is not None and found.step == 1
    folder_of(tmp_path, 2).mkdir()
    (folder_of(tmp_path, 2) / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match=r"step-2 is no checkpoint, but lies where one belongs: move it away"):
        save(tmp_path, 2)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-2", "step-3"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.safetensors", None),
        ("state.safetensors", b""),
        ("state.safetensors", 40),
        ("state.safetensors", -1),
        ("state.json", None),
        ("state.json", b""),
        ("state.json", 20),
        ("state.json", b"[]"),
        ("state.json", b'{"format": 1}'),
        ("state.json", b'"\xff"'),
    ],
)
@pytest.mark.parametrize("others", [True, False])
def test_a_torn_checkpoint_is_named_with_the_remedy(
    tmp_path: Path, file: str, content: bytes | int | None, others: bool
) -> None:
    save(tmp_path, *([3] if others else []), 5)
    path = folder_of(tmp_path, 5) / file
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[:content] if isinstance(content, int) else content)
    with pytest.raises(CheckpointError) as torn:
        newest(tmp_path)
    remedy = f"delete it to resume from {folder_of(tmp_path, 3) if others else 'the beginning'}"
    where = re.escape(str(folder_of(tmp_path, 5)))
    assert re.fullmatch(rf"{where} cannot be read \(.+\): {re.escape(remedy)}", str(torn.value))


def test_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    save(tmp_path, 5)
    file = folder_of(tmp_path, 5) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match=r"format 99, this version reads 1; resume with the version"):
        newest(tmp_path)
