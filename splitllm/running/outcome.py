"""What a run in one place leaves behind: checkpoints on the way, and at the end what it tells the user."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from splitllm import checkpoint
from splitllm.data import Corpus, eval_batches
from splitllm.data.batching import MicroBatch
from splitllm.errors import CheckpointError, RecipeError
from splitllm.metrics import human_bytes, replace_text
from splitllm.model.export import PlainBatch, take_off, unsplit_model, whole_model_loss, with_adapter
from splitllm.model.loading import Checkpoint
from splitllm.model.machine import peak_bytes
from splitllm.recipe import Recipe, changed_keys, dump_recipe, load_recipe, what_leaves_the_device
from splitllm.roles.adapters import DTYPES
from splitllm.roles.participation import HISTORY
from splitllm.running.base import BASE, BASE_UNFINISHED, base_folder, is_drawn
from splitllm.running.memory import AFTER_STEPS, compared, mib_of, total_mib
from splitllm.running.places import ADAPTER, adapter_folders, where_next
from splitllm.running.results import export, round_base, summary_of
from splitllm.running.state import Run, Totals

HARMLESS = (
    "split.memory_mib:",
    *(f"train.{key}:" for key in ("keep", "log_every", "trackers", "checkpoint_every", "eval_every", "verify_adapter")),
    *(f"wire.{key}:" for key in ("addresses", "certificates", "memory_mib", "keepalive", "absent", "drop_after")),
)
MIB = 2**20
AGREEMENT = 1e-4  # nats, between the split run's loss and that of PEFT on the unsplit base
AGREEMENT_IN_HALF = 2e-2
RECIPE = "recipe.yaml"
LEFTOVERS = {BASE_UNFINISHED, f".{RECIPE}.writing"}


def fingerprint(corpus: Corpus, base: Checkpoint, saved: checkpoint.TrainingState | None = None) -> str:
    """A digest of every client's rows, in order, and one of the base model.

    Raises:
        RecipeError: the checkpoint to resume from saw other rows, or another base model.
    """
    digest = blake2b(digest_size=16)
    for part in (*corpus.train, *corpus.eval):
        digest.update(b"|")
        for example in part:
            digest.update(example.ids.tobytes() + example.targets.tobytes())
    rows, weights = digest.hexdigest(), base.digest()
    if saved is not None:
        saved_rows, _, saved_weights = saved.data.partition("-")
        if saved_rows != rows:
            raise RecipeError(["--resume: the rows of data.source are no longer those that this run was trained on"])
        if saved_weights != weights:
            raise RecipeError([f"--resume: the model in {base.name} is no longer the one that this run was trained on"])
    return f"{rows}-{weights}"


def saved_state(recipe: Recipe, directory: Path, resume: bool) -> checkpoint.TrainingState | None:
    """The checkpoint to go on from, or None for a new run.

    A run that was killed before its first checkpoint has nothing to go on from; resumed, it starts again.

    Raises:
        RecipeError: the folder is in use and `--resume` was not given, or the recipe changed.
        CheckpointError: there is nothing to resume, or it cannot be read.
    """
    if directory.exists() and not directory.is_dir():
        raise RecipeError([f"--output-dir: {directory} is a file; name a folder"])
    recipe_is_there = (directory / RECIPE).exists()
    started = recipe_is_there and any((directory / name).exists() for name in ("checkpoints", "metrics.jsonl"))
    if not resume:
        if started:
            raise RecipeError(
                [f"--output-dir: {directory} holds a run; add --resume to go on with it, or name a new folder"]
            )
        if _foreign(directory):
            raise RecipeError([f"--output-dir: {directory} is not empty; name a new folder"])
        return None
    if not started and (not recipe_is_there or _foreign(directory) - {RECIPE, "tensorboard"}):
        raise CheckpointError(f"--resume: {directory} holds no run; start it without --resume")
    saved = checkpoint.newest(directory)
    changed = changed_keys(_recipe_of(directory, saved), recipe)
    harmful = [line for line in changed if not line.startswith(HARMLESS)]
    if harmful:
        raise RecipeError([f"--resume: the recipe is not that of {directory}: {line}" for line in harmful])
    return saved


def _foreign(directory: Path) -> set[str]:
    """What lies in the folder, but for what a start that failed left there."""
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    return names - LEFTOVERS - ({BASE} if is_drawn(directory / BASE) else set())


def _recipe_of(directory: Path, saved: checkpoint.TrainingState | None) -> Recipe:
    """The recipe that a run was started with."""
    if saved is None:
        return load_recipe(directory / RECIPE)
    try:
        return Recipe.model_validate(saved.recipe)
    except ValueError as error:
        raise CheckpointError(
            f"--resume: {directory} was written by a version of splitllm whose recipes this one cannot read; "
            "resume with that version"
        ) from error


def save(run: Run) -> Path:
    """Write a checkpoint of the step just done."""
    totals = {name: value for name, value in asdict(run.totals).items() if value is not None}
    state = checkpoint.TrainingState(run.step, run.recipe.model_dump(mode="json"), run.data, totals, run.roles.state())
    folder = checkpoint.folder_of(run.directory, run.step)
    if run.world.rank == 0:
        checkpoint.save(folder, state, run.recipe.train.keep)
    run.world.wait()
    return folder


def keep_recipe(run: Run) -> None:
    """Write the resolved recipe, whole or not at all; from then on the folder holds a run."""
    run.directory.mkdir(parents=True, exist_ok=True)
    replace_text(run.directory / RECIPE, dump_recipe(run.recipe))


def restore(run: Run, saved: checkpoint.TrainingState | None) -> None:
    """Put a checkpoint on every role and drop the metrics that came after it: all of them where there is none.

    Raises:
        CheckpointError: its adapter is not that of this run.
    """
    if saved is None:
        run.metrics.truncate_to(-1)
        return
    wanted = {name: tensor.shape for name, tensor in run.roles.state().items()}
    odd = [
        name
        for name, shape in wanted.items()
        if name not in saved.tensors or (saved.tensors[name].shape != shape and not name.endswith(HISTORY))
    ]
    if odd:
        folder = checkpoint.folder_of(run.directory, saved.step)
        raise CheckpointError(f"{folder}: {odd[0]} is missing or misshapen: delete the folder to resume from before")
    run.roles.load(saved.tensors)
    run.step = saved.step
    run.totals = Totals(**saved.totals)
    run.metrics.truncate_to(saved.step)
    run.metrics.say(f"resuming after step {saved.step} of {run.recipe.train.steps}")


def finish(run: Run) -> dict[str, Any]:
    """Export the adapter, check it if the recipe says so, write the summary and tell the user."""
    memory, tensors = _peak_memory(run), run.roles.adapter()
    first = run.world.rank == 0
    if first:
        export(run.plan, run.directory, tensors)
    run.world.wait()
    numbers = sum(tensor.numel() for tensor in tensors.values())
    unsplit = _unsplit_losses(run) if run.recipe.train.verify_adapter and first else {}
    summary = summary_of(run.totals, numbers, memory, what_leaves_the_device(run.recipe), unsplit)
    run.metrics.write_summary(summary)
    run.metrics.close()  # ends the live line above what follows
    for line in _closing_lines(run, summary):
        run.metrics.say(line)
    return summary


def _unsplit_losses(run: Run) -> dict[str, float]:
    """The held-out loss by Hugging Face and PEFT alone, before and after.

    Where weights were quantised it is found twice: on the base as it is, and with the weights that the codes stand for,
    which is what the split run computed with.

    Raises:
        CheckpointError: it is not the split run's.
    """
    dtype, size = DTYPES[run.recipe.model.dtype], run.recipe.train.batch_size
    base = unsplit_model(base_folder(run.recipe, run.directory), dtype, run.recipe.model.revision)
    parts = [[_plain(batch) for batch in eval_batches(part, size)] for part in run.plan.corpus.eval]
    before, after = _losses_of_peft(run, base, parts)
    unrounded = {}
    if run.recipe.quantization:
        unrounded = {"unquantized_loss_before": before, "unquantized_loss_after": after}
        round_base(run.plan, run.directory, base)
        before, after = _losses_of_peft(run, base, parts)
    halves = {run.recipe.model.dtype, *(how.compute_dtype for how in run.recipe.quantization.values())}
    exact = "bfloat16" not in halves and not run.world.half
    if not abs(after - float(run.totals.loss_after or 0.0)) <= (AGREEMENT if exact else AGREEMENT_IN_HALF):
        raise CheckpointError(
            f"{run.directory / ADAPTER}: PeftModel on the unsplit base finds a held-out loss of {after:.6f}, the split "
            f"run {run.totals.loss_after:.6f}: the adapter is not that of this base"
        )
    return {"unsplit_loss_before": before, "unsplit_loss_after": after, **unrounded}


def _losses_of_peft(run: Run, base: PreTrainedModel, parts: Sequence[Sequence[PlainBatch]]) -> tuple[float, float]:
    """Without the adapter, and with it, or each client's own on its rows."""
    folders = adapter_folders(run.recipe, run.directory)
    before = _mean([whole_model_loss(base, part) for part in parts])
    grouped = [list(itertools.chain(*parts))] if len(folders) == 1 else parts
    return before, _mean([_with_adapter_loss(base, *pair) for pair in zip(folders, grouped, strict=True)])


