"""Logs: one JSON object a line where they are collected, plain text for people."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitllm.deployment.logs import JsonLines, PlainLines, log_to_stdout


def record(message: str, fields: dict[str, Any] | None = None, *, failed: bool = False) -> logging.LogRecord:
    error = None
    if failed:
        try:
            raise ValueError("broken")
        except ValueError:
            error = sys.exc_info()
    made = logging.LogRecord("splitllm.x", logging.INFO, __file__, 1, message, None, error)
    if fields is not None:
        made.fields = fields
    return made


@pytest.fixture
def package() -> Iterator[logging.Logger]:
    logger = logging.getLogger("splitllm")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield logger
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_a_json_line_has_time_level_role_event_and_fields() -> None:
    said = json.loads(JsonLines("edge-0").format(record("step", {"step": 3, "loss": 0.5})))
    assert datetime.fromisoformat(said.pop("time")).tzinfo is not None
    assert said == {"level": "info", "role": "edge-0", "event": "step", "step": 3, "loss": 0.5}


@given(st.text(), st.dictionaries(st.text(), st.text() | st.floats() | st.integers() | st.lists(st.text())))
def test_whatever_is_said_is_one_line(event: str, fields: dict[str, Any]) -> None:
    line = JsonLines("edge-0").format(record(event.replace("%", ""), fields))
    assert len(line.splitlines()) == 1
    json.loads(line)


def test_a_value_that_json_has_not_is_said_in_words() -> None:
    assert json.loads(JsonLines("cloud").format(record("done", {"adapter": Path("a/b")})))["adapter"] == "a/b"


def test_a_defect_keeps_its_traceback() -> None:
    said = json.loads(JsonLines("cloud").format(record("internal error", failed=True)))
    assert said["traceback"].endswith("ValueError: broken")
    assert PlainLines("cloud").format(record("internal error", failed=True)).endswith("ValueError: broken")


def test_people_read_short_lines() -> None:
    line = PlainLines("edge-0").format(record("step", {"step": 3, "loss": 0.123456}))
    assert line[8:] == " edge-0: step  step 3  loss 0.1235"
    assert PlainLines("edge-0").format(record("complete"))[8:] == " edge-0: complete"


def test_only_this_package_is_logged_to_stdout_as_json_where_there_is_no_terminal(
    package: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    log_to_stdout("client-1")
    log_to_stdout("client-2")  # replaces the first
    logging.getLogger("splitllm.wire.sessions").info("connected", extra={"fields": {"child": "x"}})
    logging.getLogger("splitllm").debug("not said")
    logging.getLogger("other").warning("not ours")
    said = capsys.readouterr()
    assert [json.loads(line)["role"] for line in said.out.splitlines()] == ["client-2"]
    log_to_stdout("client-1", as_json=False)
    package.info("complete")
    assert capsys.readouterr().out.endswith(" client-1: complete\n")
