"""What can be wrong with a run: every complaint through the command line, all of them at once, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import is_flash_attn_2_available
from typer.testing import CliRunner

from splitllm import plan, preflight
from splitllm.cli import app
from splitllm.errors import RecipeError
from splitllm.preflight import prepare
from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.tiny import save_base, save_tokenizer, write_recipe

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_recipe(folder)
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def complaints(folder: Path, tmp_path: Path, *overrides: str) -> list[str]:
    """What `train` says, after checking that it refused cleanly and that `validate` says the same."""
    before = sorted(tmp_path.rglob("*"))
    recipe = str(folder / "recipe.yaml")
    trained = CliRunner().invoke(app, ["train", recipe, *overrides, "--output-dir", str(tmp_path / "out" / "run")])
    validated = CliRunner().invoke(app, ["validate", recipe, *overrides])
    assert (trained.exit_code, validated.exit_code) == (2, 2)
    assert trained.stderr == validated.stderr
    assert trained.stdout == validated.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before
    return trained.stderr.replace(str(tmp_path), "TMP").replace(str(folder), "DIR").splitlines()


def variant(folder: Path, tmp_path: Path, change: Callable[[Tensors], Tensors]) -> str:
    """The base with other tensors, as an override."""
    shutil.copytree(folder / "base", tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return f"model.base={tmp_path / 'changed'}"


def test_validate_says_what_will_happen_and_what_leaves_the_device(folder: Path) -> None:
    done = CliRunner().invoke(app, ["validate", str(folder / "recipe.yaml")])
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"model: {folder / 'base'} (gpt2, 4 blocks)"
    assert lines[1:4] == [
        "  client x2: blocks 0..0 (trains)",
        "  edge x1: blocks 1..2 (trains)",
        "  cloud x1: blocks 3..3 (trains)",
    ]
    assert "LoRA: rank 4 on 4 modules, adapters: shared" in lines
    (leaves,) = [line for line in lines if line.startswith("leaves the device: ")]
    assert "activations at the cut (block 1)" in leaves and "token ids stay" in leaves
    assert lines[-1] == "the recipe is valid"


@pytest.mark.parametrize(
    ("words", "when"),
    [
        (["server.batching=continuous"], "as many steps as a server has clients"),
        (["server.batching=continuous", "server.step_tenants=3"], "3 steps of clients"),
        (["server.batching=continuous", "server.step_tokens=99"], "99 tokens"),
    ],
)
def test_validate_says_when_steps_what_clients_have_in_common(folder: Path, words: list[str], when: str) -> None:
    done = CliRunner().invoke(
        app, ["validate", str(folder / "recipe.yaml"), "model.dropout=0", "lora.adapters=common", *words]
    )
    assert f"LoRA: rank 4 on 4 modules, adapters: common in blocks 1..3, stepped after {when}" in done.stdout


def test_validate_says_what_is_quantised(folder: Path) -> None:
    words = "quantization={edge: {method: nf4, double: true, compute_dtype: bfloat16}, cloud: int8}"
    done = CliRunner().invoke(app, ["validate", str(folder / "recipe.yaml"), words])
    assert (done.exit_code, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("quantization: ")]
    assert line == (
        "quantization: edge nf4 (scales quantised, too, computed in bfloat16), cloud int8; "
        "of blocks the linear layers alone, not norms, embeddings and head"
    )


def test_without_bitsandbytes_only_machines_that_need_it_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    wanted = load_recipe(folder / "recipe.yaml", ["quantization={edge: nf4, cloud: int8}"])
    with pytest.raises(RecipeError) as refused:
        prepare(wanted)
    assert str(refused.value) == (
        "quantization.edge: nf4 needs the package bitsandbytes; "
        "install it here: pip install 'splitllm[bnb]', or leave this tier out"
    )
    assert prepare(wanted, tier="client").modules
    with pytest.raises(RecipeError, match=r"quantization\.cloud: int8 needs the package bitsandbytes"):
        prepare(wanted, data=False, tier="cloud")


def test_without_deepspeed_only_servers_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    wanted = load_recipe(folder / "recipe.yaml", ["server.zero.stage=3"])
    for tier in (None, "edge"):
        with pytest.raises(RecipeError) as refused:
            prepare(wanted, tier=tier)
        line = "server.zero: DeepSpeed is not installed; install it with: pip install 'splitllm[deepspeed]'"
        assert str(refused.value) == line
    assert prepare(wanted, tier="client").modules


def test_the_folder_for_weights_in_files_has_to_be_on_servers(folder: Path) -> None:
    nowhere = folder / "nowhere"
    wanted = load_recipe(
        folder / "recipe.yaml", [f"server.zero={{stage: 3, offload_param: nvme, nvme_path: {nowhere}}}"]
    )
    with pytest.raises(RecipeError, match=r"server\.zero\.nvme_path: .*/nowhere is no folder that can be written to"):
        prepare(wanted, tier="edge")
    assert prepare(wanted, tier="client").modules
    assert prepare(wanted).modules, "who only reads the recipe needs no folder"
    with pytest.raises(RecipeError, match=r"server\.zero\.nvme_path: .*/nowhere is no folder that can be written to"):
        train(wanted, folder / "out")
    assert not (folder / "out").exists(), "nothing was loaded or written"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.stpes=4"], ["train.stpes: unknown key; did you mean train.steps?"]),
        (["split.cuts=[3, 1]"], ["split.cuts: [3, 1] is not allowed; use block numbers from 1 that rise strictly, *"]),
        (["split.cuts=[2, 5]"], ["split.cuts: 5 is not a place to cut gpt2, which has 4 blocks: use 1 to 4"]),
        (["split.cuts=[0, 2]"], ["split.cuts: 0 is not a place to cut gpt2, which has 4 blocks: use 1 to 4"]),
        (
            ["split={tiers: {client: 2, cloud: 1}, cuts: [1], client_cuts: {client-1: 9}, labels: cloud}"],
            ["split.client_cuts.client-1: 9 is not a place to cut gpt2, which has 4 blocks: use 1 to 4"],
        ),
        (
            ["server.batching=synchronous"],
            [
                "server.batching: synchronous needs a base model without dropout of its own, and this one has "
                "attn_pdrop 0.1, embd_pdrop 0.1, resid_pdrop 0.1; set model.dropout: 0 (lora.dropout may stay), or "
                "batching: none"
            ],
        ),
        (["lora.targets=[nope]"], ["lora.targets: ['nope'] matches nothing in gpt2; its blocks have c_attn, c_fc, *"]),
        (["lora.targets=[wte]"], ["lora.targets: transformer.wte is no linear layer inside a block, *"]),
        (
            ["lora.targets=[h.0.attn.c_attn]", "lora.tiers=[cloud]"],
            ["lora.tiers: ['cloud'] hold no module that lora.targets matches"],
        ),
        (["split.tiers={client: 99, edge: 1, cloud: 1}"], ["split.tiers: 99 clients share 40 usable training rows *"]),
        (["data.source=gone.jsonl"], ["data.source: there is no file gone.jsonl (seen from *); correct the path"]),
        (["data.eval=gone.jsonl"], ["data.eval: there is no file gone.jsonl (seen from *); correct the path"]),
        (["data.max_length=64"], ["data.max_length: 64 is more than the model's 32 positions; use at most 32"]),
        (["model.base=no/such/folder"], ["model.base: there is no folder no/such/folder (seen from *); correct the *"]),
        (["model.base=absent"], ["model.base: cannot read a configuration from absent: *"]),
        (["model.tokenizer=absent"], ["model.tokenizer: cannot read a tokenizer from absent: *"]),
        (["model.attention=nope"], ["model.base: gpt2 cannot be cut: *attn_implementation*"]),
        (["model.random={n_lay: 3}"], ["model.random.n_lay: gpt2 has no such setting"]),
        (["model.random={n_layer: many}"], ["model.random.n_layer: 'many' is no value for it (*)"]),
        (["model.random={n_layer: 0}"], ["model.base: its configuration has 0 blocks: nothing to train"]),
        (["model.random={n_head: 3}"], ["model.base: no model can be built from its configuration (ValueError: *)"]),
        (
            ["model.random={activation_function: nope}"],
            ["model.base: no model can be built from its configuration (KeyError: 'nope')"],
        ),
        (["lora.start_from=absent"], ["absent: not a PEFT adapter folder that can be read here (*)"]),
        (
            ["split.cuts=[1, 9]", "lora.targets=[nope]", "data.source=gone.jsonl", "data.max_length=64"],
            [
                "split.cuts: 9 is not a place to cut *",
                "lora.targets: ['nope'] matches nothing *",
                "data.max_length: 64 is more *",
                "data.source: there is no file gone.jsonl *",
            ],
        ),
        (
            ["model.base=no/such/folder", "data.source=[a.jsonl, b.jsonl]", "data.eval=c.jsonl"],
            ["model.base: there is no folder *", *(f"data.source: there is no file {name}.jsonl *" for name in "ab")],
        ),
        (["seed=-1", "train.stpes=4", "lora.rank=0"], ["seed: *", "lora.rank: *", "train.stpes: *"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_every_complaint_is_a_line(folder: Path, tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
    found = complaints(folder, tmp_path, *overrides)
    patterns = [re.escape(line).replace(r"\*", ".*") for line in expected]
    assert len(found) == len(patterns), found
    for line, pattern in zip(sorted(found), sorted(patterns), strict=True):
        assert re.fullmatch(pattern, line), line


def test_malformed_rows_are_named_by_file_and_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl").write_text('{"prompt": "w1", "completion": "w2"}\n{"prompt": \n"text"\n')
    assert [line.split(":")[:2] for line in complaints(folder, tmp_path, f"data.source={tmp_path / 'torn.jsonl'}")] == [
        ["TMP/torn.jsonl", "2"],
        ["TMP/torn.jsonl", "3"],
    ]


def test_rows_without_the_fields_of_the_format_are_named_by_file_and_line(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "completion": "w2"}, {"prompt": 3, "completion": "w2"}, {"text": "w1"}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = complaints(folder, tmp_path, f"data.source={tmp_path / 'odd.jsonl'}", "data.eval_fraction=0.01")
    assert 1 <= len(found) <= 2
    assert all(re.match(r"TMP/odd\.jsonl:[23]: (field 'prompt' is a int|no field 'prompt')", line) for line in found)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "other", words=500)
    assert complaints(folder, tmp_path, f"model.tokenizer={tmp_path / 'other'}") == [
        "model.tokenizer: its largest token id is 502, but the model has 32 embeddings: it belongs to another model"
    ]


def test_missing_and_misshapen_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        del tensors["transformer.h.1.mlp.c_fc.weight"], tensors["transformer.wte.weight"]
        tensors["transformer.h.2.attn.c_proj.bias"] = torch.zeros(3)
        return tensors

    assert complaints(folder, tmp_path, variant(folder, tmp_path, change)) == [
        "TMP/changed: tensor transformer.wte.weight is missing",
        "TMP/changed: tensor transformer.h.1.mlp.c_fc.weight is missing",
        "TMP/changed: tensor transformer.h.2.attn.c_proj.bias has shape [3], the configuration wants [16]",
    ]


def test_tensors_that_are_complete_are_not_complained_about(folder: Path, tmp_path: Path) -> None:
    """Extra tensors, and names without the usual prefix, are what other checkpoints have."""
    changed = variant(folder, tmp_path, lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()})
    assert prepare(load_recipe(folder / "recipe.yaml", [changed])).every_module_trains


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0, "not a whole safetensors file"),
        (50, "not a whole safetensors file"),
        (-4, "does not fit its file: the download or copy is not whole"),
        (None, "model.base: TMP/changed has no model.safetensors"),
    ],
)
def test_a_torn_checkpoint_is_refused(folder: Path, tmp_path: Path, keep: int | None, expected: str) -> None:
    override = variant(folder, tmp_path, dict)
    file = tmp_path / "changed" / "model.safetensors"
    content = file.read_bytes()
    if keep is None:
        file.unlink()
    else:
        file.write_bytes(content[:keep])
    (line,) = complaints(folder, tmp_path, override)
    assert expected in line


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
REFUSED = {
    "mixtral": (transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2), "mixture of experts"),
    "t5": (transformers.T5Config(d_model=16, d_ff=16, num_layers=2, num_heads=2, vocab_size=40), "encoder-decoder"),
    "bert": (transformers.BertConfig(**SMALL), "declares no pipeline plan"),
    "vit": (transformers.ViTConfig(), "declares no pipeline plan"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_cut_is_refused_by_name(folder: Path, tmp_path: Path, family: str) -> None:
    config, reason = REFUSED[family]
    config.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    (line,) = complaints(folder, tmp_path, f"model.base={tmp_path / 'base'}")
    assert line.startswith(f"model.base: {family} cannot be cut: ") and reason in line


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"model_type": "nonesuch"}',
        "{}",
        "3",
        "null",
        '{"model_type": "gpt2", "n_layer": "six"}',
        '{"model_type": "gpt2", "dtype": "zzz"}',
        '{"model_type": "gpt2", "quantization_config": 3}',
    ],
)
def test_a_configuration_that_is_none_is_refused(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(content)
    (line,) = complaints(folder, tmp_path, f"model.base={tmp_path / 'base'}")
    assert line.startswith("model.base: cannot read a configuration from TMP/base: ")


@pytest.mark.parametrize("content", ["3", "null", '{"added_tokens_decoder": 3}'])
def test_a_tokenizer_that_is_none_is_refused(folder: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(folder / "base", tmp_path / "words")
    (tmp_path / "words" / "tokenizer_config.json").write_text(content)
    (line,) = complaints(folder, tmp_path, f"model.tokenizer={tmp_path / 'words'}")
    assert line.startswith("model.tokenizer: cannot read a tokenizer from TMP/words: ")


@pytest.mark.skipif(is_flash_attn_2_available(), reason="needs a machine without flash_attn")
def test_an_attention_that_is_not_installed_is_refused(folder: Path, tmp_path: Path) -> None:
    (line,) = complaints(folder, tmp_path, "model.attention=flash_attention_2")
    assert line.startswith("model.base: gpt2 cannot be cut: no small twin of it could be built and run (FlashAttention")


def test_integers_are_no_weights(folder: Path, tmp_path: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    override = variant(folder, tmp_path, lambda tensors: {**tensors, name: tensors[name].to(torch.int8)})
    (line,) = complaints(folder, tmp_path, override)
    assert line == f"TMP/changed: tensor {name} holds int8: weights are floats"


def test_more_processes_than_started_is_one_line(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["train", str(folder / "recipe.yaml"), "train.processes=2", "--output-dir", str(tmp_path / "run")]
    )
    assert done.exit_code == 2
    assert re.fullmatch(r"train\.processes: the recipe expects 2, but 1 run; start 2: accelerate .*\n", done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    train(load_recipe(folder / "recipe.yaml", ["train.steps=1", "train.schedule.warmup_steps=0"]), folder / "first")
    return folder / "first" / "adapter"


def test_an_adapter_to_start_from_must_be_like_the_recipes(folder: Path, adapter: Path, tmp_path: Path) -> None:
    start = f"lora.start_from={adapter}"
    assert prepare(load_recipe(folder / "recipe.yaml", [start])).modules
    assert complaints(folder, tmp_path, start, "lora.rank=2", "lora.dora=true", "lora.targets=[c_proj]") == [
        "lora.rank: 2 here, 4 in DIR/first/adapter; set lora.rank=4",
        "lora.dora: True here, False in DIR/first/adapter; set lora.dora=false",
        "lora.targets: DIR/first/adapter adapts other modules than this recipe: only in the adapter "
        "['transformer.h.0.attn.c_attn', 'transformer.h.1.attn.c_attn']; only in the recipe "
        "['transformer.h.0.attn.c_proj', 'transformer.h.0.mlp.c_proj']; use its lora.targets, lora.tiers and "
        "train.full_tiers",
    ]


def test_an_adapter_of_another_width_or_cut_short_is_no_start(folder: Path, adapter: Path, tmp_path: Path) -> None:
    wide = transformers.GPT2Config(n_layer=4, n_embd=24, n_head=2, n_positions=32, vocab_size=32, eos_token_id=2)
    save_base(tmp_path / "wide", wide)
    found = complaints(folder, tmp_path, f"lora.start_from={adapter}", f"model.base={tmp_path / 'wide'}")
    assert len(found) == 4
    place = "lora.start_from: DIR/first/adapter: transformer.h.0.attn.c_attn"
    assert found[0] == f"{place} is adapted from 16 to 48, the base has [24, 72]"
    shutil.copytree(adapter, tmp_path / "short")
    file = tmp_path / "short" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.transformer.h.2.attn.c_attn.lora_B.weight"]
    save_file(tensors, file)
    assert complaints(folder, tmp_path, f"lora.start_from={tmp_path / 'short'}") == [
        "lora.start_from: TMP/short: tensors of transformer.h.2.attn.c_attn are missing"
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha_pattern", {"c_attn": 99}),
        ("rank_pattern", {"c_attn": 2}),
        ("lora_bias", True),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
    ],
)
def test_an_adapter_with_settings_that_a_recipe_has_not_is_no_start(
    folder: Path, adapter: Path, tmp_path: Path, key: str, value: object
) -> None:
    shutil.copytree(adapter, tmp_path / "odd")
    file = tmp_path / "odd" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    found = complaints(folder, tmp_path, f"lora.start_from={tmp_path / 'odd'}")
    assert found == [f"lora.start_from: TMP/odd: {key}={value!r} in its adapter_config.json has no place in a recipe"]


def test_a_tier_without_blocks_does_not_train_in_full(folder: Path, tmp_path: Path) -> None:
    assert complaints(folder, tmp_path, "train.full_tiers=[cloud]", "split.cuts=[1, 4]") == [
        "train.full_tiers: 'cloud' has no blocks with split.cuts: [1, 4]; leave it out, or cut lower"
    ]


def test_weights_that_were_trained_in_full_are_trained_on(folder: Path, tmp_path: Path) -> None:
    words = ["train.steps=1", "train.schedule.warmup_steps=0", "train.full_tiers=[edge]"]
    first = tmp_path / "first"
    train(load_recipe(folder / "recipe.yaml", words), first)
    again = load_recipe(folder / "recipe.yaml", [*words, f"lora.start_from={first / 'adapter'}"])
    train(again, tmp_path / "second")
    once, twice = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("first", "second"))
    assert once["eval_loss_after"] == twice["eval_loss_before"] != once["eval_loss_before"]
    plain = tmp_path / "plain"
    train(load_recipe(folder / "recipe.yaml", ["train.steps=1", "train.schedule.warmup_steps=0"]), plain)
    found = complaints(folder, tmp_path, f"lora.start_from={plain / 'adapter'}", "train.full_tiers=[cloud]")
    assert "only in the adapter ['transformer.h.3.attn.c_attn']; use its lora.targets, lora.tiers and" in found[0]
    for tiers in ("null", "[cloud]"):
        found = complaints(folder, tmp_path, f"lora.start_from={first / 'adapter'}", f"train.full_tiers={tiers}")
        said = "train.full_tiers: TMP/first/adapter has all weights of transformer.h.1, transformer.h.2, of which this"
        assert found[0].startswith(said)


def test_an_adapter_with_further_tensors_is_no_start(folder: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "more")
    file = tmp_path / "more" / "adapter_model.safetensors"
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_B.bias"
    save_file({**load_file(file), name: torch.ones(48)}, file)
    found = complaints(folder, tmp_path, f"lora.start_from={tmp_path / 'more'}")
    assert found == [f"lora.start_from: TMP/more: tensor {name} is none of LoRA's"]


@pytest.mark.parametrize(("key", "value"), [("r", None), ("rank_pattern", 3), ("peft_type", "XYZ")])
def test_an_adapter_configuration_that_is_none_is_refused(
    folder: Path, adapter: Path, tmp_path: Path, key: str, value: object
) -> None:
    shutil.copytree(adapter, tmp_path / "odd")
    file = tmp_path / "odd" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    assert complaints(folder, tmp_path, f"lora.start_from={tmp_path / 'odd'}")
    done = CliRunner().invoke(
        app, ["merge", str(tmp_path / "odd"), "--base", str(folder / "base"), "--output-dir", str(tmp_path / "merged")]
    )
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(str(tmp_path / "odd"))


def test_a_limit_of_a_tier_is_checked_by_every_command(folder: Path, tmp_path: Path) -> None:
    recipe, limit, out = str(folder / "recipe.yaml"), "split.memory_mib={client: 1}", tmp_path / "out"
    for words in (["validate", recipe, limit], ["train", recipe, limit, "--output-dir", str(out)]):
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2 and not out.exists()
        assert refused.stderr.startswith("split.memory_mib.client: 1 MiB do not hold client-0, which takes ")


def test_a_limit_names_a_tier(folder: Path, tmp_path: Path) -> None:
    [line] = complaints(folder, tmp_path, "split.memory_mib={phone: 850}")
    assert line == "split.memory_mib: 'phone' is not a tier of split.tiers; use some of client, edge, cloud"


def test_a_run_without_room_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_bytes", lambda: 0)
    out = tmp_path / "out"
    refused = CliRunner().invoke(app, ["train", str(folder / "recipe.yaml"), "--output-dir", str(out)])
    assert refused.exit_code == 2 and not out.exists()
    assert re.match(r"memory of this machine: 0 MiB are free, and all roles in one process would take", refused.stderr)


def test_noise_whose_price_nobody_can_work_out_is_refused_before_the_first_round(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = ["rounds.replicas=local", "rounds.cloud_every=2", "rounds.weights=equal"]
    recipe = load_recipe(folder / "recipe.yaml", [*local, "rounds.privacy={clip: 0.5, noise: 2.0}"])
    assert prepare(recipe).recipe is recipe
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    assert complaints(folder, tmp_path, *local, "rounds.privacy={clip: 0.5, noise: 2.0}") == [
        "rounds.privacy.noise: 2 needs the library dp-accounting, which is not installed; "
        "pip install 'splitllm[privacy]', or leave noise out"
    ]
    assert prepare(recipe, client=0).recipe is recipe, "it is servers that tell the price"
    prepare(load_recipe(folder / "recipe.yaml", [*local, "rounds.privacy={clip: 0.5}"]))
