"""Servers whose frozen weights an engine holds compute what plain ones compute, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.engines.runs import ENGINES, MODES, SPREADING, differences, run, with_engine
from tests.grids import cases
from tests.processes import ROOT

FAST = {("zero cpu", "gpt2", "shared"), ("zero cpu", "llama", "tenants"), ("fsdp", "gemma", "shared")}
GRID = list(product(ENGINES, ("gpt2", "gemma", "llama"), MODES))


@pytest.mark.parametrize(("engine", "family", "mode"), cases(GRID, lambda *case: case in FAST))
def test_losses_and_adapters_are_those_of_the_plain_run(engine: str, family: str, mode: str) -> None:
    plain, other = run(with_engine(family, None, mode)), run(with_engine(family, engine, mode))
    assert differences(plain, other) == []


@pytest.mark.parametrize("mode", ["shared", pytest.param("tenants", marks=pytest.mark.system)])
@pytest.mark.parametrize("engine", SPREADING)
def test_losses_and_adapters_are_those_of_an_optimiser_that_is_not_spread(engine: str, mode: str) -> None:
    plain, other = run(with_engine("gpt2", None, mode)), run(with_engine("gpt2", engine, mode))
    assert differences(plain, other) == []


@pytest.mark.parametrize("engine", ["zero cpu", pytest.param("fsdp", marks=pytest.mark.system)])
def test_so_they_are_in_half_precision(engine: str) -> None:
    found = [run(with_engine("gemma", each, "recomputed", "bfloat16")) for each in (None, engine)]
    assert differences(*found) == []


@pytest.mark.parametrize("engine", ["zero cpu", "fsdp"])
def test_activations_are_counted_as_without_an_engine(engine: str) -> None:
    counted = []
    for each in (None, engine):
        *_, roles = run(with_engine("gpt2", each))
        counted.append([w.peak() for tier in ("edge", "cloud") for w in roles.workers[tier].values()])
    assert counted[0] == counted[1]


@pytest.mark.system
def test_two_ranks_hold_half_each_and_compute_the_same(tmp_path: Path) -> None:
    named = [f"{engine}/{family}/{mode}" for engine, family, mode in GRID if family != "llama"]
    named += [f"{engine}/gpt2/{mode}" for engine in SPREADING for mode in ("shared", "tenants")]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.engines.runs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *command, str(tmp_path), *named]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(found) == 2 * len(named)
    assert {name: text for name, text in found.items() if text != "equal"} == {}
