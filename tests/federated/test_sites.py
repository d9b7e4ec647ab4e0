"""Sites whose tops another engine averages give the adapter of one tree with a cloud above them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from splitllm.recipe import load_recipe
from splitllm.running.interrupt import StopSignal
from splitllm.running.outcome import keep_recipe, restore
from splitllm.running.state import Run
from splitllm.train import carry_out, opened_run, train
from tests.federated.sites import SITES, apart, one_tree, pooled, site, written

SECONDS = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    written(folder)
    return folder


def run_sites(folder: Path, out: Path, words: Sequence[str] = ()) -> list[int]:
    """Both sites to their ends, in one loop; the steps of the engine's rounds."""
    addresses = {f"site-{index}": f"unix:{out}/{index}.sock" for index in range(SITES)}
    runs: list[Run] = []
    for index, (name, address) in enumerate(addresses.items()):
        recipe = load_recipe(folder / "recipe.yaml", [*site(folder, index, address), *words])
        run, saved = opened_run(recipe, out / name)
        keep_recipe(run)
        restore(run, saved)
        runs.append(run)

    async def all_of() -> list[int]:
        async with asyncio.TaskGroup() as group:
            engine = group.create_task(pooled(addresses))
            for run in runs:
                group.create_task(carry_out(run, StopSignal()))
        return engine.result()

    return asyncio.run(asyncio.wait_for(all_of(), SECONDS))


OUTER = "rounds.outer={name: fedadam, lr: 0.1}"
CASES = {
    "fedavg": [],
    "loss at the client, few rows count": ["split.labels=client", "rounds.weights=examples"],
    "loss at the top": ["split.labels=cloud", "rounds.rule=fedex"],
    "flora": ["rounds.rule=flora", "lora.clients={}"],
    "rolora": ["rounds.rule=rolora"],
    "moments": ["rounds.moments=average", "rounds.prox=0.1"],
    "each client's own": ["lora.adapters=per_client"],
    "an optimizer of the top": [OUTER],
    "changes are looked at": ["rounds.clip_update=0.05", OUTER, "rounds.rule=rolora"],
    "median": ["rounds.rule=median"],
}


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_sites_give_the_adapter_of_one_tree(folder: Path, tmp_path: Path, words: Sequence[str]) -> None:
    train(load_recipe(folder / "recipe.yaml", [*one_tree(folder), *words]), tmp_path / "tree")
    steps = run_sites(folder, tmp_path, words)
    looks = any("outer" in word or "clip" in word for word in words)
    assert steps == ([0] if looks else []) + [2, 4, 5]
    far = [apart(tmp_path / f"site-{index}" / "adapter", tmp_path / "tree" / "adapter") for index in range(SITES)]
    assert max(far) < 1e-11  # they are 0.0 where this was written
