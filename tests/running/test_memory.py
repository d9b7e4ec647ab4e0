"""The ledger as it is printed: one row a kind of role, a column for each part that is there, and as JSON."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from splitllm.policy.admission import MIB
from splitllm.roles.ledger import PARTS, Parts
from splitllm.running.memory import TOGETHER, announced, as_json, compared, lines_of, mib_of, rows_of, show
from tests.roles.test_ledger import PROCESS, ledger, wanted

PLAIN = ledger(wanted(), process=PROCESS)


def test_replicas_that_hold_as_much_share_a_row() -> None:
    assert list(rows_of(PLAIN)) == ["client x2", "edge x2", "cloud", TOGETHER]


def test_roles_of_a_tier_that_differ_have_rows_of_their_own() -> None:
    asked = wanted(split={"tiers": {"client": 3, "edge": 1, "cloud": 1}, "client_cuts": {"client-1": 3}})
    assert list(rows_of(ledger(asked))) == ["client-0, client-2 x2", "client-1", "edge", "cloud", TOGETHER]


def test_of_a_server_in_several_processes_rank_0_and_each_other_have_rows() -> None:
    asked = ledger(wanted(server={"processes": 3, "fsdp": True}), process=PROCESS)
    ranks = ["edge x2, rank 0 of 3", "edge x2, each other rank", "cloud, rank 0 of 3", "cloud, each other rank"]
    assert list(rows_of(asked)) == ["client x2", *ranks, TOGETHER]
    told = as_json(asked, None)
    assert set(told["each_other_rank_mib"]) == {"edge-0", "edge-1", "cloud"}
    assert told["each_other_rank_mib"]["cloud"]["total"] < told["roles_mib"]["cloud"]["total"]
    several = sum(3 * told["roles_mib"][name]["total"] for name in ("edge-0", "edge-1", "cloud"))
    assert told["all_processes_mib"] < several + 2 * told["roles_mib"]["client-0"]["total"]
    assert as_json(PLAIN, None)["each_other_rank_mib"] == {}


def test_a_narrow_console_still_shows_whole_numbers() -> None:
    console = Console(file=(text := io.StringIO()), width=40)
    show(PLAIN, console, "memory:")
    title, heading, *rows = text.getvalue().splitlines()
    assert title == "memory:" and heading.split()[0] == "MiB" and heading.split()[-1] == "total"
    assert "…" not in text.getvalue() and len(rows) == 4
    assert rows[0].split()[-1] == f"{PLAIN.of('client-0').total / MIB:,.0f}"


def test_parts_that_nobody_has_get_no_column() -> None:
    heading = lines_of(rows_of(PLAIN))[0].split()
    assert "rounds" not in heading and "weights" in heading
    heading = lines_of({"a": Parts(rounds=MIB)})[0].split()
    assert heading == ["MiB", "rounds", "total"]


def test_in_one_process_the_interpreter_is_counted_once() -> None:
    title, heading, *rows = announced(PLAIN)
    column = heading.index("process")
    cells = [row[column : column + len("process")].strip() for row in rows]
    assert title == "memory, predicted:" and cells == ["", "", "", "100"]


def test_json_has_every_role_and_all_of_them() -> None:
    told = json.loads(json.dumps(as_json(PLAIN, 5 * MIB)))
    assert list(told["roles_mib"]) == ["client-0", "client-1", "edge-0", "edge-1", "cloud"]
    assert told["free_here_mib"] == 5.0 and as_json(PLAIN, None)["free_here_mib"] is None
    assert told["all_processes_mib"] == pytest.approx(sum(r["total"] for r in told["roles_mib"].values()), abs=0.5)
    assert set(told["in_one_process_mib"]) <= {*PARTS, "total"}


def test_what_is_not_there_is_not_named() -> None:
    assert mib_of(Parts(weights=3 * MIB)) == {"weights": 3.0, "total": 3.0}


def test_a_comparison_says_by_how_much_it_was_off() -> None:
    assert compared(1100.0, 1000.0) == "1,100 MiB predicted, 1,000 measured (+10 %)"
