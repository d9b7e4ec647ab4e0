"""Sites whose tops another engine averages give the adapter of one tree with a cloud above them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from splitllm.errors import RecipeError, RunInterrupted
from splitllm.recipe import load_recipe
from splitllm.running.interrupt import StopSignal
from splitllm.running.outcome import keep_recipe, restore
from splitllm.running.state import Run
from splitllm.train import carry_out, opened_run, train
from tests.federated.sites import SITES, apart, one_tree, pooled, site, written
from tests.grids import fast_if

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


async def _stopped_while_it_waits(run: Run) -> None:
    stop = StopSignal()
    carried = asyncio.create_task(carry_out(run, stop))
    assert run.roles.elsewhere is not None
    while not run.roles.elsewhere.waits:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.1)
    stop.asked = True
    await carried


def one_site(folder: Path, out: Path, *words: str) -> Run:
    recipe = load_recipe(folder / "recipe.yaml", [*site(folder, 0, f"unix:{out}/0.sock"), *words])
    run, _ = opened_run(recipe, out / "site")
    keep_recipe(run)
    return run


def test_a_site_that_waits_says_so_and_ends_when_asked_with_all_steps_before_the_round(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = one_site(folder, tmp_path, "train.checkpoint_every=100")
    assert run.roles.elsewhere is not None
    run.roles.elsewhere.patience = 0.05
    with pytest.raises(RunInterrupted, match=r"stopped after step 1 of 5, which is saved in .*step-"):
        asyncio.run(asyncio.wait_for(_stopped_while_it_waits(run), SECONDS))
    assert "the round after step 2 has waited" in caplog.text and "an engine that takes this site's part" in caplog.text
    again, saved = opened_run(run.recipe, tmp_path / "site", resume=True)
    restore(again, saved)
    assert again.step == 1


def test_a_site_whose_address_is_in_use_says_so(folder: Path, tmp_path: Path) -> None:
    address = "unix:/nowhere/at/all.sock"
    run = one_site(folder, tmp_path, f"rounds.exchange={address}")
    with pytest.raises(RecipeError, match=f"rounds.exchange: {address}: cannot listen there .*; use another path"):
        asyncio.run(carry_out(run, StopSignal()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rounds={exchange: 'unix:a.sock'}"], "rounds.exchange: needs rounds.replicas: local"),
        (["rounds.exchange=10.0.0.1:80"], "rounds.exchange: '10.0.0.1:80' .*unix:PATH"),
        (["rounds.exchange=unix:" + "a" * 108], "at most 107 bytes"),
        (
            ["rounds.edge_every=[1, 1]"],
            r"\[1, 1\] has 2 for the tiers between clients and the other sites \(edge\); give 1, such as \[1\]",
        ),
    ],
)
def test_what_a_site_cannot_be_is_refused(folder: Path, words: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(folder / "recipe.yaml", [*site(folder, 0, "unix:0.sock"), *words])


OUTER = "rounds.outer={name: fedadam, lr: 0.1}"
FAST = ("flora", "changes are looked at")
CASES: dict[str, list[str]] = {
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


@pytest.mark.parametrize("words", [pytest.param(w, id=c, marks=fast_if(c in FAST)) for c, w in CASES.items()])
def test_sites_give_the_adapter_of_one_tree(folder: Path, tmp_path: Path, words: Sequence[str]) -> None:
    train(load_recipe(folder / "recipe.yaml", [*one_tree(folder), *words]), tmp_path / "tree")
    steps = run_sites(folder, tmp_path, words)
    looks = any("outer" in word or "clip" in word for word in words)
    assert steps == ([0] if looks else []) + [2, 4, 5]
    far = [apart(tmp_path / f"site-{index}" / "adapter", tmp_path / "tree" / "adapter") for index in range(SITES)]
    assert max(far) < 1e-11  # they are 0.0 where this was written
