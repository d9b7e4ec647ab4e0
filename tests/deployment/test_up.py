"""`up` before any process is started, and once a run is complete; `tests/system/test_up.py` runs the processes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from splitllm.deployment.folder import prepare
from splitllm.deployment.up import up
from splitllm.errors import CheckpointError, RecipeError
from splitllm.recipe import load_recipe

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
SUMMARY = {
    "eval_loss_before": 4.25,
    "eval_loss_after": 3.5,
    "train_tokens": 8000,
    "tokens_per_second": 1999.6,
    "wire_bytes_up": 2**20,
    "wire_bytes_down": 2**21,
    "held_mib": {"client-0": {"weights": 3.25, "adapter and optimiser": 0.75}},
    "peak_rss_mib": {"client-0": 470.4, "cloud": 464.0},
    "predicted_mib": {"client-0": 480.0},
}


def test_one_tier_is_no_deployment(tmp_path: Path) -> None:
    recipe = load_recipe(QUICKSTART, ["split.tiers={client: 1}", "split.cuts=[]"])
    with pytest.raises(RecipeError, match=r"split\.tiers: a deployment needs at least two tiers"):
        up(recipe, tmp_path / "up")
    assert not (tmp_path / "up").exists()


def test_a_complete_run_is_told_again_and_nothing_is_started(tmp_path: Path) -> None:
    recipe, out = load_recipe(QUICKSTART), tmp_path / "up"
    top = out / "cloud"
    (top / "adapter").mkdir(parents=True)
    prepare(recipe, out, threads=1)
    (top / "metrics.jsonl").write_text("{}\n")
    (top / "summary.json").write_text(json.dumps(SUMMARY))
    (top / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "the-base"}')
    file = io.StringIO()
    assert up(recipe, out, resume=True, console=Console(file=file, width=200)) == SUMMARY
    assert file.getvalue().splitlines() == [
        "held-out loss: 4.2500 before, 3.5000 after (split run)",
        "over the wire: 1.0 MiB up, 2.0 MiB down; 8000 tokens at 2000 tokens/s",
        "peak memory of client-0: 4.0 MiB of tensors (weights 3.2, adapter and optimiser 0.8)",
        "peak resident memory: client-0 470 MiB (480 predicted), cloud 464 MiB",
        f"adapter: {out / 'adapter'}",
        f"next: peft.PeftModel.from_pretrained(base_model, {str(out / 'adapter')!r}), or",
        f"      splitllm merge {out / 'adapter'} --base the-base --output-dir {out / 'merged'}",
    ]
    assert not list(out.glob("*.log"))


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run; start it without --resume"):
        up(load_recipe(QUICKSTART), tmp_path / "up", resume=True)


@pytest.mark.system
def test_what_cannot_fit_is_refused_before_anything_is_written_or_started(tmp_path: Path) -> None:
    file, recipe = io.StringIO(), load_recipe(QUICKSTART, ["split.memory_mib={edge: 100}", "train.batch_size=64"])
    with pytest.raises(RecipeError, match=r"^split\.memory_mib\.edge: 100 MiB do not hold edge-0, which takes"):
        up(recipe, tmp_path / "up", console=Console(file=file, width=200))
    assert "client x4" in file.getvalue()
    assert not list((tmp_path / "up").glob("*.log")) and not (tmp_path / "up" / "cloud").exists()
