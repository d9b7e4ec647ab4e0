"""The exported adapter gives the same held-out loss through PEFT on the unsplit base: every family and variant."""

from __future__ import annotations

import asyncio
import math
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

from splitllm import Shard, load_recipe, train
from splitllm.data.corpus import Corpus
from splitllm.errors import CheckpointError
from splitllm.model.export import PlainBatch, merge, save_adapter, unsplit_model, whole_model_loss, with_adapter
from splitllm.model.loading import load_config, quiet_transformers
from splitllm.model.lora import lora_config, target_modules
from splitllm.recipe import Recipe
from splitllm.roles.assembly import Roles
from splitllm.running import outcome
from tests.families import CONFIGS, GEMMA, MIXED, corpus, recipe, roles_of
from tests.grids import cases
from tests.test_plain_loop import write_recipe

VARIANTS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


def trained(wanted: Recipe, rows: Corpus, steps: int = 2) -> tuple[Roles, float]:
    """The roles after a few steps, and the held-out loss as they see it."""
    roles = roles_of(wanted, rows)

    async def run() -> float:
        for step in range(steps):
            await asyncio.gather(*(client.step(step) for client in roles.clients))
        reports = [await client.evaluate() for client in roles.clients]
        return sum(report.loss for report in reports) / sum(report.labels for report in reports)

    return roles, asyncio.run(run())


def held_out(roles: Roles) -> list[Any]:
    every = [batch for client in roles.clients for batch in client.evaluation]
    return [(b.ids_BS, b.lengths, b.positions_N, b.targets_N, b.position_ids_BS) for b in every]


def exported(wanted: Recipe, roles: Roles, folder: Path) -> Path:
    state = {name.removeprefix("adapter/"): t for name, t in roles.state().items() if name.startswith("adapter/")}
    config = load_config(wanted.model.base)
    targets = wanted.lora.targets
    names = target_modules(config, list(targets) if isinstance(targets, tuple) else targets)
    save_adapter(folder, state, lora_config(config, wanted.lora, names, wanted.model.base))
    return folder


def mean_loss(model: Any, batches: list[PlainBatch]) -> float:
    total, labels = whole_model_loss(model, batches)
    return total / labels


def plain_or_in_turn(family: str, variant: str) -> bool:
    """Of the other variants each in every fourth family."""
    return variant == "lora" or (list(CONFIGS).index(family) + 2 * (variant == "dora")) % 4 == 0


@pytest.mark.parametrize(("family", "variant"), cases(product(CONFIGS, VARIANTS), plain_or_in_turn))
def test_peft_on_the_unsplit_base_gives_the_same_loss(family: str, variant: str, tmp_path: Path) -> None:
    settings = recipe(family, [2, 4]).lora.model_dump()
    wanted, rows = recipe(family, [2, 4], "client", lora={**settings, **VARIANTS[variant]}), corpus(2)
    roles, loss = trained(wanted, rows)
    batches = held_out(roles)
    with quiet_transformers():
        base = AutoModelForCausalLM.from_pretrained(wanted.model.base, dtype=torch.float64)
    untrained = mean_loss(base.eval(), batches)
    model = PeftModel.from_pretrained(base, str(exported(wanted, roles, tmp_path / "adapter"))).eval()
    assert mean_loss(model, batches) == pytest.approx(loss, rel=1e-12)
    assert not math.isclose(untrained, loss, rel_tol=1e-6), "training changed nothing, so this test shows nothing"


def test_merging_gives_a_plain_model_of_the_same_loss(tmp_path: Path) -> None:
    wanted, rows = recipe("llama", [2, 4]), corpus(2)
    roles, loss = trained(wanted, rows)
    adapter = exported(wanted, roles, tmp_path / "adapter")
    merged = with_adapter(unsplit_model(wanted.model.base), adapter).merge_and_unload()
    assert mean_loss(merged, held_out(roles)) == pytest.approx(loss, rel=1e-12)


