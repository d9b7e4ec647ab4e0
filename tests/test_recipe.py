"""The recipe: all errors at once, values that YAML twists, overrides, what leaves the device, the shipped recipes."""

from __future__ import annotations

import shlex
import string
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from splitllm.errors import RecipeError
from splitllm.recipe import (
    DataRecipe,
    ModelRecipe,
    Recipe,
    SplitRecipe,
    changed_keys,
    dump_recipe,
    load_recipe,
    what_leaves_in_a_deployment,
    what_leaves_the_device,
)

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALLEST = """\
model: {base: base}
split: {tiers: {client: 4, edge: 2, cloud: 1}, cuts: [2, 4], labels: client}
data: {source: rows.jsonl}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(SMALLEST)
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    problems = caught.value.problems
    assert problems
    assert all(problem and "\n" not in problem for problem in problems)
    return problems


def problem_of(path: Path, *overrides: str) -> str:
    problems = problems_of(path, *overrides)
    assert len(problems) == 1, problems
    return problems[0]


def test_defaults_are_the_documented_ones(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.split.cuts == (2, 4)
    assert list(recipe.split.tiers) == ["client", "edge", "cloud"]
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets, recipe.lora.tiers) == (8, 16, None, None)
    assert (recipe.train.optimizer.lr, recipe.train.optimizer.betas) == (2e-4, (0.9, 0.999))
    assert (recipe.train.steps, recipe.train.clip_norm, recipe.train.keep) == (200, 1.0, 2)
    assert (recipe.data.partition.by, recipe.data.max_length, recipe.data.eval_fraction) == ("iid", 512, 0.05)
    assert (recipe.wire.addresses, recipe.wire.certificates) == ({}, None)
    assert (recipe.wire.up, recipe.wire.down, recipe.wire.absent) == ("none", "none", "wait")


def test_a_recipe_is_frozen(file: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(file).train.steps = 3


WRONG = [
    ("seed=2026-99-99", "override 'seed=2026-99-99': the value is not valid YAML: month must be in 1..12"),
    ("train.stpes=3", "train.stpes: unknown key; did you mean train.steps?"),
    ("lr=3", "lr: unknown key; did you mean train.optimizer.lr?"),
    ("train.lr=3", "train.lr: unknown key; did you mean train.optimizer.lr?"),
    ("train.qqqqqq=3", "train.qqqqqq: unknown key; known here: steps, batch_size"),
    ("train.steps=many", "train.steps: 'many' is not allowed; use a whole number of at least 1"),
    ("train.steps=0", "train.steps: 0 is not allowed; use a whole number of at least 1"),
    ("train.steps=2.0", "train.steps: 2.0 is not allowed; use a whole number of at least 1"),
    ("train.steps=true", "train.steps: true is not allowed; use a whole number of at least 1"),
    ("train.steps=null", "train.steps: null is not allowed; use a whole number of at least 1"),
    ("seed=-1", "seed: -1 is not allowed; use a whole number from 0 to below 2**63"),
    ("train.clip_norm=0", "train.clip_norm: 0 is not allowed; use a number above 0, or null"),
    ("train.clip_norm=true", "train.clip_norm: true is not allowed; use a number above 0, or null"),
    ("train.clip_norm=.nan", "train.clip_norm: nan is not allowed; use a number above 0, or null"),
    ("train.optimizer.lr=fast", "train.optimizer.lr: 'fast' is not allowed; use a number above 0"),
    ("train.optimizer.lr=.inf", "train.optimizer.lr: inf is not allowed; use a number above 0"),
    ("train.optimizer.betas=[0.9]", "train.optimizer.betas: [0.9] is not allowed; use two numbers from 0 to below 1"),
    ("train.optimizer.name=adam", "train.optimizer.name: 'adam' is not allowed; use adamw or sgd"),
    ("train.schedule.name=step", "use constant or constant_with_warmup or linear or cosine"),
    ("train.schedule.warmup_steps=201", "train.schedule.warmup_steps: 201 is more than train.steps (200)"),
    ("train.schedule={name: constant, warmup_steps: 1}", "use constant_with_warmup, or warmup_steps: 0"),
    ("train.activation_checkpointing=1", "train.activation_checkpointing: 1 is not allowed; use true or false"),
    ("train.trackers=[wandb]", "train.trackers: ['wandb'] is not allowed; use a list, [] or [tensorboard]"),
    ("train.mixed_precision=fp16", "train.mixed_precision: 'fp16' is not allowed; use \"no\" or bf16, or null"),
    ("train=[1]", "train: [1] is not allowed; use a mapping with keys among steps"),
    ("model.dtype=float16", "model.dtype: 'float16' is not allowed; use float32 or bfloat16 or float64"),
    ("model.revision=12", "model.revision: 12 is not allowed; use text"),
    ("model.random=3", "model.random: 3 is not allowed; use a mapping of config keys"),
    ("split.labels=edge", "split.labels: 'edge' is not allowed; use client"),
    ("split.cuts=[4, 2]", "split.cuts: [4, 2] is not allowed; use block numbers from 1 that rise strictly"),
    ("split.cuts=[2, 2]", "rise strictly"),
    ("split.cuts=[-1, 2]", "split.cuts: [-1, 2] is not allowed"),
    ("split.cuts=[false, true]", "split.cuts: [False, True] is not allowed"),
    ("split.cuts=3", "split.cuts: 3 is not allowed"),
    ("split.cuts=[2]", "split.cuts: [2] has 1; 3 tiers (client, edge, cloud) need 2 cuts"),
    ("split.tiers={client: 2, edge: 3, cloud: 1}", "counts must not grow upwards"),
    ("split.tiers={client: 4, edge: 2, cloud: 2}", "the top tier (cloud) must be 1"),
    ("split.tiers={client: 4, edge: 0, cloud: 1}", "the count of edge must be a whole number of at least 1"),
    ("split.tiers.client=true", "the count of client must be a whole number of at least 1"),
    ("split.tiers={a: 1, b: 1, c: 1, d: 1, e: 1, f: 1}", "1 to 5 tiers"),
    ("split.tiers={}", "1 to 5 tiers"),
    ("split.tiers={../x: 4, edge: 2, cloud: 1}", "'../x' is no tier name"),
    ("split.client_cuts=4", "use a mapping of clients to block numbers, such as {client-1: 4}"),
    ("split.client_cuts={client-1: 0}", "use a block number of at least 1"),
    ("split.client_cuts={client-1: 4}", "4 leaves nothing to the tier above, which ends before block 4; use 1 to 3"),
    ("split.client_cuts={edge-0: 3}", "'edge-0' is not a client of split.tiers; use some of client-0, client-1"),
    ("lora.adapters=own", "use shared or per_client or common"),
    (
        "lora.clients={client-1: {rank: 4}}",
        "needs lora.adapters: per_client, not shared; use that",
    ),
    (
        "server.batching=continuous",
        "so that they cannot step one adapter of their blocks together; use lora.adapters: common",
    ),
    ("server.step_tenants=2", "server.step_tenants: 2 needs server.batching: continuous and lora.adapters: common"),
    ("lora.tiers=[edge, clod]", "lora.tiers: 'clod' is not a tier of split.tiers; use some of client, edge, cloud"),
    ("lora.tiers=edge", "lora.tiers: 'edge' is not allowed; use a list of tier names"),
    ("lora.tiers=[]", "lora.tiers: [] is not allowed; use a list of tier names, such as [edge, cloud], or null"),
    ("lora.targets=q_proj", "lora.targets: 'q_proj' is not allowed; use all-linear, or a list"),
    ("lora.dropout=1", "lora.dropout: 1 is not allowed; use a number from 0 to below 1"),
    ("data.source=builtin:books", "data.source: 'builtin:books' is not allowed"),
    ("data.source=[]", "data.source: [] is not allowed; use a path, a glob, a list of them"),
    ("data.source=''", "data.source: '' is not allowed"),
    ("data.eval_fraction=1", "data.eval_fraction: 1 is not allowed; use a number between 0 and 1"),
    ("data.max_length=1", "data.max_length: 1 is not allowed; use a whole number of tokens, at least 2"),
    ("data.pack=true", "data.pack: true needs data.format: text, not prompt_completion"),
    ("data.fields={answer: x}", "data.fields.answer: format prompt_completion has no such field; use prompt, comp"),
    ('data.fields={"a\\nb": x}', r"data.fields.a\nb: format prompt_completion has no such field"),
    ("data.fields={prompt: 3}", "data.fields: {'prompt': 3} is not allowed; use a mapping of names"),
    ("data.partition.by=field", "data.partition.field: missing; by: field needs a field of the rows"),
    ("data.partition={by: dirichlet, field: x}", "data.partition.alpha: missing; by: dirichlet needs a number above 0"),
    ("data.partition={by: iid, field: x}", "data.partition.field: by: iid does not use it; leave it out"),
    ("data.partition={by: dirichlet, field: x, alpha: 0}", "data.partition.alpha: 0 is not allowed; use a number abo"),
    ("data={source: hub:x, partition: {by: file}}", "data.partition.by: 'file' needs local files, not hub:x"),
    ("split.tiers={a: 2, a-0: 1}", "two roles would be called a-0; give one of the tiers another name"),
    ("data.partition={by: own, field: x}", "data.partition.field: by: own does not use it; leave it out"),
    ("server.memory_mib=0", "server.memory_mib: 0 is not allowed; use a whole number of at least 1, or null"),
    ("server.quota.tokens_per_second=0", "server.quota.tokens_per_second: 0 is not allowed; use a number above 0, or"),
    (
        "server.quota.byte_per_second=3",
        "server.quota.byte_per_second: unknown key; did you mean server.quota.bytes_per_second?",
    ),
    (
        "server.tenants=3",
        "server.tenants: 3 is not allowed; use a mapping of names, each with a mapping with keys among",
    ),
    (
        "server.tenants={client-0: 3}",
        "server.tenants.client-0: 3 is not allowed; use a mapping with keys among tokens_",
    ),
    ("server.tenants.client-0.weights=3", "server.tenants.client-0.weights: unknown key; did you mean server."),
    ("server.tenants.client-0.weight=0", "server.tenants.client-0.weight: 0 is not allowed; use a number above 0"),
    ("server.tenants.client-0.bytes_per_second=-1", "-1 is not allowed; use a number above 0, or null"),
    ("server.tenants.client-4.weight=2", "server.tenants.client-4: 'client-4' is not a client of split.tiers; use so"),
    ("server.tenants.edge-0.weight=2", "server.tenants.edge-0: 'edge-0' is not a client of split.tiers; use some of"),
    (
        "quantization=fp4",
        "quantization: 'fp4' is not allowed; use nf4 or int8 for all tiers, a mapping of tiers, such",
    ),
    (
        "quantization=null",
        "quantization: null is not allowed; use nf4 or int8 for all tiers, a mapping of tiers, such as {edge: nf4}, "
        "or {} for none",
    ),
    ("quantization=4", "quantization: 4 is not allowed; use nf4 or int8 for all tiers, a mapping of tiers, such"),
    ("quantization={edgy: nf4}", "quantization.edgy: 'edgy' is not a tier of split.tiers; use some of client, edge, c"),
    (
        "quantization.edge=fp4",
        "quantization.edge: 'fp4' is not allowed; use nf4 or int8, or a mapping such as {method:",
    ),
    (
        "quantization.edge=4",
        "quantization.edge: 4 is not allowed; use nf4 or int8, or a mapping such as {method: nf4, double: true}",
    ),
    ("quantization.edge={method: fp4}", "quantization.edge.method: 'fp4' is not allowed; use nf4 or int8"),
    (
        "quantization.edge={method: nf4, doubles: true}",
        "quantization.edge.doubles: unknown key; did you mean quantizati",
    ),
    ("quantization.edge={method: int8, double: true}", "quantization.edge.double: true is for nf4, not int8; leave it"),
    (
        "quantization.edge={method: nf4, compute_dtype: float16}",
        "quantization.edge.compute_dtype: 'float16' is not allowed; use float32 or bfloat16, or null",
    ),
    ("wire.addresses=null", "wire.addresses: null is not allowed; use a mapping of server roles to HOST:PORT"),
    ("wire.addresses={cloud: null}", "wire.addresses.cloud: null is not allowed; use HOST:PORT, such as 10.0.0.2:7000"),
    ("wire.addresses.cloud=7000", "wire.addresses.cloud: 7000 is not allowed; use HOST:PORT"),
    ("wire.addresses.edge=h:1", "'edge' is not a server of split.tiers; use some of edge-0, edge-1, cloud"),
    ("wire.addresses.edge-2=h:1", "wire.addresses: 'edge-2' is not a server of split.tiers; use some of"),
    ("wire.addresses.client-0=h:1", "wire.addresses: 'client-0' is not a server of split.tiers; use some of"),
    ("wire.addresses={edge-0: h:1, cloud: H:1}", "wire.addresses: edge-0 and cloud are both at H:1; give each its own"),
    ("wire.certificates=3", "wire.certificates: 3 is not allowed; use text"),
    ("wire.up=null", "wire.up: null is not allowed; use none, bf16, fp16, int8, int4 or topk:FRACTION with a fraction"),
    ("wire.down=int2", "wire.down: 'int2' is not allowed; use none, bf16, fp16, int8, int4 or topk:FRACTION"),
    ("wire.up=topk", "wire.up: 'topk' is not allowed"),
    ("wire.up=topk:1.0", "wire.up: 'topk:1.0' is not allowed"),
    ("wire.up=topk:0.0", "wire.up: 'topk:0.0' is not allowed"),
    ("wire.up=topk:1e-3", "wire.up: 'topk:1e-3' is not allowed"),
    ("wire.up=topk:0.0000001", "wire.up: 'topk:0.0000001' is not allowed"),
    ("wire.up={topk: 0.05}", "wire.up: {'topk': 0.05} is not allowed"),
    ("wire.feedback_mib=-1", "wire.feedback_mib: -1 is not allowed; use a whole number of at least 0"),
    ("wire.memory_mib=0", "wire.memory_mib: 0 is not allowed; use a whole number of at least 1"),
    ("wire.absent=leave", "wire.absent: 'leave' is not allowed; use wait or drop"),
    ("wire.drop_after=0", "wire.drop_after: 0 is not allowed; use a number above 0"),
    ("wire.keepalive=.inf", "wire.keepalive: inf is not allowed; use a number above 0"),
    ("train.steps", "override 'train.steps': write it as key.path=value"),
    ("=3", "override '=3': write it as key.path=value"),
    ("train..steps=3", "override 'train..steps=3': write it as key.path=value"),
    ("train.steps=", "override 'train.steps=': no value; write train.steps=VALUE"),
    ("train.steps=[3", "override 'train.steps=[3': the value is not valid YAML"),
    ("train.steps={a: 1, a: 2}", "key a is given twice"),
    ("split.cuts.0=3", "override 'split.cuts.0=3': split.cuts is [2, 4], which has no keys below it"),
]


@pytest.mark.parametrize(("override", "expected"), WRONG, ids=[override for override, _ in WRONG])
def test_a_wrong_value_gives_one_line_with_key_value_and_remedy(file: Path, override: str, expected: str) -> None:
    assert expected in problem_of(file, override)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "model: {dtype: int3}\n"
        "split: {tiers: {client: 2, cloud: 1}, cuts: [1, 2], labels: client}\n"
        "data: {source: x, pack: true, partition: {by: dirichlet}}\n"
        "train: {steps: 5, steps: 6, schedule: {warmup_steps: 9}, stesp: 1}\n"
        "lora: {tiers: [cluod]}\n"
    )
    problems = problems_of(path, "a", "seed=-1")
    starts = [problem.split(": ")[0] for problem in problems]
    assert starts == [
        f"{path}:4",
        "override 'a'",
        "seed",
        "model.base",
        "model.dtype",
        "train.stesp",
        "split.cuts",
        "lora.tiers",
        "data.pack",
        "data.partition.field",
        "data.partition.alpha",
        "train.schedule.warmup_steps",
    ]


def test_a_key_that_is_wrong_by_itself_is_not_blamed_again(file: Path) -> None:
    assert problem_of(file, "train.steps=-1", "train.schedule.warmup_steps=5").startswith("train.steps: -1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {base: [}\n", ":1: not valid YAML:"),
        ("seed: 0\nmodel:\n\tbase: x\n", ":3: not valid YAML:"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML:"),
        ("x: !!python/name:os.system ''\n", ":1: not valid YAML:"),
        ("x: \x01\n", ": not valid YAML:"),
        ("", ": the recipe is empty"),
        ("- a\n- b\n", ": the recipe is ['a', 'b']; it must be a mapping"),
        (SMALLEST + "seed: 1\nseed: 2\n", ":5: key seed is given twice (first on line 4); keep one"),
        (SMALLEST + "train:\n  on: 1\n", ":5: key on: YAML does not read this key as text; put it in quotes"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    problem = problem_of(path)
    assert problem.startswith(str(path))
    assert expected in problem


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert problem_of(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such recipe file; check the path"
    assert "cannot read the recipe: Is a directory" in problem_of(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: {base: café}".encode("latin-1"))
    assert "is not UTF-8" in problem_of(tmp_path / "latin.yaml")


def test_a_value_that_contains_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(SMALLEST.replace("{base: base}", "{base: base, random: &a {x: *a}}"))
    assert problem_of(path).startswith("model.random: {'x': {...}} is not allowed")


def test_yaml_traps(file: Path) -> None:
    recipe = load_recipe(
        file,
        ["train.optimizer.lr=2e-4", "train.mixed_precision=no", "model.random={layer_norm_epsilon: 1e-5, l: [1E3]}"],
    )
    assert recipe.train.optimizer.lr == 2e-4
    assert recipe.train.mixed_precision == "no"
    assert recipe.model.random == {"layer_norm_epsilon": 1e-5, "l": [1000.0]}


def test_an_empty_section_means_its_defaults(tmp_path: Path, file: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(SMALLEST + "lora:\ntrain:\n  optimizer:\n")
    assert load_recipe(other) == load_recipe(file)
    other.write_text("model:\nsplit:\ndata:\ntrain:\n  x: 1\n")
    starts = [problem.split(": ")[0] for problem in problems_of(other)]
    assert starts == ["model.base", "split.tiers", "split.labels", "data.source", "train.x"]


def test_overrides_apply_in_order_and_open_sections(file: Path) -> None:
    recipe = load_recipe(file, ["train.steps=3", "train.optimizer.weight_decay=0.5", "train.steps=4", "lora.rank=2"])
    assert (recipe.train.steps, recipe.train.optimizer.weight_decay, recipe.lora.rank) == (4, 0.5, 2)
    assert load_recipe(file, ["split.tiers.client=8"]).split.tiers == {"client": 8, "edge": 2, "cloud": 1}
    assert load_recipe(file, ["data.source=a=b.jsonl"]).data.source == "a=b.jsonl"


def test_a_recipe_built_in_python_is_checked_too() -> None:
    split = SplitRecipe(tiers={"client": 2, "cloud": 1}, labels="client")
    with pytest.raises(ValidationError, match=r"2 tiers \(client, cloud\) need 1 cut\b"):
        Recipe(model=ModelRecipe(base="b"), split=split, data=DataRecipe(source="x"))


def test_changed_keys_name_key_and_both_values(file: Path) -> None:
    old = load_recipe(file)
    new = load_recipe(
        file, ["train.steps=100", "lora.targets=[q_proj]", "split.tiers.client=3", "train.clip_norm=null"]
    )
    assert changed_keys(old, old) == []
    assert changed_keys(old, new) == [
        'split.tiers: {"client": 4, "edge": 2, "cloud": 1} -> {"client": 3, "edge": 2, "cloud": 1}',
        'lora.targets: null -> ["q_proj"]',
        "train.steps: 200 -> 100",
        "train.clip_norm: 1.0 -> null",
    ]
    one_way = load_recipe(file, ["split.tiers={a: 1, b: 1, c: 1}"])
    other_way = load_recipe(file, ["split.tiers={b: 1, a: 1, c: 1}"])
    assert len(changed_keys(one_way, other_way)) == 1


TOGETHER = [
    (["lora.adapters=common", "lora.dora=true"], "lora.adapters: common cannot be had with lora.dora"),
    (["split={tiers: {client: 2}, labels: client}", "lora.adapters=per_client"], "needs a server that several clients"),
    (["lora.adapters=per_client", "train.processes=2"], "train.processes: 2 with lora.adapters: per_client is not"),
    (["lora.adapters=per_client", "wire.absent=drop"], "wire.absent: 'drop' needs lora.adapters: shared"),
    (["split.client_cuts={client-1: 3}", "wire.absent=drop"], "and no split.client_cuts"),
    (["split.client_cuts={client-1: 3}", "lora.tiers=[edge]"], "lora.tiers: with split.client_cuts a block may be on"),
    (["split={tiers: {client: 2}, labels: client}", "split.client_cuts={client-1: 3}"], "with one tier nothing is cut"),
    (["lora.adapters=per_client", "lora.clients={client-9: {}}"], "'client-9' is not a client of split.tiers"),
    (
        ["lora.adapters=per_client", "lora.start_from=a", "lora.clients={client-1: {rank: 4}}"],
        "lora.clients.client-1.rank: 4 is not that of lora.start_from (8)",
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), TOGETHER, ids=[" ".join(each) for each, _ in TOGETHER])
def test_what_tenants_cannot_have_together_is_refused_in_a_line(
    file: Path, overrides: list[str], expected: str
) -> None:
    (problem,) = problems_of(file, *overrides)
    assert expected in problem


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["quantization=nf4", "model.dtype=float64"],
            "quantization: bitsandbytes has no products in float64, which are asked for on client, edge, cloud; "
            "use model.dtype: float32 or bfloat16, or quantization: {}",
        ),
        (
            ["quantization={edge: nf4}", "lora.dora=true"],
            "quantization.edge: lora.dora takes the norms of frozen weights, which are others once these are quantised",
        ),
        (
            ["quantization={edge: nf4}", "split.client_cuts={client-1: 3}"],
            "quantization: has to be on client as on edge, since with split.client_cuts both hold some of the same",
        ),
    ],
)
def test_what_does_not_go_with_quantised_weights_is_refused(file: Path, overrides: list[str], expected: str) -> None:
    assert expected in problem_of(file, *overrides)


def test_dora_on_tiers_that_are_not_quantised_is_allowed(file: Path) -> None:
    assert load_recipe(file, ["quantization={cloud: nf4}", "lora.dora=true", "lora.tiers=[client, edge]"]).lora.dora


def test_a_method_alone_is_short_for_itself_and_for_every_tier(file: Path) -> None:
    whole = load_recipe(file, ["quantization=nf4"]).quantization
    assert list(whole) == ["client", "edge", "cloud"]
    assert {(how.method, how.double, how.compute_dtype) for how in whole.values()} == {("nf4", False, None)}
    assert load_recipe(file, ["quantization={edge: null}"]) == load_recipe(file, ["quantization.edge=nf4"])
    assert load_recipe(file, ["quantization={edge: int8}"]) == load_recipe(file, ["quantization.edge.method=int8"])
    assert "quantization: 'nf4'" not in "".join(problems_of(file, "quantization=nf4", "split.tiers=3"))


def test_what_leaves_the_device_where_clients_have_their_own(file: Path) -> None:
    recipe = load_recipe(file, ["lora.adapters=per_client", "split.client_cuts={client-1: 3}"])
    assert "activations at the cut (block 2 or 3)" in what_leaves_the_device(recipe)
    assert "the norms of its adapter's gradients" in what_leaves_the_device(recipe)
    assert "an adapter of each client for the whole model comes out" in what_leaves_in_a_deployment(recipe)


def test_what_leaves_the_device(file: Path) -> None:
    def said(*overrides: str) -> str:
        line = what_leaves_the_device(load_recipe(file, overrides))
        assert "\n" not in line
        return line

    one = ("split.tiers={client: 1}", "split.cuts=[]")
    assert said(*one) == "nothing leaves the device: the whole model is trained in place"
    assert "only adapter gradients leave each client" in said("split.tiers={client: 2}", "split.cuts=[]")
    stays = said()
    assert "activations at the cut (block 2)" in stays
    assert "lengths and labelled positions of rows leave the client" in stays
    assert "gradients of its adapter" in stays
    assert "loss gradients" in stays
    assert "token ids stay" in stays
    leaves = said("split.labels=cloud", "lora.tiers=[edge]")
    assert "target token ids, which are text" in leaves
    assert "adapter" not in leaves
    assert "stay" not in leaves


def test_what_leaves_in_a_deployment_is_the_same_and_what_the_top_collects(file: Path) -> None:
    def said(*overrides: str) -> str:
        recipe = load_recipe(file, overrides)
        line = what_leaves_in_a_deployment(recipe)
        assert line.startswith(what_leaves_the_device(recipe)) and "\n" not in line
        return line.removeprefix(what_leaves_the_device(recipe))

    collected = "; the loss and the number of labels of each step and evaluation go up as well"
    adapter = ", and at the end so does the adapter of the client: one adapter for the whole model comes out at the top"
    assert said() == collected + adapter
    assert said("split.labels=cloud") == collected + adapter
    assert said("lora.tiers=[edge]") == collected
    assert said("split.tiers={client: 2}", "split.cuts=[]") == ""


def test_wrong_addresses_are_reported_beside_wrong_roles_and_codecs(file: Path) -> None:
    overrides = ("wire.addresses={cloud: x, edge-0: 'y:0', nobody: h:1}", "wire.up=q", "wire.absent=1")
    starts = [problem.split(": ")[0] for problem in problems_of(file, *overrides)]
    assert starts == ["wire.addresses.cloud", "wire.addresses.edge-0", "wire.up", "wire.absent", "wire.addresses"]


def test_one_tier_has_no_server_with_memory(file: Path) -> None:
    problem = problem_of(file, "split.tiers={client: 2}", "split.cuts=[]", "server.memory_mib=9")
    assert problem == "server.memory_mib: 9 is of a server, and with one tier there is none; use null"


def test_one_tier_has_no_server_to_address(file: Path) -> None:
    problem = problem_of(file, "split.tiers={client: 2}", "split.cuts=[]", "wire.addresses.client-0=h:1")
    assert problem == "wire.addresses: 'client-0' is not a server of split.tiers; split.tiers has none; leave it out"


@pytest.mark.parametrize(
    ("tiers", "good"), [("{a: 2, a-1: 1}", False), ("{a: 2, a-2: 1}", True), ("{a-0: 1, a: 1}", True)]
)
def test_tiers_whose_roles_would_share_a_name_are_refused(file: Path, tiers: str, good: bool) -> None:
    overrides = (f"split.tiers={tiers}", "split.cuts=[1]")
    if good:
        assert load_recipe(file, overrides).split.cuts == (1,)
    else:
        assert "two roles would be called a-1" in problem_of(file, *overrides)


def test_names_of_very_many_roles_are_checked_without_making_them(file: Path) -> None:
    many = ("split.tiers={c: 1000000000000, c-x-99: 1}", "split.cuts=[1]")
    assert load_recipe(file, many).split.tiers["c"] == 10**12
    assert "called c-99" in problem_of(file, many[0].replace("x-", ""), many[1])


def as_yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
numbers = st.floats(1e-300, 1e300)
counts = st.integers(1, 10**12)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**63 - 1),
    "model.base": texts,
    "model.revision": st.none() | texts,
    "model.dtype": st.sampled_from(["float32", "bfloat16", "float64"]),
    "model.random": st.none() | st.dictionaries(texts, st.booleans() | counts | numbers | st.none(), max_size=3),
    "split.labels": st.sampled_from(["client", "cloud"]),
    "split.cuts": st.lists(st.integers(0, 100), min_size=2, max_size=2, unique=True).map(sorted),
    "lora.rank": counts,
    "lora.dropout": st.floats(0, 1, exclude_max=True),
    "lora.targets": st.none() | st.just("all-linear") | st.lists(texts, min_size=1, max_size=3),
    "lora.dora": st.booleans(),
    "data.eval": st.none() | texts.map("x".__add__) | st.lists(texts.map("x".__add__), min_size=1, max_size=3),
    "data.fields": st.dictionaries(st.sampled_from(["prompt", "completion"]), texts),
    "data.partition.by": st.sampled_from(["iid", "file", "own"]),
    "train.optimizer.lr": numbers,
    "train.optimizer.betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
    "train.clip_norm": st.none() | numbers,
    "train.mixed_precision": st.sampled_from([None, "no", "bf16"]),
    "train.trackers": st.sampled_from([[], ["tensorboard"]]),
    "wire.addresses": st.dictionaries(
        st.sampled_from(["edge-0", "edge-1", "cloud"]), st.integers(1, 65535).map("[::1]:{}".format)
    ).filter(lambda addresses: len(set(addresses.values())) == len(addresses)),
    "wire.up": st.sampled_from(["none", "bf16", "fp16", "int8", "int4", "topk:0.05", "topk:0.000001"]),
    "wire.drop_after": numbers,
}


@given(st.fixed_dictionaries({}, optional=GOOD))
@example({"data.fields": {"prompt": "\x85", "completion": "\u2028a \u4e2d"}})
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_recipe_survives_dump_and_load(file: Path, values: dict[str, Any]) -> None:
    recipe = load_recipe(file, [f"{key}={as_yaml(value)}" for key, value in values.items()])
    for key, value in values.items():
        found: Any = recipe
        for part in key.split("."):
            found = getattr(found, part)
        assert (list(found) if isinstance(found, tuple) else found) == value
    copy = file.with_name("copy.yaml")
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe
    assert list(load_recipe(copy).split.tiers) == list(recipe.split.tiers)


PLANTED = [
    *("train.steps=-1", "lora.rank=x", "data.pack=true", "model.dtype=q", "lora.tiers=[nobody]", "train.keep=0"),
    *("data.partition.by=field", "split.cuts=[1]", "train.schedule.warmup_steps=999999", "bogus", "train.zzz=1"),
    "seed=1.5",
]


@given(st.sets(st.sampled_from(PLANTED), min_size=1))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_k_planted_errors_give_at_least_k_lines(file: Path, planted: set[str]) -> None:
    hidden = {"train.steps=-1", "train.schedule.warmup_steps=999999"} <= planted  # these two speak of one another
    assert len(problems_of(file, *sorted(planted))) >= len(planted) - hidden


@given(st.text(string.printable, max_size=30))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_override_is_taken_or_explained(file: Path, override: str) -> None:
    with suppress(RecipeError):
        load_recipe(file, [override])
        return
    assert all(problem.isprintable() for problem in problems_of(file, override))


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "gpt2-e2e", "e2e-shared", "gemma-2b-chat"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_loads_and_begins_with_its_command(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    words = shlex.split(first[2:])
    if words[:2] == ["accelerate", "launch"]:
        words = words[words.index("-m") + 1 :]
    assert words[0] == "splitllm"
    assert words[1] in ("train", "up")
    assert words[2] == f"recipes/{path.name}"
    assert words[words.index("--output-dir") + 1] == f"out/{path.stem}"
    recipe = load_recipe(path, [word for word in words[3:] if "=" in word])
    assert "labels" in yaml.safe_load(path.read_text(encoding="utf-8"))["split"]
    if recipe.data.format == "chat":
        assert recipe.split.labels == "client"


def test_the_recipe_loads_no_torch() -> None:
    code = "import sys, splitllm.recipe; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
