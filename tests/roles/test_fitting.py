"""What does not fit is refused, and only what was worked out to fit is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from splitllm.policy.admission import MIB
from splitllm.recipe import Recipe
from splitllm.roles.fitting import (
    Needs,
    apart_needs,
    device_needs,
    needs_of_limits,
    role_needs,
    shortage,
    together_needs,
)
from tests.grids import counts
from tests.roles.test_ledger import ledger, model, wanted

PROCESS = 50 * MIB
LARGE: dict[str, Any] = {"train": {"batch_size": 16, "in_flight": 2}, "data": {"max_length": 64}}


def large(**limits: int) -> Recipe:
    return wanted("llama", split={"memory_mib": limits}, **LARGE)


def refused(recipe: Recipe, needs: Needs = needs_of_limits) -> list[str]:
    return shortage(recipe, *model("llama"), ledger(recipe, "llama", PROCESS), needs)


def total(recipe: Recipe, name: str) -> int:
    return ledger(recipe, "llama", PROCESS).of(name).total


def offers(line: str) -> list[tuple[dict[str, Any], int]]:
    """Changes and MiB, as a line names them."""
    advice = line.partition("what would fit: ")[2]
    pairs = re.findall(r"((?:[\w.]+=(?:\[[^]]*\]|\S+)(?: with )?)+) \(([\d,]+) MiB\)", advice)
    changes = [{k: yaml.safe_load(v) for k, v in re.findall(r"([\w.]+)=(\[[^]]*\]|\S+)", said)} for said, _ in pairs]
    return list(zip(changes, [int(mib.replace(",", "")) for _, mib in pairs], strict=True))


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        section, last = key.split(".")
        values[section][last] = value
    return Recipe.model_validate(values)


def test_what_fits_to_the_byte_is_not_refused_and_a_mebibyte_less_is() -> None:
    mib = -(-total(large(client=1), "client-0") // MIB)
    assert refused(large(client=mib)) == []
    [line] = refused(large(client=mib - 1))
    assert line.startswith(f"split.memory_mib.client: {mib - 1} MiB do not hold client-0, which takes {mib} (")
    assert "what would fit: " in line and offers(line)


@pytest.mark.parametrize("count", counts(2, 10))
def test_all_that_is_named_fits_with_the_figure_beside_it(count: int) -> None:
    @settings(max_examples=count)
    @given(st.sampled_from(["client", "edge", "cloud"]), st.floats(0.4, 0.99))
    def check(tier: str, share: float) -> None:
        name = {"client": "client-0", "edge": "edge-0", "cloud": "cloud"}[tier]
        least = large(**{tier: 1})
        limit = int((PROCESS + share * (total(least, name) - PROCESS)) / MIB)
        asked = large(**{tier: limit})
        lines = refused(asked)
        for changes, mib in [offer for line in lines for offer in offers(line)]:
            takes = total(changed(asked, changes), name)
            assert takes <= limit * MIB and -(-takes // MIB) == mib

    check()


def test_every_tier_that_is_short_is_named_with_its_own_figures() -> None:
    limits = {"client": 56, "cloud": 60}
    asked = large(**limits)
    lines = refused(asked)
    assert [line.partition(":")[0] for line in lines] == ["split.memory_mib.client", "split.memory_mib.cloud"]
    for line, tier in zip(lines, limits, strict=True):
        for changes, mib in offers(line):
            name = {"client": "client-0"}.get(tier, tier)
            assert -(-total(changed(asked, changes), name) // MIB) == mib <= limits[tier]


def test_where_nothing_fits_it_says_how_little_would_do() -> None:
    [line] = refused(large(client=50))
    assert "nothing that was tried fits: " in line and line.endswith(" MiB of 50") and not offers(line)


def test_a_shallower_cut_helps_a_client_and_stays_a_cut() -> None:
    deep = {"tiers": {"client": 1, "cloud": 1}, "cuts": [5], "memory_mib": {"client": 1}}
    asked = wanted("llama", cuts=(5,), split=deep, train={"batch_size": 64, "activation_checkpointing": True})
    half = wanted("llama", cuts=(3,), split={**deep, "cuts": [3]}, train=asked.train.model_dump(mode="json"))
    limit = -(-total(half, "client") // MIB)
    asked = changed(asked, {"split.memory_mib": {"client": limit}})
    cuts = [changes["split.cuts"] for line in refused(asked) for changes, _ in offers(line) if "split.cuts" in changes]
    assert all(1 <= cut[0] < 5 for cut in cuts)


def test_all_roles_in_one_process_need_what_they_hold_beside_what_is_there() -> None:
    asked = large()
    parts = ledger(asked, "llama", PROCESS).together
    needed = parts.total - PROCESS
    assert refused(asked, together_needs(needed, "memory of this machine")) == []
    [line] = refused(asked, together_needs(needed - 1, "memory of this machine"))
    assert line.startswith("memory of this machine: ") and "all roles in one process would take" in line


def test_one_role_and_all_roles_as_processes_are_compared_with_what_is_free() -> None:
    asked = large()
    found = ledger(asked, "llama", PROCESS)
    assert refused(asked, role_needs("cloud", found.of("cloud").total - PROCESS, "here")) == []
    assert refused(asked, role_needs("cloud", found.of("cloud").total - PROCESS - 1, "here"))
    assert (
        refused(asked, apart_needs(found.apart, "here")) == [] != refused(asked, apart_needs(found.apart - 1, "here"))
    )


def test_on_a_device_only_what_lies_there_counts() -> None:
    asked = large()
    parts = ledger(asked, "llama", PROCESS).of("edge-0")
    assert refused(asked, device_needs("edge-0", parts.on_device, "memory of cuda:0")) == []
    assert refused(asked, device_needs("edge-0", parts.on_device - 1, "memory of cuda:0"))
    assert (
        refused(asked, device_needs(None, ledger(asked, "llama", PROCESS).together.on_device, "memory of cuda")) == []
    )


def test_fewer_bits_are_offered_where_they_will_do() -> None:
    limit: dict[str, Any] = {"dtype": "bfloat16", "split": {"memory_mib": {"edge": 60}}}
    packed = wanted("llama", quantization={"edge": "nf4"}, **limit)
    process = 60 * MIB - ledger(packed, "llama").of("edge-0").total
    short = wanted("llama", **limit)
    lines = shortage(short, *model("llama"), ledger(short, "llama", process), needs_of_limits)
    assert lines and all("quantization.edge=nf4 (60 MiB)" in line for line in lines)
