"""`splitllm plan --memory`: the ledger, and a recipe that cannot fit is refused with what would."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from splitllm.deployment import plan as planning
from splitllm.deployment.plan import plan_memory
from splitllm.errors import RecipeError
from splitllm.recipe import load_recipe
from tests.tiny import write_recipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("base"))


def planned(path: Path, *overrides: str, here: bool = False) -> str:
    console = Console(file=(text := io.StringIO()), width=200)
    try:
        plan_memory(load_recipe(path, overrides), here=here, console=console)
    except RecipeError as error:
        return f"{text.getvalue()}refused: {error}"
    return text.getvalue()


def test_it_needs_no_data(path: Path, tmp_path: Path) -> None:
    told = planned(path, f"data.source={tmp_path / 'missing.jsonl'}")
    assert "client x2" in told and "all roles as processes on one machine: " in told


def test_a_table_comes_before_the_refusal(path: Path) -> None:
    told = planned(path, "split.memory_mib={edge: 1}")
    assert told.index("client x2") < told.index("refused: split.memory_mib.edge: 1 MiB do not hold edge, which takes ")


def test_all_roles_must_fit_here_only_where_that_is_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_bytes", lambda: 2**20)
    assert "refused" not in planned(path) and "1 MiB are free here" in planned(path)
    assert "refused: memory of this machine: 1 MiB are free, and all roles as processes" in planned(path, here=True)
    monkeypatch.setattr(planning, "available_bytes", lambda: None)
    assert "refused" not in planned(path, here=True)


def test_a_folder_for_weights_in_files_has_to_be_there_if_all_roles_are_to_run_here(path: Path, tmp_path: Path) -> None:
    files = f"server.zero={{stage: 3, offload_param: nvme, nvme_path: {tmp_path / 'nowhere'}}}"
    assert "refused" not in planned(path, files)
    assert "refused: server.zero.nvme_path: " in planned(path, files, here=True)


def test_json_is_one_object(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_memory(load_recipe(path, ()), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert set(told["roles_mib"]) == {"client-0", "client-1", "edge", "cloud"}
