"""Whole runs in this process: what they leave behind, and that an interrupted one ends as if it had not been."""

from __future__ import annotations

import gc
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from splitllm.checkpoint import newest
from splitllm.errors import CheckpointError, RecipeError, RunInterrupted
from splitllm.metrics import Metrics, read_records
from splitllm.recipe import Recipe, load_recipe
from splitllm.running.base import MARKER
from splitllm.running.interrupt import StopSignal
from splitllm.train import train
from tests.grids import cases
from tests.tiny import write_recipe, write_rows

STEPS = 4
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    train(recipe(folder), folder / "uninterrupted")
    return folder / "uninterrupted"


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", overrides)


class Crash(Exception):
    """Stands for whatever ends a process without warning."""


def crash_at(monkeypatch: pytest.MonkeyPatch, event: str, step: int) -> None:
    """The run dies where it would log this."""
    whole = Metrics.log

    def log(self: Metrics, name: str, **fields: Any) -> None:
        if name == event and fields["step"] == step:
            raise Crash
        whole(self, name, **fields)

    monkeypatch.setattr(Metrics, "log", log)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ctrl-C is pressed before the question whether it was is asked for the time after `steps` more steps."""

    class Stop(StopSignal):
        def __init__(self) -> None:
            super().__init__()
            self.questions = 0

        def __getattribute__(self, name: str) -> Any:
            if name != "asked":
                return super().__getattribute__(name)
            self.questions += 1
            return self.questions > steps

    monkeypatch.setattr(sys.modules["splitllm.train"], "StopSignal", Stop)


def same_end(resumed: Path, uninterrupted: Path) -> None:
    """The same adapter in every byte, every event once, the same sums."""
    assert (resumed / ADAPTER).read_bytes() == (uninterrupted / ADAPTER).read_bytes()
    assert events(resumed) == events(uninterrupted)
    timeless = ("eval_loss_before", "eval_loss_after", "train_tokens", "wire_bytes_up", "wire_bytes_down")
    summaries = [json.loads((run / "summary.json").read_text()) for run in (resumed, uninterrupted)]
    assert [summaries[0][name] for name in timeless] == [summaries[1][name] for name in timeless]


def events(run: Path) -> list[dict[str, Any]]:
    """All that was logged but the time and memory it took."""
    records = read_records(run / "metrics.jsonl")
    machines = {"seconds", "predicted_mib", "measured_mib", "parts_mib"}
    return [{key: value for key, value in record.items() if key not in machines} for record in records]


def contents(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


def test_a_run_leaves_recipe_metrics_checkpoints_adapter_and_summary(folder: Path, uninterrupted: Path) -> None:
    assert contents(uninterrupted) == {"recipe.yaml", "metrics.jsonl", "checkpoints", "adapter", "summary.json"}
    assert contents(uninterrupted / "checkpoints") == {"step-3", "step-4"}
    assert load_recipe(uninterrupted / "recipe.yaml") == recipe(folder)
    logged = [(event["event"], event["step"]) for event in events(uninterrupted)]
    trained: list[tuple[str, int]] = [("train", step) for step in range(1, STEPS + 1)]
    assert logged == [("eval", 0), *trained[:2], ("memory", 2), *trained[2:], ("eval", STEPS)]
    [memory] = [record for record in read_records(uninterrupted / "metrics.jsonl") if record["event"] == "memory"]
    assert memory["predicted_mib"] == memory["parts_mib"]["total"] > 0 and memory["measured_mib"] > 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), uninterrupted / "adapter")
    adapted = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(adapted) == 4
    assert all(p.abs().max() > 0 for p in adapted)


def at_the_ends_or_between_checkpoints(step: int, every: int) -> bool:
    return step in (1, STEPS) if every == 1 else 1 < step < STEPS


@pytest.mark.parametrize(
    ("step", "every"), cases(product(range(1, STEPS + 1), (1, 2)), at_the_ends_or_between_checkpoints)
)
def test_a_crash_in_any_step_changes_nothing_at_the_end(
    folder: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, every: int
) -> None:
    wanted = recipe(folder, f"train.checkpoint_every={every}")
    with monkeypatch.context() as patched:
        crash_at(patched, "train", step)
        with pytest.raises(Crash):
            train(wanted, tmp_path / "run")
    saved = newest(tmp_path / "run")
    assert (saved.step if saved else 0) == (step - 1) // every * every
    train(wanted, tmp_path / "run", resume=True)
    same_end(tmp_path / "run", uninterrupted)


def test_a_crash_in_the_last_evaluation_changes_nothing_at_the_end(
    folder: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        crash_at(patched, "eval", STEPS)
        with pytest.raises(Crash):
            train(recipe(folder), tmp_path / "run")
    train(recipe(folder), tmp_path / "run", resume=True)
    same_end(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_a_run_stopped_after_every_step_ends_like_one_that_was_not(
    folder: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str
) -> None:
    wanted = recipe(folder, "train.checkpoint_every=50", f"split.labels={labels}")
    with monkeypatch.context() as patched:
        stop_after(patched, 0)
        with pytest.raises(RunInterrupted, match="stopped after step 0 of 4"):
            train(wanted, tmp_path / "run")
        stop_after(patched, 1)
        for step in range(1, STEPS):
            with pytest.raises(RunInterrupted, match=f"stopped after step {step} of 4.*--resume"):
                train(wanted, tmp_path / "run", resume=True)
    train(wanted, tmp_path / "run", resume=True)
    if labels == "client":
        same_end(tmp_path / "run", uninterrupted)
    else:
        train(wanted, tmp_path / "whole")
        same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("step", [2, 3])  # between two events, and right after one
def test_events_that_sum_several_steps_are_the_same_after_resuming(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    wanted = recipe(folder, "train.log_every=3", "train.eval_every=2", "train.checkpoint_every=2")
    train(wanted, tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_after(patched, step)
        with pytest.raises(RunInterrupted):
            train(wanted, tmp_path / "run")
    train(wanted, tmp_path / "run", resume=True)
    same_end(tmp_path / "run", tmp_path / "whole")


def test_resuming_a_finished_run_writes_the_same_adapter_again(folder: Path, tmp_path: Path) -> None:
    train(recipe(folder, "train.steps=1", "train.schedule.warmup_steps=0"), tmp_path / "run")
    first = (tmp_path / "run" / ADAPTER).read_bytes(), events(tmp_path / "run")
    train(recipe(folder, "train.steps=1", "train.schedule.warmup_steps=0"), tmp_path / "run", resume=True)
    assert ((tmp_path / "run" / ADAPTER).read_bytes(), events(tmp_path / "run")) == first


def test_another_run_is_not_overwritten(folder: Path, uninterrupted: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in uninterrupted.rglob("*"))
    with pytest.raises(RecipeError, match=r"holds a run; add --resume"):
        train(recipe(folder), uninterrupted)
    assert sorted((path, path.stat().st_mtime_ns) for path in uninterrupted.rglob("*")) == before


USED = {
    "an adapter": ("adapter/adapter_config.json",),
    "a base that no run drew": ("base/config.json",),
    "checkpoints": ("checkpoints/step-3/model.bin",),
    "a recipe": ("recipe.yaml",),
}


@pytest.mark.parametrize("content", USED)
def test_a_folder_in_use_is_left_alone(folder: Path, tmp_path: Path, content: str) -> None:
    for name in USED[content]:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(RecipeError, match=r"--output-dir: .*run is not empty; name a new folder"):
        train(recipe(folder), tmp_path / "run")
    found = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert found == set(USED[content])


def test_a_recipe_beside_other_files_is_no_run_to_resume(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    (tmp_path / "adapter").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no run; start it without --resume"):
        train(recipe(folder), tmp_path, resume=True)


def test_a_run_killed_before_its_first_event_is_started_again(
    folder: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        crash_at(patched, "eval", 0)
        with pytest.raises(Crash):
            train(recipe(folder), tmp_path / "run")
    assert contents(tmp_path / "run") == {"recipe.yaml"}
    train(recipe(folder), tmp_path / "run", resume=True)
    same_end(tmp_path / "run", uninterrupted)


def test_resuming_where_there_is_no_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--resume: .*nothing holds no run; start it without --resume"):
        train(recipe(folder), tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_file_is_no_output_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match=r"--output-dir: .*file is a file; name a folder"):
        train(recipe(folder), tmp_path / "file")


def test_resuming_with_another_recipe_names_the_keys_that_differ(folder: Path, uninterrupted: Path) -> None:
    changed = recipe(folder, "train.steps=9", "lora.dropout=0.2", "train.log_every=2", "train.keep=7")
    with pytest.raises(RecipeError) as refused:
        train(changed, uninterrupted, resume=True)
    opening = f"--resume: the recipe is not that of {uninterrupted}: "
    assert refused.value.problems == [f"{opening}lora.dropout: 0.1 -> 0.2", f"{opening}train.steps: 4 -> 9"]


def test_a_run_without_a_checkpoint_still_remembers_its_recipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        crash_at(patched, "train", 1)
        with pytest.raises(Crash):
            train(recipe(folder), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"train\.steps: 4 -> 5"):
        train(recipe(folder, "train.steps=5"), tmp_path / "run", resume=True)


def test_resuming_with_other_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(RunInterrupted):
            train(recipe(tmp_path), tmp_path / "run")
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("w1 ", "w2 "))
    with pytest.raises(RecipeError, match=r"--resume: the rows of data\.source are no longer those"):
        train(recipe(tmp_path), tmp_path / "run", resume=True)
    write_rows(tmp_path / "rows.jsonl")
    assert train(recipe(tmp_path), tmp_path / "run", resume=True)["train_tokens"] > 0


def test_resuming_with_another_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(RunInterrupted):
            train(recipe(tmp_path), tmp_path / "run")
    file = tmp_path / "base" / "model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    tensors["transformer.h.2.mlp.c_fc.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"--resume: the model in .*base is no longer the one that this run was"):
        train(recipe(tmp_path), tmp_path / "run", resume=True)
    file.write_bytes(whole)
    assert train(recipe(tmp_path), tmp_path / "run", resume=True)["train_tokens"] > 0


def test_random_weights_are_drawn_once_and_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(folder, "model.random={n_layer: 3}", "split.cuts=[1, 2]", f"model.tokenizer={folder / 'base'}")
    train(wanted, tmp_path / "whole")
    (tmp_path / "run" / "base").mkdir(parents=True)  # left over from a start that failed: not this recipe's weights
    (tmp_path / "run" / "base" / "config.json").write_text("{}")
    (tmp_path / "run" / "base" / MARKER).touch()
    (tmp_path / "run" / ".base.writing").mkdir()
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(RunInterrupted):
            train(wanted, tmp_path / "run")
    drawn = (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns
    train(wanted, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns == drawn
    same_end(tmp_path / "run", tmp_path / "whole")


def test_the_adapter_is_checked_against_peft_on_the_unsplit_base(folder: Path, tmp_path: Path) -> None:
    summary = train(recipe(folder, "train.verify_adapter=true"), tmp_path / "run")
    assert summary["unsplit_loss_before"] == pytest.approx(summary["eval_loss_before"], abs=1e-5)
    assert summary["unsplit_loss_after"] == pytest.approx(summary["eval_loss_after"], abs=1e-5)
    assert summary["eval_loss_after"] != pytest.approx(summary["eval_loss_before"], abs=1e-3)


def test_tensorboard_gets_every_event(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe(folder, "train.trackers=[tensorboard]"), tmp_path / "run")
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(file)).Reload()
    written = {point.step: point.value for point in board.Scalars("train/loss")}
    logged = {event["step"]: event["loss"] for event in events(tmp_path / "run") if event["event"] == "train"}
    assert written == pytest.approx(logged, rel=1e-6)
    assert [point.step for point in board.Scalars("eval/loss")] == [0, STEPS]


ROUNDS = ["rounds.replicas=local", "rounds.cloud_every=2"]
BATCHED = ["server.batching=synchronous", "model.dropout=0.0", "lora.adapters=common"]


@pytest.mark.parametrize("options", [[], [*ROUNDS, *BATCHED], [*ROUNDS, "rounds.rule=fedex"]], ids=str)
def test_nothing_of_a_run_stays_in_memory_when_it_is_over(
    folder: Path, uninterrupted: Path, tmp_path: Path, options: list[str]
) -> None:
    """Nothing that refers to itself in a circle holds a tensor, so none waits for the garbage to be collected."""
    gc.collect()
    gc.disable()
    try:
        before = {id(each) for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)}
        train(recipe(folder, *options), tmp_path / "run")
        after = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        left = [list(each.shape) for each in after if id(each) not in before]
        assert not [shape for shape in left if shape], "but for numbers that PyTorch's fake tensors keep, once a shape"
    finally:
        gc.enable()
