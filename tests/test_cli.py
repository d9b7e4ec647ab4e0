"""The command line: what each command calls, exit status, lines on stderr, and that no torch is loaded early."""

from __future__ import annotations

import errno
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import splitllm
from splitllm.cli import app
from splitllm.errors import CheckpointError, DataError, FamilyError, PeerError, RecipeError, RunInterrupted
from splitllm.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


def run(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment or None
    )


def lines(text: str) -> list[str]:
    return text.strip().split("\n")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Puts stand-ins where the commands lead; returns what they were called with."""
    made: list[Any] = []
    stand_ins: dict[str, dict[str, Any]] = {
        "splitllm.train": {"train": lambda recipe, **options: made.append((recipe, options))},
        "splitllm.preflight": {"prepare": lambda recipe: made.append(recipe) or recipe},
        "splitllm.plan": {"describe": lambda plan: ["fine", f"{plan.train.steps} steps"]},
        "splitllm.model.export": {"merge": lambda *arguments: made.append(arguments)},
        "splitllm.deployment.up": {"up": lambda *arguments, **options: made.append((*arguments, options))},
        "splitllm.deployment.plan": {"plan_memory": lambda recipe, **options: made.append((recipe, options))},
        "splitllm.deployment.logs": {"log_to_stdout": lambda role: None},
        "splitllm.deployment.run": {"run_role": lambda *arguments, **options: made.append((*arguments, options))},
    }
    for name, members in stand_ins.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return made


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    module = ModuleType("splitllm.train")
    module.__dict__["train"] = fail
    monkeypatch.setitem(sys.modules, "splitllm.train", module)


def test_train_hands_over_recipe_folder_and_resume(calls: list[Any]) -> None:
    done = run("train", QUICKSTART, "train.steps=50", "split.cuts=[1, 3]", "--output-dir", "out/x", "--resume")
    assert (done.exit_code, done.stderr) == (0, "")
    [(recipe, options)] = calls
    assert isinstance(recipe, Recipe)
    assert (recipe.train.steps, recipe.split.cuts) == (50, (1, 3))
    assert options == {"output_dir": Path("out/x"), "resume": True}


def test_options_may_stand_before_overrides_and_resume_is_off_by_default(calls: list[Any]) -> None:
    assert run("train", "--output-dir", "o", QUICKSTART, "train.optimizer.lr=2e-4").exit_code == 0
    [(recipe, options)] = calls
    assert recipe.train.optimizer.lr == 2e-4
    assert options["resume"] is False


def test_validate_prints_the_description(calls: list[Any]) -> None:
    done = run("validate", QUICKSTART, "train.steps=50")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "fine\n50 steps\n", "")
    assert [recipe.train.steps for recipe in calls] == [50]


def test_validate_reports_what_the_preflight_finds(calls: list[Any]) -> None:
    def refuse(recipe: Recipe) -> None:
        raise RecipeError(["first", "second"])

    sys.modules["splitllm.preflight"].__dict__["prepare"] = refuse
    done = run("validate", QUICKSTART)
    assert (done.exit_code, done.stdout, lines(done.stderr)) == (2, "", ["first", "second"])


def test_plan_hands_over_what_is_to_be_planned(calls: list[Any]) -> None:
    assert run("plan", "--memory", QUICKSTART, "train.batch_size=2", "--json").exit_code == 0
    [(recipe, options)] = calls
    assert recipe.train.batch_size == 2 and options == {"as_json": True, "here": False}


def test_plan_needs_to_be_told_of_what(calls: list[Any]) -> None:
    done = run("plan", QUICKSTART)
    assert (done.exit_code, lines(done.stderr), calls) == (
        2,
        ["plan: say what of; --memory is all there is so far"],
        [],
    )


def test_merge_hands_over_its_three_arguments(calls: list[Any]) -> None:
    assert run("merge", "out/a/adapter", "--base", "org/model", "--output-dir", "out/m").exit_code == 0
    assert calls == [(Path("out/a/adapter"), "org/model", Path("out/m"))]


@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_wrong_recipe_is_status_2_with_a_line_a_problem(calls: list[Any], command: str) -> None:
    folder = ["--output-dir", "o"] if command == "train" else []
    done = run(command, QUICKSTART, "train.stpes=5", "seed=-1", "broken", *folder)
    assert (done.exit_code, done.stdout, calls) == (2, "", [])
    assert [line.split(":")[0] for line in lines(done.stderr)] == ["override 'broken'", "seed", "train.stpes"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RecipeError(["one", "two"]), 2, "one\ntwo\n"),
        (DataError("rows.jsonl:3: no prompt"), 2, "rows.jsonl:3: no prompt\n"),
        (FamilyError("granite: not exact"), 2, "granite: not exact\n"),
        (CheckpointError("missing tensor"), 2, "missing tensor\n"),
        (PeerError("bad frame"), 1, "bad frame\n"),
        (RunInterrupted("stopped at step 3; go on with --resume"), 1, "stopped at step 3; go on with --resume\n"),
        (KeyboardInterrupt(), 1, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 1, "out/x: No space left on device\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device\n"),
        (OSError("cannot reach\nthe hub"), 1, "cannot reach the hub\n"),
        (ConnectionResetError(), 1, "ConnectionResetError\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_become_lines_and_a_status(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    failing(monkeypatch, error)
    done = run("train", QUICKSTART, "--output-dir", "o")
    assert (done.exit_code, done.stdout, done.stderr) == (status, "", message)


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError("a defect"))
    assert isinstance(run("train", QUICKSTART, "--output-dir", "o").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RecipeError(["all ranks see this"]), 2, ""),
        (RunInterrupted("stopped"), 1, ""),
        (OSError(errno.EACCES, "Permission denied", "x"), 1, "rank 1: x: Permission denied\n"),
    ],
)
def test_other_ranks_speak_only_of_their_own_trouble(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("splitllm.cli.FIRST_SPEAKS", 0.2)
    failing(monkeypatch, error)
    since = time.monotonic()
    done = run("train", QUICKSTART, "--output-dir", "o")
    assert (time.monotonic() - since >= 0.2) or status == 1, "else a launcher could end rank 0 before it has spoken"
    assert (done.exit_code, done.stderr) == (status, message)


def test_other_ranks_of_a_server_speak_of_machines_of_their_own(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RecipeError(["server.zero.nvme_path: /x is no folder"])

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys.modules["splitllm.deployment.run"], "run_role", fail)
    done = run("edge", str(ROOT / "recipes" / "deployment.yaml"), "--output-dir", "o")
    assert (done.exit_code, done.stderr) == (2, "rank 1: server.zero.nvme_path: /x is no folder\n")


@pytest.mark.parametrize(
    "words",
    [
        ("train", QUICKSTART),
        ("train", "--output-dir", "o"),
        ("merge", "a", "--output-dir", "o"),
        ("validate", QUICKSTART, "--nonsense"),
        ("nonsense",),
    ],
)
def test_a_wrong_command_line_is_status_2(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert done.stderr


@pytest.mark.parametrize("command", ["", "train", "validate", "merge", "up", "cloud", "edge", "client"])
def test_help_shows_examples_that_parse(calls: list[Any], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = run(*command.split(), "--help")
    assert done.exit_code == 0
    examples = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("splitllm ")]
    assert examples
    for example in examples:
        assert run(*shlex.split(example)[1:]).exit_code == 0, example
    assert len(calls) == len(examples)


def test_up_hands_over_recipe_folder_and_resume(calls: list[Any]) -> None:
    assert run("up", QUICKSTART, "train.steps=50", "--output-dir", "out/x", "--resume").exit_code == 0
    [(recipe, folder, options)] = calls
    assert (recipe.train.steps, folder, options) == (50, Path("out/x"), {"resume": True})


def test_a_role_is_given_its_name_and_where_to_listen(calls: list[Any]) -> None:
    listen = ("--listen", "0.0.0.0:7100", "--metrics", "7200", "--insecure")
    assert run("cloud", QUICKSTART, "--output-dir", "o", *listen).exit_code == 0
    assert run("edge", QUICKSTART, "--name", "edge-1", "--output-dir", "o", "--metrics", "[::1]:7200").exit_code == 0
    assert run("client", QUICKSTART, "--name", "client-3", "--output-dir", "o").exit_code == 0
    assert [(name, options) for _, name, _, options in calls] == [
        ("cloud", {"listen": "0.0.0.0:7100", "metrics": "127.0.0.1:7200", "insecure": True}),
        ("edge-1", {"listen": None, "metrics": "[::1]:7200", "insecure": False}),
        ("client-3", {"listen": None, "metrics": None, "insecure": False}),
    ]


@pytest.mark.parametrize("address", ["", "nowhere", "0", "70000", "host:port"])
def test_a_wrong_metrics_address_is_one_line(calls: list[Any], address: str) -> None:
    done = run("cloud", QUICKSTART, "--output-dir", "o", "--metrics", address)
    assert (done.exit_code, calls, done.stderr.count("\n")) == (2, [], 1)
    assert done.stderr.startswith("--metrics: ")


def test_certs_issues_what_is_missing_and_renews_what_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    words = ("certs", str(folder), QUICKSTART, "split.tiers={client: 2, cloud: 1}", "split.cuts=[2]")
    first = run(*words, "--days", "30")
    assert (first.exit_code, first.stderr) == (0, "")
    for name in ("client-0", "client-1", "cloud"):
        assert f"issued: {folder / name}, for the machine of {name}" in first.stdout
        assert {path.name for path in (folder / name).iterdir()} == {"ca.pem", "cert.pem", "key.pem"}
    assert f"keep {folder / 'ca.key'} here" in first.stdout

    keys = {name: (folder / name / "key.pem").read_bytes() for name in ("client-0", "client-1", "cloud")}
    assert "left as they are: client-0, client-1, cloud" in run(*words).stdout
    renewed = run(*words, "--renew", "client-1")
    assert "issued: " in renewed.stdout and "left as they are: client-0, cloud" in renewed.stdout
    changed = {name for name, key in keys.items() if (folder / name / "key.pem").read_bytes() != key}
    assert changed == {"client-1"}
    assert run(*words, "--renew-all").stdout.count("issued: ") == 3


@pytest.mark.parametrize("words", [("--renew", "edge-7"), ("--days", "0")])
def test_certs_refuses_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run("certs", str(tmp_path / "certs"), QUICKSTART, *words)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert not (tmp_path / "certs").exists()


def test_help_of_certs_shows_examples_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    shown = run("certs", "--help").stdout.splitlines()
    examples = [line.strip() for line in shown if line.strip().startswith("splitllm ")]
    assert examples
    for example in examples:
        assert run(*shlex.split(example)[1:]).exit_code == 0, example


def test_version_as_a_module() -> None:
    done = python("-m", "splitllm", "--version")
    assert (done.returncode, done.stdout) == (0, f"splitllm {splitllm.__version__}\n")


def test_the_process_ends_with_the_status_and_no_traceback(tmp_path: Path) -> None:
    done = python("-m", "splitllm", "train", "no.yaml", "--output-dir", str(tmp_path / "o"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "no.yaml: no such recipe file; check the path\n"
    assert not (tmp_path / "o").exists()


def test_a_defect_prints_no_locals(tmp_path: Path) -> None:
    code = (
        "import sys, types; secret = 'a private text'; module = types.ModuleType('splitllm.train')\n"
        "def train(recipe, **options):\n    row = secret\n    return 1 / 0\n"
        "module.train = train; sys.modules['splitllm.train'] = module\n"
        f"sys.argv = ['splitllm', 'train', {QUICKSTART!r}, '--output-dir', 'o']\n"
        "from splitllm.cli import main; main()\n"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "a private text" not in done.stderr


HEAVY = "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules)))"


@pytest.mark.parametrize("module", ["splitllm", "splitllm.cli", "splitllm.recipe", "splitllm.errors"])
def test_importing_is_light(module: str) -> None:
    assert python("-c", f"import sys, {module}; {HEAVY}").stdout == "[]\n"


def test_a_wrong_recipe_is_refused_before_torch_is_loaded() -> None:
    code = (
        f"import sys; from typer.testing import CliRunner; from splitllm.cli import app; {HEAVY.replace('print', '')}"
    )
    code += f"\nassert CliRunner().invoke(app, ['train', 'no.yaml', '--output-dir', 'o']).exit_code == 2; {HEAVY}"
    assert python("-c", code).stdout == "[]\n"


def test_names_resolve_lazily_and_unknown_ones_are_refused() -> None:
    assert {"Shard", "load_recipe", "train", "__version__"} <= set(dir(splitllm))
    from splitllm.recipe import load_recipe

    assert splitllm.load_recipe is load_recipe
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        splitllm.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "before", ["", "import splitllm.train", "from splitllm.train import other", "from splitllm import train"]
)
def test_train_is_the_function_whatever_was_imported_before(tmp_path: Path, before: str) -> None:
    (tmp_path / "train.py").write_text("def train(): return 'ran'\nother = 'module'\n")
    code = f"import splitllm; splitllm.__path__.insert(0, {str(tmp_path)!r})\n{before}\n"
    code += "from splitllm import train; import splitllm.train; from splitllm.train import other\n"
    code += "print(train(), splitllm.train(), other)"
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("ran ran module\n", "")
