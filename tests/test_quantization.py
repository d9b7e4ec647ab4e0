"""Runs on quantised bases: gradients of what the codes stand for, wherever the model is cut and whoever shares it."""

from __future__ import annotations

import asyncio
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitllm.errors import RecipeError
from splitllm.model.export import merge
from splitllm.recipe import Recipe, load_recipe
from splitllm.roles.assembly import Roles
from splitllm.train import train
from tests.families import CONFIGS, LAYERS, corpus, recipe, roles_of
from tests.grids import cases, in_turn
from tests.quantized import METHODS, dequantized_folder
from tests.test_exactness import adapter_of, check, gradients, one_step, with_moved_b
from tests.test_train import Crash, crash_at
from tests.tiny import write_recipe
from tests.unsplit import Unsplit

EXACT = 2e-5
"""Of fp32 against fp64, relative to the largest value."""
SGD = {"optimizer": {"name": "sgd", "lr": 0.5}, "clip_norm": None, "steps": 4}


def on(wanted: Recipe, **tiers: str) -> Recipe:
    """The recipe with quantised tiers."""
    section = {tier: METHODS[method] for tier, method in tiers.items()}
    return Recipe.model_validate({**wanted.model_dump(mode="json"), "quantization": section})


def dequantized(wanted: Recipe, family: str, methods: list[str | None]) -> Recipe:
    """The same run, plain and in fp64, on the numbers that the codes stand for."""
    raw = wanted.model_dump(mode="json")
    model = {**raw["model"], "base": str(dequantized_folder(family, tuple(methods))), "dtype": "float64"}
    return Recipe.model_validate({**raw, "model": model, "quantization": {}})


CASES: list[Any] = [
    ("gpt2", [], {"client": "nf4"}),
    ("gpt2", [2, 4], {"client": "int8", "edge": "nf4 double", "cloud": "nf4"}),
    ("llama", [2, 4], {"client": "nf4", "edge": "nf4 double", "cloud": "int8"}),
    ("llama", [3], {"cloud": "nf4"}),
    ("gemma2", [2, 4], {"edge": "int8"}),
    ("gemma3", [1, 5], {"client": "int8", "edge": "nf4"}),
]


OTHERS = [family for family in CONFIGS if family not in {case[0] for case in CASES}]
CASES += [pytest.param(family, [2, 4], {"edge": "nf4", "cloud": "int8"}, marks=pytest.mark.system) for family in OTHERS]


