import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from splitllm.errors import CheckpointError
from splitllm.metrics import Metrics, Tracker, human_bytes, read_records


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def writer(directory: Path, *, steps: int = 10, tracker: Tracker | None = None) -> Metrics:
    return Metrics(directory, steps=steps, console=quiet(), tracker=tracker)


def log_steps(metrics: Metrics, first: int, last: int) -> None:
    for step in range(first, last + 1):
        metrics.log("train", step=step, loss=1 / step, tokens=100, seconds=0.5, bytes_up=1000, bytes_down=500)


def events(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_each_event_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with writer(tmp_path / "run") as metrics:
        metrics.log("eval", step=0, loss=3.5, tokens=40)
        assert events(tmp_path / "run") == [{"event": "eval", "step": 0, "loss": 3.5, "tokens": 40}]
        log_steps(metrics, 1, 2)
        assert [event["event"] for event in events(tmp_path / "run")] == ["eval", "train", "train"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(tmp_path: Path, value: float) -> None:
    with writer(tmp_path) as metrics:
        metrics.log("train", step=1, loss=value, nested={"list": [value, 2.0]}, note=None, name="nan")
        metrics.write_summary({"eval_loss_after": value})
    (event,) = events(tmp_path)
    assert event == {
        "event": "train",
        "step": 1,
        "loss": None,
        "nested": {"list": [None, 2.0]},
        "note": None,
        "name": "nan",
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == {"eval_loss_after": None}


def test_a_value_that_is_no_json_is_refused_and_leaves_no_half_line(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        log_steps(metrics, 1, 1)
        with pytest.raises(TypeError, match="not JSON serializable"):
            metrics.log("train", step=2, loss=object())
    assert [event["step"] for event in events(tmp_path)] == [1]


def test_resume_drops_later_steps_and_a_half_written_last_line(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.log("start", world=1)
        metrics.log("eval", step=0, loss=3.5, tokens=40)
        log_steps(metrics, 1, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 6, "lo')
    with writer(tmp_path) as metrics:
        kept = metrics.truncate_to(3)
        assert kept == events(tmp_path)
        assert [event.get("step") for event in kept] == [None, 0, 1, 2, 3]
        log_steps(metrics, 4, 6)
    assert [event.get("step") for event in events(tmp_path)] == [None, 0, 1, 2, 3, 4, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_half_written_line_goes_even_when_its_step_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 1}\n{"event": "train", "step": 2}')
    assert writer(tmp_path).truncate_to(5) == [{"event": "train", "step": 1}]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"event": "train", "step": 1}\n'


def test_truncation_works_while_the_file_is_open(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        log_steps(metrics, 1, 4)
        metrics.truncate_to(2)
        log_steps(metrics, 3, 3)
    assert [event["step"] for event in events(tmp_path)] == [1, 2, 3]


def test_nothing_to_truncate_makes_no_file(tmp_path: Path) -> None:
    assert writer(tmp_path / "run").truncate_to(3) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", [b'{"event": "tr', b"[1, 2]", b'{"step": 2}', b"\xff\xfe", b""])
def test_a_broken_line_inside_the_file_is_named_and_the_file_left_alone(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"event": "train", "step": 1}\n' + broken + b'\n{"event": "train", "step": 3}\n'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: .*remove this line"):
        writer(tmp_path).truncate_to(1)
    assert path.read_bytes() == content


@given(cut=st.integers(min_value=0, max_value=10_000))
def test_a_crash_at_any_byte_loses_at_most_one_event(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    directory = tmp_path_factory.mktemp("crash")
    with writer(directory) as metrics:
        log_steps(metrics, 1, 5)
    whole = (directory / "metrics.jsonl").read_bytes()
    left = whole[: cut % (len(whole) + 1)]
    (directory / "metrics.jsonl").write_bytes(left)
    kept = writer(directory).truncate_to(5)
    assert [record["step"] for record in kept] == list(range(1, left.count(b"\n") + 1))
    assert read_records(directory / "metrics.jsonl") == kept


def test_the_summary_replaces_the_old_one_whole(tmp_path: Path) -> None:
    metrics = writer(tmp_path / "run")
    metrics.write_summary({"train_tokens": 1})
    metrics.write_summary({"train_tokens": 2, "versions": {"torch": "2.13.0"}})
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {
        "train_tokens": 2,
        "versions": {"torch": "2.13.0"},
    }
    with pytest.raises(TypeError):
        metrics.write_summary({"train_tokens": object()})
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train_tokens"] == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["summary.json"]


def test_other_ranks_leave_no_trace(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 9}\n')
    console, calls = quiet(), []
    with Metrics(
        tmp_path, steps=9, enabled=False, console=console, tracker=lambda values, step: calls.append(step)
    ) as metrics:
        log_steps(metrics, 1, 3)
        metrics.say("hello")
        metrics.write_summary({"a": 1})
        assert metrics.truncate_to(0) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert [event["step"] for event in events(tmp_path)] == [9]
    assert calls == []
    assert console.file.getvalue() == ""


def test_the_tracker_gets_the_finite_numbers_of_training_and_evaluation(tmp_path: Path) -> None:
    seen: list[tuple[dict[str, float], int]] = []
    with writer(tmp_path, tracker=lambda values, step: seen.append((values, step))) as metrics:
        metrics.log("train", step=3, loss=2.0, tokens=7, lr=math.nan, done=True, note="x", per_client={"a": 1})
        metrics.log("eval", step=3, loss=1.5, tokens=4)
        metrics.log("round", number=1)
    assert seen == [({"train/loss": 2.0, "train/tokens": 7.0}, 3), ({"eval/loss": 1.5, "eval/tokens": 4.0}, 3)]


def test_without_a_terminal_plain_lines_come_now_and_then(tmp_path: Path) -> None:
    console, now = quiet(), [0.0]
    metrics = Metrics(tmp_path, steps=100, console=console, plain_seconds=10, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] = float(step)
        log_steps(metrics, step, step)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in [1, *range(11, 100, 10), 100]]
    assert lines[-1] == "step 100/100  loss 0.0100  200 tokens/s  up 97.7 KiB, down 48.8 KiB"
    assert "\x1b" not in console.file.getvalue()


def test_long_plain_lines_are_not_broken_and_text_is_not_read_as_markup(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=20)
    text = "wrote [bold]out/a-long-path/checkpoints/step-50[/bold]; go on with --resume"
    Metrics(tmp_path, steps=1, console=console).say(text)
    assert console.file.getvalue() == text + "\n"


def test_on_a_terminal_one_line_is_rewritten_and_what_is_said_stays_above(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, legacy_windows=False, _environ={})
    with Metrics(tmp_path, steps=3, console=console) as metrics:
        metrics.log("train", step=1, loss=2.0, lr=2e-4, clients=4, tokens=100, seconds=0.5, bytes_up=2048, bytes_down=0)
        metrics.say("checkpoint 1")
        log_steps(metrics, 2, 3)
        metrics.log("eval", step=3, loss=1.25, tokens=10)
    written = console.file.getvalue()
    assert "step 1/3  loss 2.0000  lr 2.00e-04  200 tokens/s  up 2.0 KiB, down 0 B  4 clients" in written
    assert written.count("\x1b[2K") >= 3
    assert (
        written.index("checkpoint 1") < written.index("step 2/3") < written.index("evaluation at step 3: loss 1.2500")
    )
    assert written.rindex("step 3/3") > written.index("evaluation at step 3")


def test_a_resumed_run_goes_on_counting_bytes(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        log_steps(metrics, 1, 4)
    console = quiet()
    with Metrics(tmp_path, steps=3, console=console) as metrics:
        metrics.truncate_to(2)
        log_steps(metrics, 3, 3)
    assert "up 2.9 KiB, down 1.5 KiB" in console.file.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5 * 1024**3, "5.0 GiB"),
        (2048 * 1024**5, "2048.0 PiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text
