"""Servers that train all weights of their blocks compute what PEFT does with `modules_to_save`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitllm.recipe import Recipe, load_recipe
from splitllm.train import train
from tests.families import corpus, recipe, roles_of
from tests.test_exactness import adapter_of, check, compare, gradients, one_step, with_moved_b
from tests.tiny import write_recipe
from tests.unsplit import Unsplit

TREES: dict[str, tuple[list[int], list[str]]] = {
    "cloud": ([3], ["cloud"]),
    "edges": ([2, 4], ["edge"]),
    "edges and cloud": ([2, 4], ["edge", "cloud"]),
}


def in_full(family: str, tree: str, labels: str = "cloud", **changes: Any) -> Recipe:
    cuts, tiers = TREES[tree]
    train = {"full_tiers": tiers, **changes.pop("train", {})}
    whole = recipe(family, cuts, labels, **changes).model_dump()
    return Recipe.model_validate(whole | {"train": whole["train"] | train})


@pytest.mark.parametrize("labels", ["client", "cloud"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_loss_and_every_gradient_equal_the_unsplit_model(
    family: str, tree: str, labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(in_full(family, tree, labels), 1e-12, monkeypatch)


MODES: dict[str, dict[str, Any]] = {
    "several under way": {"train": {"in_flight": 2}},
    "recomputed": {"train": {"activation_checkpointing": True}},
    "clients together": {"server": {"batching": "synchronous"}},
    "dropout": {"lora": {"dropout": 0.3}},
    "DoRA": {"lora": {"dora": True, "rank": 4}},
}


@pytest.mark.parametrize("mode", MODES)
def test_so_they_do_in_every_mode(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, rows = in_full("gpt2", "edges and cloud", **MODES[mode]), corpus(2)
    roles = roles_of(wanted, rows)
    expected = Unsplit(wanted, rows, with_moved_b(roles)).gradients(0)
    check(gradients(roles, monkeypatch), expected, 1e-12)


@pytest.mark.parametrize("tree", TREES)
def test_steps_go_where_the_unsplit_models_go(tree: str) -> None:
    wanted, rows = in_full("gpt2", tree), corpus(2)
    roles = roles_of(wanted, rows)
    unsplit = Unsplit(wanted, rows, adapter_of(roles))
    for step in range(4):
        assert one_step(roles, step) == pytest.approx(unsplit.step(step), rel=1e-9)
    for name, tensor in adapter_of(roles).items():
        assert (unsplit.parameters[name] - tensor).abs().max() < 1e-9, name


def test_replicas_of_a_tier_stay_alike() -> None:
    roles = roles_of(in_full("gpt2", "edges"), corpus(2))
    for step in range(2):
        one_step(roles, step)
    first, second = (worker.trainable.parameters for worker in roles.workers["edge"].values())
    assert any(".lora_" not in name for name in first)
    assert all(first[name] is not second[name] and first[name].equal(second[name]) for name in first)


def test_a_state_is_all_that_a_run_goes_on_from() -> None:
    wanted, rows = in_full("gpt2", "edges and cloud"), corpus(2)
    whole, first, second = (roles_of(wanted, rows) for _ in range(3))
    for step in range(2):
        one_step(whole, step), one_step(first, step)
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    assert one_step(whole, 2) == one_step(second, 2)
    assert all(tensor.equal(adapter_of(second)[name]) for name, tensor in adapter_of(whole).items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_recipe(folder)
    return folder


def run(folder: Path, name: str, *words: str, resume: bool = False) -> Path:
    wanted = load_recipe(folder / "recipe.yaml", ["train.full_tiers=[edge, cloud]", "train.keep=9", *words])
    train(wanted, folder / name, resume=resume)
    return folder / name


def test_peft_loads_what_a_run_leaves(folder: Path) -> None:
    summary = json.loads((run(folder, "verified", "train.verify_adapter=true") / "summary.json").read_text())
    assert summary["unsplit_loss_after"] == pytest.approx(summary["eval_loss_after"], rel=1e-6)
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.01


def test_the_check_takes_the_adapter_off_again(folder: Path) -> None:
    """Beside a quantised tier it is made twice: on the base as it is, and on what the codes stand for."""
    words = ("train.full_tiers=[cloud]", "quantization={edge: nf4}", "train.verify_adapter=true")
    summary = json.loads((run(folder, "beside nf4", *words) / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.01
    for when in ("before", "after"):
        assert summary[f"unsplit_loss_{when}"] == pytest.approx(summary[f"eval_loss_{when}"], abs=1e-5)


def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(folder: Path) -> None:
    whole, parts = run(folder, "whole"), folder / "parts"
    shutil.copytree(whole, parts)
    for step in (3, 4):
        shutil.rmtree(parts / "checkpoints" / f"step-{step}")
    run(folder, "parts", resume=True)
    ours, theirs = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (parts, whole))
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_mixed_precision_learns_in_fp32_weights(folder: Path) -> None:
    summary = json.loads((run(folder, "mixed", "train.mixed_precision=bf16") / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.01
    adapter = load_file(folder / "mixed" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


@pytest.mark.parametrize("zero", ["{stage: 1}", "{stage: 2, offload_optimizer: cpu}"])
def test_a_spread_optimiser_steps_them_as_a_plain_one(folder: Path, zero: str) -> None:
    plain, spread = run(folder, f"beside {zero}"), run(folder, f"zero {zero}", f"server.zero={zero}")
    ours, theirs = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (spread, plain))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in ours) < 1e-5
