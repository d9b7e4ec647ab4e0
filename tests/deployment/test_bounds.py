"""What is let in fits every message of a healthy run, and not much more; activations fit into the memory allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from splitllm.deployment.bounds import allowed, in_flight, limits, micro_batch_bytes
from splitllm.model.memory import activation_bytes, work_of
from splitllm.model.trainable import Trainable
from splitllm.policy.admission import MIB
from splitllm.recipe import role_names
from splitllm.wire.codecs import codec, pack
from splitllm.wire.frames import payload_bytes
from tests.families import corpus, recipe
from tests.roles.test_checks import LONGEST, plan_of, wanted
from tests.roles.tree import Tree

LORA = {"rank": 4, "alpha": 8}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "dora": {"lora": {**LORA, "dora": True}},
    "rank 1": {"lora": {"rank": 1, "alpha": 8}},
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_the_states_of_all_adapters_fit_and_not_much_more_would(family: str, case: str) -> None:
    plan = plan_of(wanted(family, [2, 4], "cloud", **CASES[case]), corpus(2))
    tree, states = Tree(plan.recipe, corpus(2, rows=4)), dict[str, torch.Tensor]()
    for past in tree.pasts.values():
        trainable: Trainable = past.worker.trainable
        trainable.apply({name: torch.zeros_like(p) for name, p in trainable.parameters.items()}, 1.0, 1.0)
        states.update(trainable.state())
    found, bound = payload_bytes({name: pack(tensor, "none") for name, tensor in states.items()}), limits(plan)
    assert found <= bound.payload_bytes <= max(2 * found, micro_batch_bytes(plan))
    assert len(states) <= bound.tensors <= 2 * len(states)


def test_a_client_may_send_no_more_because_servers_train_in_full() -> None:
    adapters = plan_of(recipe("gpt2", [2, 4], "cloud"), corpus(2))
    full = plan_of(recipe("gpt2", [2, 4], "cloud", train={"full_tiers": ["edge", "cloud"]}), corpus(2))
    to_edge, to_cloud, anywhere = (limits(full, stop).payload_bytes for stop in (2, 4, None))
    assert to_edge <= limits(adapters).payload_bytes < to_cloud < anywhere


@pytest.mark.parametrize("case", ["plain", "fp32", "bf16"])
@pytest.mark.parametrize("name", ["none", "bf16", "int8", "int4"])
def test_the_largest_micro_batch_fits_in_any_codec(case: str, name: str) -> None:
    plan = plan_of(wanted("gpt2", [2, 4], "cloud", **CASES[case]), corpus(2))
    rows, dtype = plan.recipe.train.batch_size, torch.float64 if case == "plain" else torch.float32
    hidden = torch.zeros(rows * LONGEST, plan.config.hidden_size, dtype=dtype)
    index = torch.zeros(rows * LONGEST, dtype=torch.int32)
    packed = {"hidden_TD": pack(hidden, codec(name).name), "positions_N": pack(index, "none")}
    packed |= {"targets_N": pack(index, "none"), "position_ids_BS": pack(index.view(rows, LONGEST), "none")}
    assert payload_bytes(packed) <= micro_batch_bytes(plan) <= limits(plan).payload_bytes
    if name == "none":
        assert payload_bytes(packed) == micro_batch_bytes(plan)


@pytest.mark.parametrize("memory_mib", [1, 2, 3, 8, 64])
def test_what_is_under_way_fits_into_the_memory_allowed_or_is_one(memory_mib: int) -> None:
    data = {"source": "unused", "max_length": 512}
    train = {"steps": 1, "batch_size": 4, "accumulate": 16, "in_flight": 16}
    plan = plan_of(recipe("gpt2", [2, 4], data=data, train=train, wire={"memory_mib": memory_mib}), corpus(2))
    for server, clients, start, stop in (("cloud", 2, 4, 6), ("edge-0", 1, 2, 4)):
        count = in_flight(plan, server)
        graph = activation_bytes(plan.config, work_of(plan.recipe, plan.config, plan.modules, start, stop))
        held = clients * (2 * micro_batch_bytes(plan) + graph)
        assert 1 <= count <= 16 and (count == 1 or count * held <= memory_mib * MIB)
        assert count == 16 or (count + 1) * held > memory_mib * MIB


TREES = {
    "2 tiers": ([2], {"client": 3, "cloud": 1}, {"cloud": {0}}, {"cloud": set()}),
    "3 tiers": ([2, 4], {"client": 4, "edge": 2, "cloud": 1}, {"cloud": {0, 1}, "edge-1": {0}}, {}),
    "lone edge": ([2, 4], {"client": 2, "edge": 1, "cloud": 1}, {"cloud": {0}}, {"cloud": {1}}),
    "5 tiers": (
        [1, 2, 3, 4],
        {"client": 4, "a": 2, "b": 1, "c": 1, "cloud": 1},
        {"cloud": {0, 1}, "c": {0, 1}, "a-0": {0}},
        {"cloud": {2, 3}, "c": {2}, "b": set(), "a-0": set()},
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_tiers_with_replicas_send_sums_and_lone_ones_norms(name: str) -> None:
    cuts, tiers, summed, normed = TREES[name]
    plan = plan_of(wanted("gpt2", cuts, "cloud", split={"tiers": tiers}), corpus(tiers["client"]))
    for server, below in [*summed.items(), *normed.items()]:
        bounds, wanted_tiers = allowed(plan, server), summed if (server, below) in summed.items() else normed
        found = [child.summed if wanted_tiers is summed else child.normed for child in bounds.children.values()]
        names = {tensor for tensors in found for tensor in tensors}
        blocks = {block for tier in below for block in range(*plan.bounds[tier])}
        assert {int(tensor.split(".")[4]) for tensor in names} == blocks


def test_a_child_speaks_for_all_below_it_and_for_nobody_else() -> None:
    plan = plan_of(wanted("gpt2", [2, 4], "cloud", split={"tiers": {"client": 4, "edge": 2, "cloud": 1}}), corpus(4))
    children = allowed(plan, "cloud").children
    assert {name: dict(child.clients) for name, child in children.items()} == {
        "edge-0": {0: "client-0", 1: "client-1"},
        "edge-1": {2: "client-2", 3: "client-3"},
    }
    assert children["edge-1"].roles == {"edge-1": "edge", "client-2": "client", "client-3": "client"}
    below = allowed(plan, "edge-0").children
    assert {name: child.roles for name, child in below.items()} == {
        name: {name: "client"} for name in role_names(plan.recipe)["client"][:2]
    }
