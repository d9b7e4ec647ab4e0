"""The adapter starts alike on any cut, trains what the recipe names, and is called what PEFT calls it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from splitllm import Shard
from splitllm.errors import RecipeError
from splitllm.model.loading import Checkpoint, quiet_transformers
from splitllm.model.lora import (
    adapter_parameters,
    add_lora,
    block_of,
    initial_a,
    lora_config,
    matched_modules,
    target_modules,
)
from splitllm.model.shard import BUILDING
from splitllm.recipe import LoraRecipe
from tests.families import CONFIGS, TARGETS, checkpoint_folder

LORA = LoraRecipe(rank=4, alpha=8)
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


def adapted(
    family: str,
    start: int = 0,
    stop: int | None = None,
    lora: LoraRecipe = LORA,
    *,
    seed: int = 0,
    targets: str | Sequence[str] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Shard:
    checkpoint = Checkpoint(checkpoint_folder(family))
    shard = Shard.cut(checkpoint, start, stop, dtype=dtype)
    add_lora(shard, lora, matched_modules(checkpoint.config, targets or TARGETS.get(family)), seed)
    return shard


def tensors(shard: Shard) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in adapter_parameters(shard).items()}


@cache
def whole_adapter(family: str, kind: str) -> dict[str, torch.Tensor]:
    return tensors(adapted(family, lora=LORA.model_copy(update=KINDS[kind])))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("cuts", [[3], [1, 2], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_every_cut_starts_with_the_adapter_of_the_whole_model(family: str, cuts: list[int], kind: str) -> None:
    lora = LORA.model_copy(update=KINDS[kind])
    whole = whole_adapter(family, kind)
    parts = [adapted(family, a, b, lora) for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    union = {name: tensor for part in parts for name, tensor in tensors(part).items()}
    assert list(union) == list(whole)
    assert sum(len(tensors(part)) for part in parts) == len(whole)
    assert all(torch.equal(union[name], tensor) for name, tensor in whole.items())


def test_the_start_depends_on_seed_and_place_only() -> None:
    first, again, other = adapted("gpt2"), adapted("gpt2"), adapted("gpt2", seed=1)
    torch.manual_seed(3)
    assert all(torch.equal(tensor, tensors(again)[name]) for name, tensor in tensors(first).items())
    a_of = {name: tensor for name, tensor in tensors(first).items() if ".lora_A." in name}
    assert not any(torch.equal(tensor, tensors(other)[name]) for name, tensor in a_of.items())
    distinct = {tuple(tensor.flatten().tolist()) for tensor in a_of.values()}
    assert len(distinct) == len(a_of)
    assert all(tensor.count_nonzero() == 0 for name, tensor in tensors(first).items() if ".lora_B." in name)


def test_a_starts_with_pefts_distribution() -> None:
    wide = LORA.model_copy(update={"rank": 256})
    for name, tensor in tensors(adapted("llama", lora=wide)).items():
        if ".lora_A." in name:  # kaiming_uniform(a=sqrt 5): uniform within 1 / sqrt(inputs)
            bound = tensor.shape[1] ** -0.5
            assert 0.95 * bound < float(tensor.abs().max()) <= bound
            assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_only_the_adapter_trains() -> None:
    shard = adapted("llama", 1, 4)
    trainable = {id(parameter) for parameter in shard.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in adapter_parameters(shard).values()}
    assert not shard.training


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, {"q_proj", "v_proj"}),
        (["k_proj"], {"k_proj"}),
        (("up_proj", "o_proj"), {"up_proj", "o_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (r".*\.self_attn\.(q|k)_proj", {"q_proj", "k_proj"}),
    ],
)
def test_targets_may_be_peft_s_table_a_list_a_pattern_or_all(targets: Any, expected: set[str]) -> None:
    found = matched_modules(CONFIGS["llama"](), targets)
    assert {name.rsplit(".", 1)[1] for name in found} == expected
    assert len(found) == len(set(found)) == 6 * len(expected)
    bottom_up = [block_of(CONFIGS["llama"](), name) for name in found]
    assert bottom_up == [block for block in range(6) for _ in expected]


def test_a_pattern_may_pick_blocks_and_the_other_shards_stay_frozen() -> None:
    targets = r"transformer\.h\.[45]\.attn\.c_attn"
    empty, full = adapted("gpt2", 0, 3, targets=targets), adapted("gpt2", 3, 6, targets=targets)
    assert adapter_parameters(empty) == {} and not any(p.requires_grad for p in empty.parameters())
    assert {block_of(CONFIGS["gpt2"](), name.removeprefix("base_model.model.")) for name in tensors(full)} == {4, 5}


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ["lm_head"], "lora.targets: lm_head is no linear layer inside a block"),
        ("llama", ["q_proj", "lm_head"], "lora.targets: lm_head is no linear layer inside a block"),
        ("llama", ["embed_tokens"], "embed_tokens is no linear layer inside a block"),
        ("llama", ["input_layernorm"], "layers.0.input_layernorm is no linear layer inside a block"),
        ("llama", ["c_attn"], "matches nothing in llama; its blocks have down_proj, gate_proj, k_proj"),
        ("granite", None, "PEFT has no default for granite: name the modules or all-linear"),
    ],
)
def test_wrong_targets_are_refused_with_what_there_is(family: str, targets: Any, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        matched_modules(CONFIGS[family](), targets)
    assert message in str(raised.value)
    assert all(problem.startswith("lora.targets: ") for problem in raised.value.problems)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("base", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_an_adapter_over_half_precision_is_fp32(base: torch.dtype, expected: torch.dtype, kind: str) -> None:
    shard = adapted("llama", 0, 2, LORA.model_copy(update=KINDS[kind]), dtype=base)
    assert {tensor.dtype for tensor in tensors(shard).values()} == {expected}
    assert {parameter.dtype for parameter in shard.parameters() if not parameter.requires_grad} == {base}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_names_and_shapes_are_those_of_pefts_own_file(family: str, kind: str, tmp_path: Path) -> None:
    lora, folder = LORA.model_copy(update=KINDS[kind]), checkpoint_folder(family)
    with quiet_transformers():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    config = lora_config(base.config, lora, target_modules(base.config, None))
    get_peft_model(base, config).save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    ours = tensors(adapted(family, lora=lora))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    for name, tensor in theirs.items():
        if "magnitude" in name:  # DoRA's is not random: the norm of the frozen weight's columns
            torch.testing.assert_close(ours[name], tensor, rtol=1e-12, atol=0)


def test_initial_values_are_drawn_where_another_thread_builds_a_model_without_any() -> None:
    expected, building, drawn = initial_a("a", (4, 8), 0), threading.Event(), threading.Event()

    def build() -> None:
        with BUILDING, no_init_weights():
            building.set()
            drawn.wait(0.3)  # as long as nobody may draw meanwhile

    with ThreadPoolExecutor(1) as pool:
        built = pool.submit(build)
        assert building.wait(10)
        found = initial_a("a", (4, 8), 0)
        drawn.set()
        built.result()
    assert torch.equal(found, expected)
