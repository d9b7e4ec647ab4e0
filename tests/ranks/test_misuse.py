"""Where several processes of one server cannot be, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitllm.deployment.run import run_role
from splitllm.deployment.up import up
from splitllm.errors import RecipeError
from splitllm.plan import describe
from splitllm.preflight import prepare
from splitllm.recipe import load_recipe
from splitllm.train import train
from tests.tiny import write_recipe

TWO = ("server.processes=2",)


def test_train_says_that_it_spreads_roles_another_way(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"server\.processes: 2 .* train\.processes; set it to 1"):
        train(load_recipe(write_recipe(tmp_path), TWO), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_up_says_that_it_starts_one_process_a_role(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"server\.processes: 2, .* accelerate launch, or set it to 1"):
        up(load_recipe(write_recipe(tmp_path), TWO), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_server_that_was_started_once_says_how_to_start_two(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"server\.processes: the recipe expects 2, but 1 run; start 2: accelerate"):
        run_role(load_recipe(write_recipe(tmp_path), TWO), "edge", tmp_path / "edge", listen="127.0.0.1:0")
    assert not (tmp_path / "edge").exists()


@pytest.mark.parametrize("rule", ["fedex", "flora"])
def test_rules_that_add_to_the_frozen_weights_are_refused(rule: str, tmp_path: Path) -> None:
    rounds = ("rounds.replicas=local", "rounds.cloud_every=2", f"rounds.rule={rule}")
    with pytest.raises(RecipeError, match=rf"server\.processes: 2 cannot share what rounds\.rule: {rule} adds"):
        load_recipe(write_recipe(tmp_path), (*TWO, *rounds))


def test_a_client_in_several_processes_hears_that_no_key_makes_it_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RecipeError, match=r"^a client is one process, but 2 run; start it by itself, without accelerate"
    ):
        run_role(load_recipe(write_recipe(tmp_path), TWO), "client-0", tmp_path / "client-0")


def dropping(base: float, lora: float, batching: str) -> tuple[str, ...]:
    return (*TWO, f"model.dropout={base}", f"lora.dropout={lora}", f"server.batching={batching}")


@pytest.mark.parametrize("words", [dropping(0.1, 0, "none"), dropping(0, 0.1, "none")])
def test_processes_that_would_get_nothing_to_compute_are_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^server\.processes: 2 would share nothing out, as .* batching: synchronous$"
    ):
        prepare(load_recipe(write_recipe(tmp_path), words), data=False)


@pytest.mark.parametrize(
    "words",
    [dropping(0, 0, "none"), dropping(0, 0.1, "synchronous"), (*dropping(0.1, 0, "none"), "server.fsdp=true")],
)
def test_those_that_do_are_not(words: tuple[str, ...], tmp_path: Path) -> None:
    assert prepare(load_recipe(write_recipe(tmp_path), words), data=False).recipe.server.processes == 2


def test_an_optimiser_without_anything_to_step_is_not_spread(tmp_path: Path) -> None:
    words = ("lora.tiers=[client]", "server.zero={stage: 2}")
    with pytest.raises(RecipeError, match=r"server\.zero\.stage: 2 spreads the state .* \['client'\] has none of them"):
        load_recipe(write_recipe(tmp_path), words)


def test_half_precision_by_accelerate_is_refused_as_that_of_the_recipe_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    recipe = write_recipe(tmp_path)
    with pytest.raises(
        RecipeError, match=r"^train\.mixed_precision: accelerate was launched with bf16, .*precision: no"
    ):
        prepare(load_recipe(recipe, ["server.fsdp=true"]), data=False)
    prepare(load_recipe(recipe, ["server.fsdp=true", "train.mixed_precision=no"]), data=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), []),
        ((*TWO, *dropping(0, 0, "none")), ["server.processes: 2, with rows of batches"]),
        (
            ("server.fsdp=true",),
            ["server.processes: 1, with frozen matrices by server.fsdp, which saves nothing in one process"],
        ),
        (
            (*TWO, "server.zero={stage: 2, offload_optimizer: cpu}"),
            ["server.processes: 2, with rows of batches and optimiser states by server.zero.stage: 2"],
        ),
    ],
)
def test_validate_tells_what_is_spread(words: tuple[str, ...], said: list[str], tmp_path: Path) -> None:
    told = describe(prepare(load_recipe(write_recipe(tmp_path), words)))
    assert [line for line in told if line.startswith("server.processes")] == said
