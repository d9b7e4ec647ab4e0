"""The folder of `splitllm up`: refusals at the start, what is written beside the recipe, what is copied at the end."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from splitllm.deployment.folder import check_use, collect, held, prepare
from splitllm.deployment.up import up
from splitllm.errors import CheckpointError, RecipeError
from splitllm.recipe import Recipe, changed_keys, fingerprint, host_and_port, load_recipe
from splitllm.wire.certificates import load_credentials

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(QUICKSTART)


def begun(folder: Path, recipe: Recipe) -> Path:
    prepare(recipe, folder, threads=1)
    (folder / "cloud" / "journal").mkdir(parents=True)
    (folder / "cloud" / "journal" / "step-0.safetensors").touch()
    return folder


def test_what_the_roles_are_given_is_the_same_run(tmp_path: Path, recipe: Recipe) -> None:
    deployed = load_recipe(prepare(recipe, tmp_path, threads=3))
    assert fingerprint(deployed) == fingerprint(recipe)
    changed = {line.partition(":")[0] for line in changed_keys(recipe, deployed)}
    assert changed == {"train.threads", "wire.addresses", "wire.certificates"}
    assert deployed.train.threads == 3
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_every_role_gets_a_certificate_and_every_server_a_free_port(tmp_path: Path, recipe: Recipe) -> None:
    wire = load_recipe(prepare(recipe, tmp_path, threads=1)).wire
    for name in ("client-0", "client-3", "edge-1", "cloud"):
        assert wire.certificates is not None
        assert load_credentials(Path(wire.certificates), name).name == name
    assert set(wire.addresses) == {"edge-0", "edge-1", "cloud"}
    assert len(set(wire.addresses.values())) == 3
    for address in wire.addresses.values():
        with socket.socket() as probe:
            probe.bind(host_and_port(address))


def test_certificates_of_the_recipe_are_used_and_none_are_made(tmp_path: Path, recipe: Recipe) -> None:
    given = load_recipe(QUICKSTART, ["wire.certificates=/somewhere/certs"])
    assert load_recipe(prepare(given, tmp_path, threads=1)).wire.certificates == "/somewhere/certs"
    assert not (tmp_path / "certs").exists()


def test_a_second_start_keeps_the_certificates(tmp_path: Path, recipe: Recipe) -> None:
    prepare(recipe, tmp_path, threads=1)
    key = (tmp_path / "certs" / "cloud" / "key.pem").read_bytes()
    prepare(recipe, tmp_path, threads=1)
    assert (tmp_path / "certs" / "cloud" / "key.pem").read_bytes() == key


def test_a_folder_with_a_run_needs_resume(tmp_path: Path, recipe: Recipe) -> None:
    begun(tmp_path, recipe)
    with pytest.raises(RecipeError, match=r"holds a run; add --resume"):
        check_use(recipe, tmp_path, resume=False)
    check_use(recipe, tmp_path, resume=True)


def test_a_start_that_failed_leaves_a_folder_that_can_be_used(tmp_path: Path, recipe: Recipe) -> None:
    prepare(recipe, tmp_path, threads=1)
    (tmp_path / "cloud.log").touch()
    (tmp_path / "edge-1").mkdir()
    check_use(recipe, tmp_path, resume=False)
    check_use(recipe, tmp_path, resume=True)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(CheckpointError, match=r"holds no run; start it without --resume"):
        check_use(recipe, tmp_path, resume=True)
    (tmp_path / "letters").mkdir()
    with pytest.raises(RecipeError, match=r"is not empty; name a new folder"):
        check_use(recipe, tmp_path, resume=False)


def test_another_recipe_cannot_go_on_but_where_it_writes_may_change(tmp_path: Path, recipe: Recipe) -> None:
    begun(tmp_path, recipe)
    check_use(load_recipe(QUICKSTART, ["train.threads=2", "train.log_every=5"]), tmp_path, resume=True)
    with pytest.raises(RecipeError, match=r"--resume: the recipe is not that of .*: seed: 0 -> 1"):
        check_use(load_recipe(QUICKSTART, ["seed=1"]), tmp_path, resume=True)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "up"
    with held(folder), pytest.raises(RecipeError, match=r"another splitllm up runs in .*up"), held(folder):
        raise AssertionError("both have it")
    with held(folder):
        assert folder.is_dir()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="is a file; name a folder"):
        check_use(load_recipe(QUICKSTART), tmp_path / "file", resume=False)


def test_nothing_is_made_where_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run; start it without --resume"):
        up(load_recipe(QUICKSTART), tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_what_the_top_left_is_copied_again_and_again(tmp_path: Path) -> None:
    top = tmp_path / "cloud"
    (top / "adapter").mkdir(parents=True)
    (top / "metrics.jsonl").write_text("{}\n")
    for number in (1, 2):
        (top / "adapter" / "adapter_config.json").write_text(str(number))
        (top / "summary.json").write_text(json.dumps({"n": number}))
        assert collect(top, tmp_path) == {"n": number}
        assert (tmp_path / "adapter" / "adapter_config.json").read_text() == str(number)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"cloud", "adapter", "metrics.jsonl", "summary.json"}
