"""What does not fit is refused, and only what was worked out to fit is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config

from splitllm.model.lora import matched_modules
from splitllm.policy.admission import MIB
from splitllm.recipe import Recipe
from splitllm.roles.fitting import (
    FILES,
    Needs,
    apart_needs,
    device_needs,
    needs_of_limits,
    role_needs,
    shortage,
    together_needs,
)
from splitllm.roles.ledger import Ledger
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
    value = r"(?:\[[^]]*\]|\{[^}]*\}|\S+)"
    pairs = re.findall(rf"((?:[\w.]+={value}(?: with )?)+) \(([\d,]+) MiB\)", advice)
    changes = [{k: yaml.safe_load(v) for k, v in re.findall(rf"([\w.]+)=({value})", said)} for said, _ in pairs]
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


WIDE = GPT2Config(n_layer=12, n_embd=512, n_head=4, n_positions=64, vocab_size=61)
STAGE_3 = {"stage": 3, "offload_param": "cpu"}
IN_FILES = {"stage": 3, "offload_param": "nvme", "nvme_path": FILES}
FEW: dict[str, Any] = {"dtype": "float32", "train": {"batch_size": 2, "accumulate": 1}, "lora": {"dropout": 0.0}}


def wide(recipe: Recipe) -> Ledger:
    return Ledger(recipe, WIDE, matched_modules(WIDE, None), PROCESS)


def refused_wide(recipe: Recipe, needs: Needs = needs_of_limits) -> list[dict[str, Any]]:
    """What is offered for a model of which a matrix is a file's worth."""
    [line] = shortage(recipe, WIDE, matched_modules(WIDE, None), wide(recipe), needs)
    for changes, mib in offers(line):
        [need] = needs(other := changed(recipe, changes), wide(other))
        assert need.fits and -(-need.needed // MIB) == mib, changes
    return [changes for changes, _ in offers(line)]


def test_of_a_device_short_of_memory_weights_and_optimisers_are_offered_a_place_in_host_memory() -> None:
    asked = wanted(**FEW)
    room = wide(changed(asked, {"server.zero": STAGE_3})).of("cloud").on_device
    found = refused_wide(asked, device_needs("cloud", room, "memory of cuda:0"))
    assert {"server.zero": STAGE_3} in found and {"server.zero": IN_FILES} not in found
    optimizer = {"stage": 2, "offload_optimizer": "cpu"}
    room = wide(changed(asked, {"server.zero": optimizer})).of("cloud").on_device
    assert {"server.zero": optimizer} in refused_wide(asked, device_needs("cloud", room, "memory of cuda:0"))


def test_of_a_host_short_of_memory_weights_are_offered_a_place_in_files() -> None:
    limit = -(-wide(wanted(**FEW, server={"zero": IN_FILES})).of("cloud").total // MIB)
    for server in ({}, {"zero": {"stage": 1}}):
        found = refused_wide(wanted(**FEW, server=server, split={"memory_mib": {"cloud": limit}}))
        assert {"server.zero": IN_FILES} in found and {"server.zero": STAGE_3} not in found


def test_two_processes_are_offered_where_one_of_them_would_fit() -> None:
    asked = wanted(**FEW)
    spread = changed(asked, {"server.processes": 2, "server.fsdp": True})
    needed = wide(spread).of("cloud").on_device
    assert {"server.processes": 2, "server.fsdp": True} in refused_wide(asked, device_needs("cloud", needed, "here"))
    [line] = shortage(
        spread, WIDE, matched_modules(WIDE, None), wide(spread), device_needs("cloud", needed - 1, "here")
    )
    assert "and rank 0 of the 2 of cloud would take" in line and "server.processes=4 (" in line
    together = wide(asked).together.on_device - 2**20
    offered = refused_wide(asked, device_needs(None, together, "memory of cuda"))
    assert offered and not any("server.processes" in changes for changes in offered), "train has one process"


def test_all_processes_of_a_role_have_to_fit_where_they_are() -> None:
    asked = wanted(**FEW, server={"processes": 3})
    found = wide(asked)
    needed = [sum(parts.total - PROCESS for parts in found.processes("edge-0")[:count]) for count in (1, 2, 3)]
    for count, elsewhere in ((3, 0), (2, 1), (1, 2)):
        needs = role_needs("edge-0", needed[count - 1] - 1, "here", elsewhere)
        [need] = needs(asked, found)
        assert need.needed == needed[count - 1] and not need.fits
        assert ("the 3 processes of edge-0" in need.what) == (elsewhere == 0)


@pytest.mark.parametrize(
    "beside",
    [
        {"dtype": "float64"},
        {"quantization": {"edge": "nf4"}, "dtype": "bfloat16"},
        {"lora": {"dora": True}},
        {"train": {"mixed_precision": "bf16", "batch_size": 2}},
    ],
)
def test_no_engine_is_offered_that_the_recipe_does_not_go_with(beside: dict[str, Any]) -> None:
    asked = wanted("llama", **({"dtype": "float32"} | beside))
    needed = ledger(asked, "llama", PROCESS).of("edge-0").on_device
    for share in (0.5, 0.95):
        [line] = refused(asked, device_needs("edge-0", int(share * needed), "memory of cuda:0"))
        assert "stage: 3" not in line
