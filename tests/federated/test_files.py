"""`splitllm average`: clients' adapters become one that PEFT loads and that computes what the rule says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from splitllm.cli import AverageRule, app
from splitllm.federated.aggregate import RULES
from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.tiny import write_recipe

WEIGHTS = ["--weight", "3", "--weight", "1", "--weight", "2"]
RANKS = {"client-1": {"rank": 2, "alpha": 8}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of clients with adapters of their own; those of `mixed` differ in rank."""
    folder = tmp_path_factory.mktemp("run")
    words = ["lora.adapters=per_client", "train.optimizer.lr=0.1", "split.tiers={client: 3, edge: 1, cloud: 1}"]
    for name, more in (("alike", []), ("mixed", [f"lora.clients={json.dumps(RANKS)}"])):
        train(load_recipe(write_recipe(folder), [*words, *more]), folder / name)
    return folder


def clients(run: Path, name: str = "alike") -> list[Path]:
    return sorted((run / name / "adapter").iterdir())


def average(adapters: list[Path], output_dir: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["average", *map(str, adapters), "--output-dir", str(output_dir), *words])


def added(run: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight of the base."""
    base = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float64)
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).merge_and_unload().state_dict()
    return {name: tensor - plain[name] for name, tensor in merged.items() if not torch.equal(tensor, plain[name])}


@pytest.mark.parametrize(("name", "rule"), [("alike", "fedex"), ("alike", "flora"), ("mixed", "flora")])
def test_peft_loads_the_exact_average(run: Path, tmp_path: Path, name: str, rule: str) -> None:
    done = average(
        clients(run, name), tmp_path / "average", "--rule", rule, *["--weight", "3", "--weight", "1", "--weight", "2"]
    )
    assert (done.exit_code, done.stderr) == (0, "") and "exact to rounding" in done.stdout
    found, parts = added(run, tmp_path / "average"), [added(run, adapter) for adapter in clients(run, name)]
    for key, tensor in found.items():
        wanted = sum(weight / 6 * part[key] for weight, part in zip((3, 1, 2), parts, strict=True))
        assert float((tensor - wanted).abs().max() / wanted.abs().max()) <= 1e-6
    assert found.keys() == parts[0].keys()


def test_fedavg_says_how_far_it_is_off(run: Path, tmp_path: Path) -> None:
    done = average(clients(run), tmp_path / "average", "--rule", "fedavg")
    assert done.exit_code == 0 and "of rank 4," in done.stdout and "% off the exact average" in done.stdout
    found, first = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "average", clients(run)[0]))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in first.items()}


def test_the_command_knows_every_rule() -> None:
    assert list(get_args(AverageRule)) == list(RULES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weight", "1"], "--weight: 1 for 3 adapters; give one for each, in their order"),
        (["--weight", "1", "--weight", "0", "--weight", "2"], "--weight: 0 is not a weight; use numbers above 0"),
        (["--weight", "1", "--weight", "nan", "--weight", "2"], "--weight: nan is not a weight; use numbers above 0"),
        (["--rule", "ffa"], "ffa needs the same A everywhere"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(
    run: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    done = average(clients(run), tmp_path / "average", *words)
    assert done.exit_code == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_adapters_of_other_ranks_bases_and_values_are_refused(run: Path, tmp_path: Path) -> None:
    first, *_ = clients(run)
    done = average(clients(run, "mixed"), tmp_path / "average")
    assert done.exit_code == 2 and "fedex needs one rank, and there are [2, 4]; use flora" in done.stderr

    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    config = json.loads((first / "adapter_config.json").read_text())
    tensors = load_file(first / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] * torch.nan}, spoiled / "adapter_model.safetensors")
    (spoiled / "adapter_config.json").write_text(json.dumps(config))
    assert (
        f"{spoiled}: {name} is not finite; leave this adapter out" in average([first, spoiled], tmp_path / "a").stderr
    )

    save_file(tensors, spoiled / "adapter_model.safetensors")
    (spoiled / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/other"}))
    assert "is of base /other, and" in average([first, spoiled], tmp_path / "a").stderr

    (spoiled / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    assert "only plain LoRA and rsLoRA can be averaged" in average([first, spoiled], tmp_path / "a").stderr
    assert "exists; give a new one" in average([first, first], spoiled).stderr
