"""Where several processes of one server cannot be, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitllm.deployment.run import run_role
from splitllm.deployment.up import up
from splitllm.errors import RecipeError
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