def _with_adapter_loss(base: PreTrainedModel, folder: Path, batches: Sequence[PlainBatch]) -> tuple[float, int]:
    adapted = with_adapter(base, folder)
    try:
        return whole_model_loss(adapted, batches)
    finally:
        take_off(adapted)


def _plain(batch: MicroBatch) -> PlainBatch:
    return batch.ids_BS, batch.lengths, batch.positions_N, batch.targets_N, batch.position_ids_BS


def _mean(sums: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in sums) / sum(labels for _, labels in sums)


def _peak_memory(run: Run) -> dict[str, Any]:
    """Resident and GPU memory of each process, predicted and at most, and what each role's tensors took, in MiB."""
    rss, gpu = _of_all_processes(run, peak_bytes()), 0
    if run.world.device.type == "cuda":
        gpu = torch.cuda.max_memory_allocated(run.world.device)
    held = {
        role: {name: round(value / MIB, 2) for name, value in worker.peak().items()}
        for workers in run.roles.workers.values()
        for role, worker in workers.items()
    }
    return {
        "peak_rss_mib": _by_process(rss),
        "peak_gpu_mib": _by_process(_of_all_processes(run, gpu)),
        "predicted_mib": {"all processes": total_mib(run.plan.ledger.together)},
        "held_mib": held,
    }


