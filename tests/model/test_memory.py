"""Prices: the parts that a role and its tenants turn out to hold, and nothing twice."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitllm.model.loading import Checkpoint
from splitllm.model.lora import adapter_parameters, add_lora, matched_modules
from splitllm.model.memory import (
    Price,
    activation_bytes,
    recomputed_bytes,
    role_price,
    shard_bytes,
    tenant_price,
    work_of,
)
from splitllm.model.shard import Shard
from splitllm.model.trainable import Trainable
from splitllm.recipe import OptimizerRecipe, Recipe, clients_below, role_bounds
from splitllm.roles.assembly import Assembly
from splitllm.roles.worker import Worker
from tests.families import CONFIGS, LAYERS, TARGETS, checkpoint_folder, corpus, recipe, roles_of
from tests.grids import counts

CPU = torch.device("cpu")


@cache
def modules_of(family: str) -> list[str]:
    return matched_modules(Checkpoint(checkpoint_folder(family)).config, TARGETS.get(family))


def stepped(trainable: Trainable) -> Trainable:
    """After its first step, when the optimiser has its state."""
    parameters = trainable.parameters.items()
    trainable.apply({name: torch.ones_like(parameter) for name, parameter in parameters}, 1.0, 1.0)
    return trainable


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 4), (3, 6), (1, 1)])
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_those_of_the_shard(family: str, start: int, stop: int, head: bool) -> None:
    checkpoint = Checkpoint(checkpoint_folder(family))
    shard = Shard.cut(checkpoint, start, stop, head=head, dtype=torch.bfloat16)
    held = Worker(shard, Trainable({}, OptimizerRecipe()), CPU).peak()["weights"]
    assert shard_bytes(checkpoint.config, start, stop, head, torch.bfloat16) == held


def asked(family: str, adapters: str = "shared", dtype: str = "float32", **lora: Any) -> Recipe:
    """Two clients cut at 2 and 3, two edges up to block 4, a cloud."""
    return recipe(
        family,
        [2, 4],
        dtype=dtype,
        split={"client_cuts": {"client-1": 3}},
        lora={"adapters": adapters, **lora},
        train={"batch_size": 2, "in_flight": 2},
        data={"max_length": 8},
    )


def priced(family: str, adapters: str = "shared", server: str = "edge-0", client: int = 0, **options: Any) -> Price:
    config = Checkpoint(checkpoint_folder(family)).config
    return tenant_price(asked(family, adapters), config, modules_of(family), server, client, **options)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "phi3"])
def test_a_role_holds_its_shard_adapter_and_optimiser(family: str, dtype: str, dora: bool) -> None:
    wanted, checkpoint = asked(family, dtype=dtype, dora=dora), Checkpoint(checkpoint_folder(family))
    shard = Shard.cut(checkpoint, 2, 4, dtype=getattr(torch, dtype))
    add_lora(shard, wanted.lora, modules_of(family), 0)
    peak = Worker(shard, stepped(Trainable(adapter_parameters(shard), OptimizerRecipe())), CPU).peak()
    price = role_price(wanted, checkpoint.config, modules_of(family), "edge-0")
    assert price.weights == peak["weights"]
    assert price.adapter + price.optimizer == peak["adapter and optimiser"]
    assert price.gradients == price.adapter == sum(p.nbytes for p in adapter_parameters(shard).values()) > 0
    assert price.activations == price.messages == 0


@pytest.mark.parametrize("adapters", ["shared", "per_client", "common"])
@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_a_run_holds_what_is_priced(labels: str, adapters: str) -> None:
    """Every role of a real run: weights, its adapter, those of its tenants, and their optimisers."""
    wanted = recipe(
        "gpt2",
        [2, 4],
        labels=labels,
        split={"client_cuts": {"client-1": 3}},
        lora={"adapters": adapters, "clients": {"client-1": {"rank": 2}} if adapters == "per_client" else {}},
    )
    config, modules = Checkpoint(checkpoint_folder("gpt2")).config, modules_of("gpt2")
    roles = roles_of(wanted, corpus(2))
    for workers in roles.workers.values():
        for name, worker in workers.items():
            for trainable in (worker.trainable, *worker.own.values()):
                stepped(trainable)
            peak, price = worker.peak(), role_price(wanted, config, modules, name)
            tenants = [] if name.startswith("client") else clients_below(wanted, name)
            own = [tenant_price(wanted, config, modules, name, client) for client in tenants]
            assert price.weights == peak["weights"]
            assert sum(p.adapter + p.optimizer for p in (price, *own)) == peak["adapter and optimiser"], name


def test_what_clients_at_their_own_pace_hold_is_priced_with_a_copy_for_each() -> None:
    wanted = recipe(
        "gpt2",
        [2, 4],
        split={"tiers": {"client": 2, "edge": 1, "cloud": 1}, "client_cuts": {"client-1": 3}},
        lora={"adapters": "common"},
        server={"batching": "continuous"},
    )
    checkpoint, modules = Checkpoint(checkpoint_folder("gpt2")), modules_of("gpt2")
    layers = checkpoint.config.num_hidden_layers
    assembly = Assembly(
        wanted, corpus(2), checkpoint, modules, role_bounds(wanted, layers), lambda step: 1.0, lanes=True
    )
    worker = assembly.worker(1, 0)
    assert worker.common is not None
    for trainable in (worker.common.trainable, *worker.own.values()):
        stepped(trainable)
    own = [tenant_price(wanted, checkpoint.config, modules, "edge", client) for client in range(2)]
    price = role_price(wanted, checkpoint.config, modules, "edge")
    lent = sum(p.nbytes for copy in worker.lent.values() for p in copy.parameters.values())
    assert (
        sum(p.adapter + p.optimizer for p in (price, *own)) == worker.peak()["adapter and optimiser"] + lent > lent > 0
    )
    mine = sum(p.nbytes for trainable in worker.own.values() for p in trainable.parameters.values())
    assert sum(p.gradients for p in own) == mine + lent


def test_a_total_is_the_sum_of_its_parts() -> None:
    price = priced("llama", "per_client")
    assert price.total == sum(astuple(price)) > 0
    assert Price().total == 0


def test_a_tenant_with_a_shared_adapter_adds_activations_and_messages_only() -> None:
    price = priced("llama")
    assert price == Price(activations=price.activations, messages=4 * 2 * 8 * 32 * 4)
    assert price.activations > 0


def test_a_client_holds_the_micro_batches_it_has_in_flight() -> None:
    config, modules = Checkpoint(checkpoint_folder("llama")).config, modules_of("llama")
    price = role_price(asked("llama"), config, modules, "client-1")
    assert price.activations == 2 * activation_bytes(config, work_of(asked("llama"), config, modules, 0, 3))
    assert price.messages == 2 * 2 * 2 * 8 * 32 * 4


def test_micro_batches_in_flight_are_all_held_and_the_adapter_once() -> None:
    one, three = priced("llama", "per_client"), priced("llama", "per_client", in_flight=3)
    assert three == replace(one, activations=3 * one.activations, messages=3 * one.messages)


def test_a_deeper_cut_is_cheaper_for_the_edge_and_the_same_for_the_cloud() -> None:
    shallow, deep = priced("llama", "per_client", client=0), priced("llama", "per_client", client=1)
    assert 0 < deep.adapter < shallow.adapter and 0 < deep.activations < shallow.activations
    assert priced("llama", "common", "cloud", 0) == priced("llama", "common", "cloud", 1)


def test_checkpointing_keeps_less_and_one_block_comes_back() -> None:
    plain, config, modules = asked("gemma3"), Checkpoint(checkpoint_folder("gemma3")).config, modules_of("gemma3")
    saving = plain.model_copy(update={"train": plain.train.model_copy(update={"activation_checkpointing": True})})
    work = work_of(saving, config, modules, 0, LAYERS)
    again = recomputed_bytes(config, work)
    assert again > activation_bytes(config, work) / LAYERS
    assert activation_bytes(config, replace(work, checkpointing=False)) > 3 * again
    assert recomputed_bytes(config, replace(work, checkpointing=False)) == 0
    price = tenant_price(saving, config, modules, "edge-0", 0, in_flight=2)
    at_edge = work_of(saving, config, modules, 2, 4)
    assert price.activations == 2 * activation_bytes(config, at_edge) + recomputed_bytes(config, at_edge)


@pytest.mark.parametrize("count", counts(3, 10))
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_more_rows_or_tokens_never_cost_less(family: str, count: int) -> None:
    @settings(max_examples=count)
    @given(st.integers(1, 4), st.integers(1, 12))
    def check(rows: int, length: int) -> None:
        price = priced(family, rows=rows, length=length).total
        assert price < priced(family, rows=rows + 1, length=length).total
        assert price < priced(family, rows=rows, length=length + 1).total

    check()
