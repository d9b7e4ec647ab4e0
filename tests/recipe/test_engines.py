"""Keys of engines that do nothing, or do not go with others, are refused in one line."""

from __future__ import annotations

import pytest

from splitllm.errors import RecipeError
from splitllm.recipe import spreads_weights
from tests.recipe.conftest import MakeRecipe

THREE, FSDP = "server.zero.stage=3", "server.fsdp=true"
ONE_TIER = "split={tiers: {client: 2}, labels: client}"
WRONG = [
    (["server.zero.offload_param=cpu"], "server.zero.offload_param: cpu needs server.zero.stage: 3; set that, or"),
    (["server.zero={stage: 2, offload_param: cpu}"], "server.zero.offload_param: cpu needs server.zero.stage: 3;"),
    (["server.zero={stage: 3, offload_param: nvme}"], "nvme needs a folder for its files; set server.zero.nvme_path"),
    ([THREE, "server.zero.nvme_path=/files"], "server.zero.nvme_path: /files is not used by offload_param: none; use"),
    (["server.zero={stage: 2, offload_optimizer: nvme}"], "in stages 1 and 2 it writes nothing; use cpu or none"),
    (["server.zero={stage: 3, offload_optimizer: cpu}"], "server.zero.offload_optimizer: cpu is of stages 1 and 2;"),
    (["server.zero.offload_optimizer=cpu"], "server.zero.offload_optimizer: cpu is of stages 1 and 2; use"),
    ([THREE, FSDP], "server.fsdp: true beside server.zero.stage: 3; leave one of the two out"),
    (
        [THREE, "quantization={edge: nf4}"],
        "server.zero.stage: 3 does not hold quantised weights, and quantization.edge",
    ),
    ([FSDP, "quantization={cloud: int8}"], "server.fsdp: true does not hold quantised weights, and quantization.cloud"),
    ([THREE, "train.mixed_precision=bf16"], "saves nothing with train.mixed_precision: bf16, which keeps a copy of"),
    ([THREE, "lora.dora=true"], "server.zero.stage: 3 does not go with lora.dora, which takes the norms of whole"),
    ([FSDP, "train.processes=2"], "server.fsdp: true needs processes that compute the same in step, and those of"),
    (["server.zero.stage=1", "train.processes=2"], "server.zero.stage: 1 needs processes that compute the same in"),
    ([FSDP, ONE_TIER], "server.fsdp: true is of servers, and with one tier there is none; leave it out"),
    ([THREE, "model.dtype=float64"], "server.zero.stage: 3 has no float64 in DeepSpeed; use model.dtype: float32 or"),
    (["server.zero.stage=1", "train.optimizer.name=sgd"], "spreads AdamW's state, and train.optimizer.name is sgd;"),
    (["server.zero.stage=2", "rounds={replicas: local, cloud_every: 2}"], "and rounds average some of them; use"),
    (
        ["server.zero.stage=2", "server.batching=continuous", "lora.adapters=per_client"],
        "is for servers that step once",
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), WRONG, ids=[" ".join(each) for each, _ in WRONG])
def test_what_does_not_go_with_an_engine_is_refused(
    recipe_with: MakeRecipe, overrides: list[str], expected: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_with(*overrides)
    (problem,) = refused.value.problems
    assert expected in problem


@pytest.mark.parametrize(
    ("words", "spread"),
    [
        ([THREE], True),
        ([FSDP, "model.dtype=float64"], True),
        (["server.zero={stage: 3, offload_param: nvme, nvme_path: /files}"], True),
        (["server.zero={stage: 2, offload_optimizer: cpu}", "quantization=nf4"], False),
        ([THREE, "quantization={client: nf4}"], True),
        ([THREE, "lora.dora=true", "lora.tiers=[client]"], True),
        ([THREE, "rounds={replicas: local, cloud_every: 2, rule: fedex}", "lora.adapters=shared"], True),
        ([], False),
    ],
)
def test_what_goes_with_it_is_not(recipe_with: MakeRecipe, words: list[str], spread: bool) -> None:
    assert spreads_weights(recipe_with(*words)) == spread