def measure(run: Run) -> None:
    """Tell what the run takes, and what was predicted: of a GPU what lies there, else what is resident."""
    if run.step != min(AFTER_STEPS, run.recipe.train.steps):
        return
    on_gpu, predicted = run.world.device.type == "cuda", run.plan.ledger.together
    found = torch.cuda.max_memory_allocated(run.world.device) if on_gpu else peak_bytes()
    measured = sum(_of_all_processes(run, found))
    expected = (predicted.on_device if on_gpu else predicted.total) / MIB
    parts = mib_of(predicted)
    run.metrics.log(
        "memory", step=run.step, predicted_mib=round(expected, 1), measured_mib=round(measured, 1), parts_mib=parts
    )
    run.metrics.say(f"memory after {run.step} steps: {compared(expected, measured)}")


def _of_all_processes(run: Run, size: float) -> list[float]:
    """In MiB."""
    sizes = [0.0] * run.world.size
    sizes[run.world.rank] = size / MIB
    return run.world.sum_numbers(sizes)


def _by_process(values: list[float]) -> dict[str, float]:
    return {f"process-{rank}": round(value, 1) for rank, value in enumerate(values)}


def _closing_lines(run: Run, summary: dict[str, Any]) -> list[str]:
    directory, base = run.directory, base_folder(run.recipe, run.directory)
    lines = [
        f"held-out loss: {summary['eval_loss_before']:.4f} before, {summary['eval_loss_after']:.4f} after (split run)",
    ]
    rounded = "unquantized_loss_after" in summary
    if "unsplit_loss_after" in summary:
        lines.append(
            f"held-out loss: {summary['unsplit_loss_before']:.4f} before, {summary['unsplit_loss_after']:.4f} after "
            + ("(PeftModel on the unsplit base, rounded alike)" if rounded else "(PeftModel on the unsplit base)")
        )
    if rounded:
        lines.append(
            f"held-out loss: {summary['unquantized_loss_before']:.4f} before, "
            f"{summary['unquantized_loss_after']:.4f} after (PeftModel on the unsplit base as it is)"
        )
    lines.append(
        f"over the cuts: {human_bytes(summary['wire_bytes_up'])} up, {human_bytes(summary['wire_bytes_down'])} down; "
        f"{summary['train_tokens']} tokens at {summary['tokens_per_second']:.0f} tokens/s"
    )
    for role, held in summary["held_mib"].items():
        parts = ", ".join(f"{name} {value:.1f}" for name, value in held.items())
        lines.append(f"peak memory of {role}: {sum(held.values()):.1f} MiB of tensors ({parts})")
    [predicted] = summary["predicted_mib"].values()
    lines.append(
        f"peak resident memory: {', '.join(f'{name} {v:.0f} MiB' for name, v in summary['peak_rss_mib'].items())}"
        f" ({predicted:.0f} predicted)"
    )
    return lines + where_next(run.recipe, directory, base)
