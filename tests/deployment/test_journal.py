"""The journal: read back as written, whole whenever its process is killed, and of one run and one process only."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.deployment.journal import Journal
from splitllm.errors import CheckpointError

IDENTITY = {"role": "client-2", "recipe": "abc", "model": "tiny"}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]

# Forks one child a line, so that torch is imported once: the child writes until it is killed, and says what is written.
WRITER = """
import os, sys, torch
from pathlib import Path
from splitllm.deployment.journal import Journal

def say(what):
    os.write(1, f"{what}\\n".encode())  # at once, as two processes write here

def write_on(folder):
    journal = Journal(folder, {"role": "client-2"})
    step = max(journal.steps(), default=0)
    say("open")
    while True:
        step += 1
        journal.write(step, {"adapter/a": torch.full((40_000,), float(step))}, {"step": step})
        say(step)

for line in sys.stdin:
    child = os.fork()
    if not child:
        write_on(Path(sys.argv[1]))
    say(f"child {child}")
    os.waitpid(child, 0)
    say("gone")
"""
HOLDER = """
import sys
from pathlib import Path
from splitllm.deployment.journal import Journal
journal = Journal(Path(sys.argv[1]), {"role": "client-2"})
print("open", flush=True)
sys.stdin.read()
"""


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "adapter/a": torch.arange(6.0).reshape(2, 3).T + step,  # not contiguous
        "adapter/half": torch.full((3,), 0.1, dtype=torch.bfloat16),
        "step/a": torch.tensor(float(step)),
        "exp_avg/none": torch.zeros(0, 4),
    }


def journal_of(folder: Path, *steps: int, keep: int = 2, **identity: str) -> Journal:
    journal = Journal(folder, {**IDENTITY, **identity}, keep)
    for step in steps:
        journal.write(step, tensors(step), {"step": step})
    return journal


def same(found: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(written) and all(
        found[name].dtype == tensor.dtype and found[name].shape == tensor.shape and torch.equal(found[name], tensor)
        for name, tensor in written.items()
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal"


@contextmanager
def running(script: str, folder: Path) -> Iterator[tuple[IO[str], IO[str]]]:
    """A script as a process: what it reads and what it prints."""
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdin, process.stdout
        finally:
            process.stdin.close()
            process.wait(10)


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    values = {"loss": 0.1, "nested": {"b": [1, None, "ü"], "a": True}}
    with closing(Journal(folder, IDENTITY)) as journal:
        journal.write(7, tensors(7), values)
    with closing(Journal(folder, IDENTITY)) as journal:
        assert journal.steps() == [7]
        found, read = journal.read(7)
    assert same(found, tensors(7))
    assert read == values


@given(
    shapes=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=4,
    ),
    values=st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    ),
)
def test_any_tensors_and_values_come_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[torch.dtype, list[int]]], values: dict[str, Any]
) -> None:
    written = {name: (torch.randn(shape) * 50).to(dtype) for name, (dtype, shape) in shapes.items()}
    with closing(Journal(tmp_path_factory.mktemp("journal"), IDENTITY)) as journal:
        journal.write(3, written, values)
        found, read = journal.read(3)
    assert same(found, written)
    assert read == values


def test_a_role_that_trains_nothing_still_has_its_position(folder: Path) -> None:
    with closing(Journal(folder, IDENTITY)) as journal:
        journal.write(0, {}, {"epoch": 1})
        assert journal.steps() == [0]
        assert journal.read(0) == ({}, {"epoch": 1})


def test_tensors_that_share_storage_are_written(folder: Path) -> None:
    whole = torch.arange(4.0)
    with closing(Journal(folder, IDENTITY)) as journal:
        journal.write(1, {"a": whole, "b": whole, "c": whole[1:3]}, {})
        assert same(journal.read(1)[0], {"a": whole, "b": whole, "c": whole[1:3]})


def test_the_newest_by_number_are_kept_and_given_newest_first(folder: Path) -> None:
    with closing(journal_of(folder, 8, 9, 10)) as journal:
        assert journal.steps() == [10, 9]
        assert sorted(path.name for path in folder.glob("*.safetensors")) == [
            "step-10.safetensors",
            "step-9.safetensors",
        ]


def test_an_entry_can_be_written_again(folder: Path) -> None:
    with closing(journal_of(folder, 1, 2)) as journal:
        journal.write(2, {}, {"again": True})
        assert journal.steps() == [2, 1]
        assert journal.read(2) == ({}, {"again": True})
        assert list(journal.values().items()) == [(2, {"again": True}), (1, journal.read(1)[1])]


def test_a_missing_entry_is_named_with_those_that_are_there(folder: Path) -> None:
    with (
        closing(journal_of(folder, 4, 5)) as journal,
        pytest.raises(CheckpointError, match=r"step-3\.safetensors is missing \(steps there: 5, 4\): go on from one"),
    ):
        journal.read(3)


def test_later_steps_are_forgotten_and_with_them_the_end(folder: Path) -> None:
    with closing(journal_of(folder, 4, 5, keep=3)) as journal:
        journal.mark_finished()
        journal.forget_after(5)
        assert journal.steps() == [5, 4] and journal.finished
        journal.forget_after(4)
        assert journal.steps() == [4] and not journal.finished
        journal.write(5, {}, {"anew": True})
        assert journal.steps() == [5, 4]


def test_a_run_that_is_over_stays_so_until_it_goes_back(folder: Path) -> None:
    with closing(journal_of(folder, 1, 2)) as journal:
        journal.mark_over()
    with closing(journal_of(folder)) as journal:
        assert journal.over and not journal.finished and journal.steps() == [2, 1]
        journal.forget_after(1)
        assert not journal.over


def test_a_complete_run_stays_complete(folder: Path) -> None:
    with closing(journal_of(folder, 1)) as journal:
        assert not journal.finished
        journal.mark_finished()
    with closing(journal_of(folder)) as journal:
        assert journal.finished and journal.steps() == [1]


@pytest.mark.parametrize("part", [8, 60, -1], ids=["header", "metadata", "tensors"])
@pytest.mark.parametrize("damage", ["flipped", "torn"])
def test_a_damaged_entry_is_logged_once_and_the_one_before_is_offered(
    folder: Path, caplog: pytest.LogCaptureFixture, part: int, damage: str
) -> None:
    journal_of(folder, 1, 2).close()
    path = folder / "step-2.safetensors"
    content = bytearray(path.read_bytes())
    content[part] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:part])
    with closing(journal_of(folder)) as journal:
        assert journal.steps() == journal.steps() == [1]
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "step-2.safetensors is damaged" in caplog.text
        with pytest.raises(CheckpointError, match=r"step-2\.safetensors is damaged \(.+\): move it away"):
            journal.read(2)
        journal.write(2, tensors(2), {})
        assert journal.steps() == [2, 1]


def test_every_flipped_bit_is_found(folder: Path) -> None:
    journal_of(folder, 1).close()
    path = folder / "step-1.safetensors"
    whole, draw = path.read_bytes(), random.Random(1)
    with closing(journal_of(folder)) as journal:
        for _ in range(300):
            content = bytearray(whole)
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            assert journal.steps() == [] or same(journal.read(1)[0], tensors(1))


def test_an_entry_under_the_name_of_another_step_is_not_offered(folder: Path) -> None:
    journal_of(folder, 1).close()
    (folder / "step-1.safetensors").rename(folder / "step-9.safetensors")
    with closing(journal_of(folder)) as journal:
        assert journal.steps() == []


@pytest.mark.parametrize("finished_only", [False, True])
def test_the_journal_of_another_run_is_refused_with_what_differs(folder: Path, finished_only: bool) -> None:
    with closing(journal_of(folder, *([] if finished_only else [1]))) as journal:
        if finished_only:
            journal.mark_finished()
    with pytest.raises(CheckpointError) as refused:
        journal_of(folder, recipe="xyz")
    assert str(refused.value) == (
        f"{folder}: holds the journal of another run (recipe abc, here xyz); give a new --output-dir"
    )
    journal_of(folder).close()  # whoever was refused does not keep the lock


def test_what_a_killed_process_left_unfinished_is_removed(folder: Path) -> None:
    journal_of(folder, 1).close()
    unfinished = folder / ".step-2.safetensors.writing"
    unfinished.write_bytes(b"half")
    with closing(journal_of(folder)) as journal:
        assert journal.steps() == [1] and not unfinished.exists()


def test_only_one_process_has_the_journal_until_it_ends(folder: Path) -> None:
    with running(HOLDER, folder) as (_, printed):
        assert printed.readline() == "open\n"
        with pytest.raises(CheckpointError) as refused:
            Journal(folder, {"role": "client-2"})
        assert str(refused.value) == (
            f"{folder}: another process uses this folder for client-2; stop that one, or give another --output-dir"
        )
    Journal(folder, {"role": "client-2"}).close()


def test_a_full_disk_is_an_os_error_that_leaves_the_older_entries(folder: Path) -> None:
    with closing(journal_of(folder, 1, 2)) as journal:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            for step in (2, 3):
                with pytest.raises(OSError, match=rf"step-{step}\.safetensors\.writing"):
                    journal.write(step, tensors(0), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert journal.steps() == [2, 1] and same(journal.read(2)[0], tensors(2))
        assert not list(folder.glob(".*.writing"))
        journal.write(3, {}, {})
        assert journal.steps() == [3, 2]


def kill_at_a_random_moment(asked: IO[str], printed: IO[str], delay: float) -> int:
    """Kill the next child of WRITER `delay` seconds after it has opened the journal.

    Returns:
        the last step that it said was written, or 0.
    """
    asked.write("next\n")
    asked.flush()
    lines: list[str] = []
    while "open\n" not in lines or not any(line.startswith("child") for line in lines):
        lines.append(printed.readline())
    child = next(int(line.split()[1]) for line in lines if line.startswith("child"))
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    while lines[-1] != "gone\n":
        lines.append(printed.readline())
    return max((int(line) for line in lines if line.strip().isdecimal()), default=0)


def test_a_process_killed_at_any_moment_leaves_all_it_announced(folder: Path) -> None:
    draw, announced = random.Random(), 0
    with running(WRITER, folder) as (asked, printed):
        for _ in range(20):
            announced = max(announced, kill_at_a_random_moment(asked, printed, draw.uniform(0, 0.03)))
            with closing(Journal(folder, {"role": "client-2"})) as journal:
                steps = journal.steps()
                assert max(steps, default=0) in (announced, announced + 1)
                for step in steps:
                    found, values = journal.read(step)
                    assert values == {"step": step} and torch.equal(
                        found["adapter/a"], torch.full((40_000,), float(step))
                    )
                announced = max(steps, default=0)
    assert announced > 0
