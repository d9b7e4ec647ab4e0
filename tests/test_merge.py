"""`splitllm merge`: an ordinary model comes out that computes what base and adapter do, or a line says why not."""

from __future__ import annotations

import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from splitllm.cli import app
from splitllm.errors import CheckpointError
from splitllm.model.export import load_adapter, save_adapter
from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.tiny import CONFIGS, save_base, save_tokenizer, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and trained adapters of both families: `gpt2/base`, `gpt2/run/adapter` and so on."""
    folder = tmp_path_factory.mktemp("tiny")
    for family, variant in (("gpt2", "lora.rslora=true"), ("llama", "lora.dora=true")):
        (folder / family).mkdir()
        path = write_recipe(folder / family, family)
        train(load_recipe(path, [variant, "train.optimizer.lr=0.1"]), folder / family / "run")
        train(load_recipe(path, ["train.full_tiers=[edge]", "train.optimizer.lr=0.1"]), folder / family / "in full")
    return folder


def merge(adapter: Path, base: Path | str, output_dir: Path) -> Result:
    return CliRunner().invoke(app, ["merge", str(adapter), "--base", str(base), "--output-dir", str(output_dir)])


def refusal(adapter: Path, base: Path | str, output_dir: Path) -> str:
    """The complaint, after checking that nothing was written."""
    before = sorted(output_dir.parent.rglob("*"))
    done = merge(adapter, base, output_dir)
    assert (done.exit_code, done.stdout) == (2, "")
    assert sorted(output_dir.parent.rglob("*")) == before
    return done.stderr


@pytest.mark.parametrize("run", ["run", "in full"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_merged_model_computes_what_base_and_adapter_do(
    folder: Path, tmp_path: Path, family: str, run: str
) -> None:
    base, adapter = folder / family / "base", folder / family / run / "adapter"
    done = merge(adapter, base, tmp_path / "new" / "merged")
    assert (done.exit_code, done.stderr) == (0, "")
    ids_BS = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)
        before = plain(ids_BS).logits
        wanted = PeftModel.from_pretrained(plain, adapter).eval()(ids_BS).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "merged")(ids_BS).logits
    assert torch.allclose(got, wanted, atol=1e-5)
    assert not torch.allclose(got, before, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "merged")("w3 w4").input_ids == [6, 7]


def test_an_empty_folder_may_be_there_already_and_a_base_may_have_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "gpt2" / "base", tmp_path / "base")
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    (tmp_path / "merged").mkdir()
    assert merge(folder / "gpt2" / "run" / "adapter", tmp_path / "base", tmp_path / "merged").exit_code == 0
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {"config.json", "model.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]


def test_a_full_disk_leaves_the_adapter_that_was_there(folder: Path, tmp_path: Path) -> None:
    config, tensors = load_adapter(folder / "gpt2" / "run" / "adapter")
    save_adapter(tmp_path / "adapter", tensors, config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=r"adapter\.writing"):
            save_adapter(tmp_path / "adapter", tensors, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_in_use_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    adapter, base = folder / "gpt2" / "run" / "adapter", folder / "gpt2" / "base"
    complaint = "--output-dir: {} is not an empty folder; name a new one\n"
    for taken in (tmp_path / "mine", tmp_path / "mine" / "file"):
        assert refusal(adapter, base, taken) == complaint.format(taken)


def test_the_current_directory_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = merge(folder / "gpt2" / "run" / "adapter", folder / "gpt2" / "base", Path())
    assert (done.exit_code, done.stderr) == (2, "--output-dir: . is the current directory; name a new one\n")


def test_what_is_no_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    base = folder / "gpt2" / "base"
    for wrong in (base, tmp_path / "absent", folder / "gpt2" / "run"):
        line = refusal(wrong, base, tmp_path / "merged")
        assert line.startswith(f"{wrong}: not a PEFT adapter folder that can be read here (")
        assert line.count("\n") == 1


def test_an_adapter_that_is_not_lora_or_torn_is_refused(folder: Path, tmp_path: Path) -> None:
    base = folder / "gpt2" / "base"
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "ia3")
    assert refusal(tmp_path / "ia3", base, tmp_path / "merged").startswith(f"{tmp_path / 'ia3'}: ")
    shutil.copytree(folder / "gpt2" / "run" / "adapter", tmp_path / "torn")
    file = tmp_path / "torn" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert refusal(tmp_path / "torn", base, tmp_path / "merged").startswith(f"{tmp_path / 'torn'}: not a PEFT adapter")


def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = folder / "gpt2" / "run" / "adapter"
    others = {"wide": {"n_embd": 24, "n_layer": 4}, "deep": {"n_embd": 16, "n_layer": 5}, "flat": {"n_layer": 2}}
    for name, sizes in others.items():
        config = transformers.GPT2Config(**{"n_embd": 16, **sizes}, n_head=2, vocab_size=32, eos_token_id=2)
        save_base(tmp_path / name, config)
        line = refusal(adapter, tmp_path / name, tmp_path / "merged")
        assert re.match(rf"{adapter} (does not fit this base|has 8 tensors, but this base takes)", line), line
        assert line.count("\n") == 1
    line = refusal(adapter, folder / "llama" / "base", tmp_path / "merged")
    assert line.startswith(f"{adapter} does not fit this base: ") and line.count("\n") == 1


def test_a_base_with_a_tensor_missing_is_refused_and_not_filled_with_random_numbers(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "gpt2" / "base", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.h.3.mlp.c_fc.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    line = refusal(folder / "gpt2" / "run" / "adapter", tmp_path / "base", tmp_path / "merged")
    assert line == f"{tmp_path / 'base'}: tensor transformer.h.3.mlp.c_fc.weight is missing\n"


def test_a_base_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = folder / "gpt2" / "run" / "adapter"
    assert "there is no folder" in refusal(adapter, tmp_path / "absent", tmp_path / "merged")
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=2, num_heads=2, vocab_size=40)
    config.save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")
    assert "t5 cannot be cut" in refusal(adapter, tmp_path / "t5", tmp_path / "merged")


def test_a_folder_of_several_adapters_says_which_there_are(tmp_path: Path) -> None:
    for name in ("client-1", "client-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"one lies in it: name {tmp_path}/client-0"):
        load_adapter(tmp_path)