@pytest.mark.parametrize(("family", "cuts", "tiers"), CASES)
def test_gradients_are_those_of_the_dequantised_base_in_high_precision(
    family: str, cuts: list[int], tiers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, rows = on(recipe(family, cuts, dtype="float32"), **tiers), corpus(2)
    roles = roles_of(wanted, rows)
    started = with_moved_b(roles)
    bounds = [0, *cuts, LAYERS]
    methods: list[str | None] = [None] * LAYERS
    for place, tier in enumerate(wanted.split.tiers):
        for block in range(bounds[place], bounds[place + 1]):
            methods[block] = tiers.get(tier)
    exact = Unsplit(dequantized(wanted, family, methods), rows, {name: t.double() for name, t in started.items()})
    check(gradients(roles, monkeypatch), exact.gradients(0), EXACT)


PLACES = [("gpt2", "client"), ("llama", "cloud"), ("gpt2", "cloud"), ("llama", "client")]


@pytest.mark.parametrize(
    ("method", "family", "labels"),
    cases(
        [(method, *place) for method in METHODS for place in PLACES],
        lambda method, *place: place in PLACES[:2],
    ),
)
def test_a_split_quantised_run_is_the_unsplit_quantised_one(method: str, family: str, labels: str) -> None:
    found = []
    for cuts in ([], [2, 4]):
        wanted = recipe(family, cuts, labels, dtype="float32", train=SGD)
        roles = roles_of(on(wanted, **dict.fromkeys(wanted.split.tiers, method)), corpus(2))
        start = with_moved_b(roles)
        losses = [one_step(roles, step) for step in range(3)]
        found.append((losses, {name: t - start[name] for name, t in adapter_of(roles).items()}))
    (losses, moved), (split_losses, split_moved) = found
    assert split_losses == pytest.approx(losses, rel=1e-6)
    check((split_losses[0], split_moved), (losses[0], moved), EXACT)


@pytest.mark.parametrize("adapters", ["shared", "per_client"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tenants_of_other_cuts_in_one_batch_train_as_on_the_dequantised_base(family: str, adapters: str) -> None:
    changes = {
        "split": {"tiers": {"client": 3, "edge": 1, "cloud": 1}, "client_cuts": {"client-1": 3}},
        "lora": {"adapters": adapters, "dropout": 0.2},
        "server": {"batching": "synchronous"},
        "train": {**SGD, "accumulate": 1, "schedule": {"name": "constant", "warmup_steps": 0}},
    }
    wanted = recipe(family, [2, 4], "client", dtype="float32", **changes)
    quantised = on(wanted, client="nf4", edge="nf4", cloud="int8")
    plain = dequantized(quantised, family, ["nf4"] * 4 + ["int8"] * 2)
    found = []
    for each in (quantised, plain):
        roles = roles_of(each, corpus(3))
        start = with_every_b_moved(roles)
        losses = [one_step(roles, step) for step in range(2)]
        found.append((losses, {name: t.double() - start[name].double() for name, t in roles.adapter().items()}))
    (losses, moved), (known_losses, known) = found
    assert losses == pytest.approx(known_losses, rel=1e-5)
    assert any(name.startswith("tenant/") for name in known) == (adapters == "per_client")
    check((losses[0], moved), (known_losses[0], known), 5 * EXACT)  # after two steps


def with_every_b_moved(roles: Roles) -> dict[str, torch.Tensor]:
    """Also those of tenants; returns the adapters, whose memory training does not touch."""
    state = roles.state()
    for number, (name, tensor) in enumerate(sorted(state.items())):
        if ".lora_B." in name and "adapter/" in name:
            generator = torch.Generator().manual_seed(number)
            state[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.2
    roles.load(state)
    return {name: tensor.clone() for name, tensor in roles.adapter().items()}


def test_rounds_that_freeze_beside_the_weights_work_on_quantised_ones() -> None:
    changes = {"rounds": {"replicas": "local", "edge_every": 1, "cloud_every": 2, "rule": "fedex"}, "train": SGD}
    wanted = on(recipe("llama", [2, 4], "client", dtype="float32", **changes), client="nf4", edge="nf4", cloud="int8")
    plain = dequantized(wanted, "llama", ["nf4"] * 4 + ["int8"] * 2)
    adapters = []
    for each in (wanted, plain):
        roles = roles_of(each, corpus(2))
        for step in range(4):
            one_step(roles, step)
        adapters.append(roles.adapter())
    found, known = adapters
    modules = [name.removesuffix(".lora_A.weight") for name in known if name.endswith(".lora_A.weight")]
    assert any(name.startswith("frozen/") for name in modules) and set(found) == set(known)
    for name in modules:
        # what is frozen is the small difference of products
        product, known_product = (each[f"{name}.lora_B.weight"] @ each[f"{name}.lora_A.weight"] for each in adapters)
        assert float((product - known_product).abs().max()) <= 2e-3 * float(known_product.abs().max()), name


WAYS: dict[str, dict[str, Any]] = {
    "checkpointing": {"train": {"activation_checkpointing": True}},
    "in flight": {"train": {"in_flight": 2}},
    "common": {"lora": {"adapters": "common"}, "server": {"batching": "synchronous"}},
}


@pytest.mark.parametrize(
    ("method", "way"),
    cases(product(METHODS, WAYS), lambda method, way: in_turn([*METHODS].index(method), [*WAYS].index(way))),
)
def test_however_it_is_run_it_learns_as_on_the_dequantised_base(method: str, way: str) -> None:
    train_section = {**SGD, "schedule": {"name": "constant", "warmup_steps": 0}, **WAYS[way].get("train", {})}
    wanted = recipe("llama", [2, 4], "client", dtype="float32", **{**WAYS[way], "train": train_section})
    quantised = on(wanted, edge=method, cloud=method)
    found = []
    for each in (quantised, dequantized(quantised, "llama", [None] * 2 + [method] * 4)):
        roles = roles_of(each, corpus(2))
        start = with_every_b_moved(roles)
        losses = [one_step(roles, step) for step in range(2)]
        found.append((losses[0], {name: t.double() - start[name].double() for name, t in roles.adapter().items()}))
    check(found[0], found[1], 5 * EXACT)


@pytest.mark.parametrize(("dtype", "compute"), [("bfloat16", None), ("float32", "bfloat16")])
def test_half_precision_is_near_the_dequantised_base(
    dtype: str, compute: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"edge": {"method": "nf4", "compute_dtype": compute}}
    wanted = recipe("llama", [2, 4], dtype=dtype, quantization=section)
    roles = roles_of(wanted, corpus(2))
    started = with_moved_b(roles)
    rounded = dequantized(wanted, "llama", [None, None, "nf4", "nf4", None, None])
    exact = Unsplit(rounded, corpus(2), {name: t.double() for name, t in started.items()})
    check(gradients(roles, monkeypatch), exact.gradients(0), 0.1)


def evaluated(roles: Roles) -> float:
    async def together() -> float:
        reports = [await client.evaluate() for client in roles.clients]
        return sum(r.loss for r in reports) / sum(r.labels for r in reports)

    return asyncio.run(together())


@pytest.mark.parametrize(
    ("method", "family"),
    cases(product(METHODS, ["gpt2", "llama"]), lambda method, family: (method == "nf4 double") == (family == "gpt2")),
)
def test_training_goes_on_after_an_evaluation_as_without_one(method: str, family: str) -> None:
    """bitsandbytes' own layers repack their weights in an evaluation, on some CPUs, and give no gradient afterwards."""
    adapters, losses, held_out = [], [], []
    for looks in (False, True):
        wanted = recipe(family, [2, 4], "client", dtype="float32", train={"steps": 12, "schedule": {"warmup_steps": 0}})
        roles = roles_of(on(wanted, **dict.fromkeys(wanted.split.tiers, method)), corpus(2))
        series = []
        for step in range(12):
            if looks and step % 4 == 0:
                held_out.append(evaluated(roles))
            series.append(one_step(roles, step))
        losses.append(series)
        adapters.append({name: tensor.clone() for name, tensor in roles.adapter().items()})
    assert losses[0] == losses[1]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    parts = [sum(losses[1][start : start + 4]) for start in (0, 4, 8)]
    assert parts[0] > parts[1] > parts[2], "the loss falls after every evaluation"
    assert len(set(held_out)) == 3


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    write_recipe(place, request.param)
    return place


def quantized_recipe(folder: Path, *words: str) -> Recipe:
    section = "quantization={client: int8, edge: {method: nf4, double: true}, cloud: nf4}"
    return load_recipe(folder / "recipe.yaml", ["data.eval_fraction=0.2", section, *words])


def test_the_adapter_is_checked_on_the_rounded_base_and_told_on_the_plain_one(folder: Path, tmp_path: Path) -> None:
    summary = train(quantized_recipe(folder, "train.verify_adapter=true"), tmp_path / "run")
    for when in ("before", "after"):
        assert summary[f"unsplit_loss_{when}"] == pytest.approx(summary[f"eval_loss_{when}"], abs=1e-5)
        assert summary[f"unquantized_loss_{when}"] == pytest.approx(summary[f"eval_loss_{when}"], abs=0.1)
        assert summary[f"unquantized_loss_{when}"] != pytest.approx(summary[f"eval_loss_{when}"], abs=1e-5)


def test_the_exported_adapter_is_like_that_of_a_plain_base(folder: Path, tmp_path: Path) -> None:
    train(quantized_recipe(folder), tmp_path / "quantised")
    train(quantized_recipe(folder, "quantization={}"), tmp_path / "plain")
    places = [tmp_path / run / "adapter" for run in ("quantised", "plain")]
    configs = [json.loads((place / "adapter_config.json").read_text()) for place in places]
    assert configs[0] == configs[1]
    tensors = [load_file(place / "adapter_model.safetensors") for place in places]
    assert [{name: (t.shape, t.dtype) for name, t in each.items()} for each in tensors][:1] == [
        {name: (t.shape, t.dtype) for name, t in tensors[1].items()}
    ]
    merge(places[0], str(folder / "base"), tmp_path / "merged")


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(quantized_recipe(folder, "train.eval_every=2"), whole)
    with monkeypatch.context() as patched:
        crash_at(patched, "train", 3)
        with pytest.raises(Crash):
            train(quantized_recipe(folder, "train.eval_every=2"), stopped)
    train(quantized_recipe(folder, "train.eval_every=2"), stopped, resume=True)
    adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, stopped)]
    assert adapters[0] == adapters[1]
    for file in stopped.rglob("*.safetensors"):
        names = load_file(file)
        assert not any(tensor.dtype in (torch.uint8, torch.int8) for tensor in names.values()), file
        assert not any(".weight" in name and "lora_" not in name for name in names), "no weight of the base is kept"
    with pytest.raises(RecipeError, match=r"--resume: the recipe is not that of .*quantization"):
        train(quantized_recipe(folder, "quantization={}"), stopped, resume=True)
