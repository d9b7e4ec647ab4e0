"""What quantised layers take is what was told before they were read."""

from __future__ import annotations

import pytest
import torch

from splitllm.model.joined import Rows
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import adapter_parameters, add_lora, matched_modules
from splitllm.model.memory import activation_bytes, role_price, shard_bytes, work_of
from splitllm.model.quantized import QuantizedLinear
from splitllm.model.quantized_bytes import saved_bytes, scratch_bytes
from splitllm.model.randomness import MicroBatchId
from splitllm.model.shard import Shard
from splitllm.model.trainable import Trainable
from splitllm.recipe import OptimizerRecipe, QuantizationRecipe, Recipe
from splitllm.roles.ledger import Ledger
from splitllm.roles.worker import Ask, Worker
from tests.families import CONFIGS, TARGETS, checkpoint_folder, recipe
from tests.quantized import METHODS

CPU = torch.device("cpu")


def held(shard: Shard) -> int:
    return Worker(shard, Trainable({}, OptimizerRecipe()), CPU).peak()["weights"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_those_of_the_shard(family: str, method: str, dtype: torch.dtype) -> None:
    checkpoint, how = Checkpoint(checkpoint_folder(family)), QuantizationRecipe.model_validate(METHODS[method])
    shard = Shard.cut(checkpoint, 2, 6, head=True, dtype=dtype, quantization=how)
    whole = shard_bytes(checkpoint.config, 2, 6, True, dtype)
    assert whole - saved_bytes(checkpoint.config, 2, 6, dtype, how) == held(shard) < whole
    matrices = [layer.matrix(dtype)[0] for layer in shard.modules() if isinstance(layer, QuantizedLinear)]
    assert scratch_bytes(checkpoint.config, dtype) == max(matrix.numel() * dtype.itemsize for matrix in matrices)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_a_role_of_a_quantised_tier_is_priced_with_them_and_others_are_not(family: str, method: str) -> None:
    plain = recipe(family, [2, 4], dtype="bfloat16")
    wanted = Recipe.model_validate({**plain.model_dump(mode="json"), "quantization": {"edge": METHODS[method]}})
    checkpoint, modules = Checkpoint(checkpoint_folder(family)), matched_modules(CONFIGS[family](), None)
    shard = Shard.cut(checkpoint, 2, 4, dtype=torch.bfloat16, quantization=wanted.quantization["edge"])
    prices = [role_price(each, checkpoint.config, modules, "edge-0") for each in (wanted, plain)]
    assert prices[0].weights == held(shard) < prices[1].weights
    for name in ("client-0", "cloud"):
        assert role_price(wanted, checkpoint.config, modules, name) == role_price(
            plain, checkpoint.config, modules, name
        )


def test_the_ledger_has_quantised_weights_and_the_one_that_is_decoded() -> None:
    config, modules = Checkpoint(checkpoint_folder("gpt2")).config, matched_modules(CONFIGS["gpt2"](), None)
    raw = recipe("gpt2", [2, 4], dtype="bfloat16").model_dump(mode="json")
    sections = [{}, {"edge": {"method": "nf4"}}, {"edge": {"method": "nf4", "compute_dtype": "float32"}}]
    ledgers = [
        Ledger(Recipe.model_validate({**raw, "quantization": section}), config, modules, 0) for section in sections
    ]
    whole, half, wide = (ledger.of("edge-0") for ledger in ledgers)
    assert half.weights == wide.weights < whole.weights
    assert half.scratch - whole.scratch == scratch_bytes(config, torch.bfloat16)
    assert wide.scratch - whole.scratch == 2 * scratch_bytes(config, torch.bfloat16)
    assert all(ledger.of("cloud") == ledgers[0].of("cloud") for ledger in ledgers)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_micro_batch_keeps_what_it_keeps_on_plain_weights(
    family: str, method: str, dtype: str, checkpointing: bool
) -> None:
    wanted = recipe(family, [2, 4], dtype=dtype, train={"activation_checkpointing": checkpointing})
    checkpoint, modules = Checkpoint(checkpoint_folder(family)), matched_modules(CONFIGS[family](), TARGETS.get(family))
    how = QuantizationRecipe.model_validate(METHODS[method])
    shard = Shard.cut(checkpoint, 2, 4, dtype=getattr(torch, dtype), quantization=how)
    add_lora(shard, wanted.lora, modules, 0)
    if checkpointing:
        shard.checkpoint_activations()
    worker = Worker(shard, Trainable(adapter_parameters(shard), OptimizerRecipe()), CPU)
    worker.trainable.expect([MicroBatchId(0, 0, 0)])
    hidden_TD = torch.randn(21, 32, dtype=getattr(torch, dtype))
    (run,) = worker.forward([Ask(Rows(MicroBatchId(0, 0, 0), (7, 7, 7)), hidden_TD, input_gradient=True)])
    worker.backward([run], [torch.ones_like(run.output_TD)])
    told = activation_bytes(checkpoint.config, work_of(wanted, checkpoint.config, modules, 2, 4, rows=3, length=7))
    assert worker.peak()["activations of a batch"] == told