@cache
def multimodal_folder() -> Path:
    """A tiny Gemma 3 with a vision tower, whose text part sits behind a prefix; its names carry q_proj too."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**GEMMA, "layer_types": MIXED, "vocab_size": 64, "num_hidden_layers": 6},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        image_token_index=60,
    )
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="multimodal-"))
    with quiet_transformers():
        Gemma3ForConditionalGeneration(config).double().save_pretrained(folder)
    return folder


def test_the_text_part_of_a_multimodal_checkpoint_is_cut_exactly() -> None:
    folder, hidden = multimodal_folder(), torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    with quiet_transformers():
        whole = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    wanted = whole(input_ids=hidden).logits
    for start, stop in [(0, 2), (2, 5), (5, None)]:
        hidden = Shard.from_pretrained(folder, start, stop, dtype=torch.float64)(hidden)
    torch.testing.assert_close(hidden, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("full", ["null", "[cloud]"])
def test_an_adapter_of_a_multimodal_checkpoint_loads_on_the_multimodal_model(tmp_path: Path, full: str) -> None:
    path = write_recipe(tmp_path, "gemma3", "float64")
    changes = [f"model.base={multimodal_folder()}", "train.verify_adapter=true", "train.optimizer.lr=0.05"]
    tiers = "split={tiers: {client: 2, edge: 1, cloud: 1}, cuts: [1, 3], labels: cloud}"
    changes += [tiers, f"train.full_tiers={full}"]
    summary = train(load_recipe(path, changes), tmp_path / "run")
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["unsplit_loss_before"] == pytest.approx(summary["eval_loss_before"], rel=1e-12)
    assert summary["unsplit_loss_after"] == pytest.approx(summary["eval_loss_after"], rel=1e-12)
    again = [*changes, f"lora.start_from={tmp_path / 'run' / 'adapter'}"]
    onward = train(load_recipe(path, again), tmp_path / "onward")
    assert onward["eval_loss_before"] == pytest.approx(summary["eval_loss_after"], rel=1e-12)


def test_a_quantised_run_on_a_multimodal_checkpoint_is_checked_on_its_text_part(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "gemma3", "float32")
    summary = train(
        load_recipe(path, [f"model.base={multimodal_folder()}", "train.verify_adapter=true", "quantization=nf4"]),
        tmp_path / "run",
    )
    assert summary["unsplit_loss_after"] == pytest.approx(summary["eval_loss_after"], rel=1e-5)
    assert summary["unquantized_loss_after"] != pytest.approx(summary["eval_loss_after"], rel=1e-5)


STORIES = """
model: {{base: {base}, dtype: float32}}
split: {{tiers: {{client: 2, edge: 1, cloud: 1}}, cuts: [1, 3], labels: client}}
lora: {{rank: 8, alpha: 16}}
data: {{source: {data}, format: text, max_length: 96, limit: 600, eval_fraction: 0.02}}
train: {{steps: 30, threads: 1, optimizer: {{lr: 3.0e-3}}, verify_adapter: true}}
"""


def test_a_really_pretrained_model_learns_and_its_adapter_reloads(shared: Path, tmp_path: Path) -> None:
    plays = (shared / "tinyshakespeare" / "input.txt").read_text().split("\n\n")
    text = tmp_path / "plays.txt"
    text.write_text("\n".join(" ".join(play.split()) for play in plays[:700]))
    file = tmp_path / "recipe.yaml"
    file.write_text(STORIES.format(base=shared / "stories260K", data=text))
    summary = train(load_recipe(file), tmp_path / "run")
    assert summary["eval_loss_after"] < 0.97 * summary["eval_loss_before"]
    assert summary["unsplit_loss_before"] == pytest.approx(summary["eval_loss_before"], rel=1e-5)
    assert summary["unsplit_loss_after"] == pytest.approx(summary["eval_loss_after"], rel=1e-5)
    merge(tmp_path / "run" / "adapter", str(shared / "stories260K"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tuned = with_adapter(unsplit_model(str(shared / "stories260K")), tmp_path / "run" / "adapter")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("Once upon a time", return_tensors="pt").input_ids
    torch.testing.assert_close(merged(ids).logits, tuned(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


class Untrained:
    """As a PeftModel without the adapter."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __call__(self, **inputs: Any) -> Any:
        return self.base(**inputs)

    def get_base_model(self) -> Any:
        return self.base

    def unload(self) -> Any:
        return self.base


def test_an_adapter_of_another_loss_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path, "llama", "float32")
    monkeypatch.setattr(outcome, "with_adapter", lambda base, _adapter: Untrained(base))
    with pytest.raises(CheckpointError, match="the adapter is not that of this base"):
        train(load_recipe(path, ["train.verify_adapter=true", "train.optimizer.lr=0.05"]), tmp_path / "run")


def test_training_works_where_an_event_loop_runs_already(tmp_path: Path) -> None:
    async def notebook() -> dict[str, Any]:
        return train(load_recipe(write_recipe(tmp_path, "llama", "float32")), tmp_path / "run")

    assert asyncio.run(notebook())["eval_loss_after"] > 0
