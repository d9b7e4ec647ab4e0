"""What a process expects of who launched it."""

from __future__ import annotations

import pytest

from splitllm.errors import RecipeError
from splitllm.recipe import TrainRecipe
from splitllm.running.world import Processes, share_cores

ONE = Processes(1, "train.processes")


@pytest.mark.parametrize(
    ("switch", "key"), [("ACCELERATE_USE_DEEPSPEED", "server.zero"), ("ACCELERATE_USE_FSDP", "server.fsdp")]
)
def test_engines_of_accelerate_are_refused_with_the_key_of_ours(
    switch: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(switch, "true")
    with pytest.raises(RecipeError, match=rf"^{key}: accelerate was launched with .*; choose it in the recipe"):
        share_cores(TrainRecipe(threads=1), ONE)


@pytest.mark.parametrize(("started", "wanted", "remedy"), [("1", 2, "start 2: accelerate"), ("3", 2, "launch 2, or")])
def test_another_number_of_processes_is_refused_with_the_remedy(
    started: str, wanted: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(
        RecipeError, match=f"server.processes: the recipe expects {wanted}, but {started} run; {remedy}"
    ):
        share_cores(TrainRecipe(threads=1), Processes(wanted, "server.processes"))
