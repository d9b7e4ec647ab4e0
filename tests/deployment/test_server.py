"""What a server says of a recipe before it serves it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from splitllm.deployment.server import _say_what_is_left_out
from splitllm.recipe import load_recipe
from tests.tiny import write_recipe


def test_what_only_splitllm_train_does_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_recipe(tmp_path)
    with caplog.at_level(logging.INFO, "splitllm"):
        _say_what_is_left_out(load_recipe(path))
        assert not caplog.records
        _say_what_is_left_out(load_recipe(path, ["train.verify_adapter=true", "train.trackers=[tensorboard]"]))
    fields = [vars(record)["fields"] for record in caplog.records]
    assert [said["key"] for said in fields] == ["train.verify_adapter", "train.trackers"]
