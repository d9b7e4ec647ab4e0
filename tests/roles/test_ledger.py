"""The ledger: what roles turn out to hold, part by part, and what it is at most where that depends on the run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config

from splitllm.model.heads import logits_bytes
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import block_of, matched_modules
from splitllm.model.memory import activation_bytes, hidden_bytes, recomputed_bytes, work_of
from splitllm.model.randomness import MicroBatchId
from splitllm.model.trainable import OrderedSum
from splitllm.policy.admission import MIB
from splitllm.recipe import Recipe, clients_below, full_blocks
from splitllm.roles.ledger import PARTS, Ledger, Parts
from tests.families import TARGETS, checkpoint_folder, corpus, recipe, roles_of
from tests.grids import counts
from tests.model.test_memory import stepped

PROCESS = 100 * MIB


@cache
def model(family: str) -> tuple[Any, list[str]]:
    config = Checkpoint(checkpoint_folder(family)).config
    return config, matched_modules(config, TARGETS.get(family))


def ledger(wanted: Recipe, family: str = "gpt2", process: int = 0) -> Ledger:
    config, modules = model(family)
    full = full_blocks(wanted, config.num_hidden_layers)
    return Ledger(wanted, config, [name for name in modules if block_of(config, name) not in full], process)


def wanted(family: str = "gpt2", labels: str = "cloud", cuts: tuple[int, ...] = (2, 4), **changes: Any) -> Recipe:
    """Two clients, two edges, a cloud; short rows."""
    data = {"source": "unused", "max_length": 8, **changes.pop("data", {})}
    return recipe(family, list(cuts), labels, data=data, **changes)


ROUNDS = {"replicas": "local", "cloud_every": 2, "edge_every": 1}
HOLDING: dict[str, dict[str, Any]] = {
    "shared": {},
    "per client": {"lora": {"adapters": "per_client", "clients": {"client-1": {"rank": 2}}}},
    "common": {"lora": {"adapters": "common"}},
    "client cuts": {"split": {"client_cuts": {"client-1": 3}}, "lora": {"adapters": "per_client"}},
    "labels stay": {"labels": "client"},
    "dora": {"lora": {"dora": True}},
    "sgd": {"train": {"optimizer": {"name": "sgd"}}},
    "bf16": {"dtype": "bfloat16"},
    "local": {"rounds": ROUNDS},
    "one tier": {"cuts": ()},
    "in full": {"train": {"full_tiers": ["edge", "cloud"]}},
}


@pytest.mark.parametrize("case", HOLDING)
def test_weights_adapters_and_optimisers_are_those_of_a_run(case: str) -> None:
    asked = wanted(**HOLDING[case])
    roles, found = roles_of(asked, corpus(2)), ledger(asked)
    for workers in roles.workers.values():
        for name, worker in workers.items():
            trained = [stepped(each) for each in (worker.trainable, *worker.own.values()) if each.parameters]
            parts = found.of(name)
            adapters = sum(p.nbytes for each in trained for p in each.parameters.values())
            assert parts.weights == worker.peak()["weights"], name
            waits = case == "in full" and not name.startswith("client")
            at_once = 2 * len(clients_below(asked, name)) if waits else 1
            assert parts.adapters == parts.gradients / at_once == adapters, name
            assert parts.adapters + parts.optimizer == worker.peak()["adapter and optimiser"], name


@pytest.mark.parametrize("batching", ["none", "synchronous"])
def test_weights_that_train_have_a_gradient_for_each_micro_batch_that_waits_for_its_turn(batching: str) -> None:
    train = {"full_tiers": ["cloud"], "accumulate": 3}
    parts = ledger(wanted(train=train, server={"batching": batching})).of("cloud")
    ids = [MicroBatchId(0, client, number) for client in range(2) for number in range(3)]
    gradient = torch.zeros(7)
    waiting = OrderedSum(ids)
    for each in reversed(ids[1:]):
        waiting.add([each], {"weight": gradient.clone()})
    assert parts.gradients == (len(waiting._early) + 1) * parts.adapters


def test_what_trains_goes_up_when_the_run_ends() -> None:
    adapters, full = ledger(wanted()), ledger(wanted(train={"full_tiers": ["edge"]}))
    at_edge = full.of("edge-0").adapters
    assert at_edge > 10 * adapters.of("edge-0").adapters
    assert full.of("cloud").messages >= 2 * 2 * at_edge, "of two edges, as bytes and as tensors"
    assert full.of("client-0").messages == adapters.of("client-0").messages


def test_replicas_in_one_process_share_their_weights_and_nothing_else() -> None:
    found = ledger(wanted(), process=PROCESS)
    client, edge, cloud = (found.of(name) for name in ("client-0", "edge-0", "cloud"))
    assert found.together.weights == client.weights + edge.weights + cloud.weights
    assert found.together.adapters == 2 * client.adapters + 2 * edge.adapters + cloud.adapters
    assert found.together.process == client.process == PROCESS
    assert found.apart == sum(parts.total for parts in found.roles().values()) > found.together.total
    assert [(tier, names) for tier, names, _ in found.alike()] == [
        ("client", ["client-0", "client-1"]),
        ("edge", ["edge-0", "edge-1"]),
        ("cloud", ["cloud"]),
    ]


ENGINES: dict[str, dict[str, Any]] = {
    "parts": {"zero": {"stage": 3}},
    "host": {"zero": {"stage": 3, "offload_param": "cpu"}},
    "fsdp": {"fsdp": True},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_told_where_an_engine_holds_them(engine: str) -> None:
    asked = wanted(dtype="float32", server=ENGINES[engine])
    roles, found, plain = roles_of(asked, corpus(2)), ledger(asked), ledger(wanted(dtype="float32"))
    for workers in roles.workers.values():
        for name, worker in workers.items():
            parts, whole = found.of(name), plain.of(name)
            assert parts.weights + parts.offloaded == worker.peak()["weights"] == whole.weights, name
            on_host = engine == "host" and not name.startswith("client")
            assert (parts.offloaded > 0.9 * whole.weights) == on_host or name == "cloud"
            assert (parts.scratch > whole.scratch) == (not name.startswith("client"))
    assert found.files() == {}


def test_weights_in_files_are_in_no_memory() -> None:
    sizes = {"n_layer": 6, "n_embd": 512, "n_head": 4, "n_positions": 64, "vocab_size": 61}
    config = GPT2Config(**sizes)
    modules = matched_modules(config, None)
    zero = {"zero": {"stage": 3, "offload_param": "nvme", "nvme_path": "/files"}}
    plain, found = (Ledger(wanted(dtype="float32", server=server), config, modules, 0) for server in ({}, zero))
    matrices, largest = 12 * 512 * 512 * 4, 4 * 512 * 512 * 4  # of a block, all of them and one
    assert found.files() == {"edge-0": 2 * matrices, "edge-1": 2 * matrices, "cloud": 2 * matrices}
    for name in found.files():
        assert found.of(name).weights == plain.of(name).weights - 2 * matrices
        assert found.of(name).offloaded == 2 * largest, "buffers"
        assert found.of(name).scratch == plain.of(name).scratch + largest
        assert found.of(name).total - found.of(name).process < plain.of(name).total
    assert found.together.weights + 4 * matrices == plain.together.weights
    assert found.of("client-0") == plain.of("client-0")


def test_in_one_process_every_role_has_its_own_state_in_host_memory() -> None:
    zero = {"zero": {"stage": 2, "offload_optimizer": "cpu"}}
    found = ledger(wanted(dtype="float32", server=zero))
    assert found.together.offloaded == sum(found.of(name).offloaded for name in ("edge-0", "edge-1", "cloud")) > 0


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_spread_optimiser_is_told_with_its_part_of_the_adapter(offload: str) -> None:
    asked = wanted(dtype="float32", server={"zero": {"stage": 2, "offload_optimizer": offload}})
    roles, found = roles_of(asked, corpus(2)), ledger(asked)
    for name in ("edge-0", "cloud"):
        worker, parts = roles.workers[name.split("-")[0]][name], found.of(name)
        told = parts.adapters + parts.optimizer + parts.offloaded
        assert told == pytest.approx(worker.peak()["adapter and optimiser"], rel=0.02)
        assert (parts.offloaded > 0) == (offload == "cpu")


def graph(asked: Recipe, start: int, stop: int, family: str = "gpt2") -> int:
    config, modules = model(family)
    return activation_bytes(config, work_of(asked, config, modules, start, stop))


def test_a_cloud_with_the_labels_has_one_graph_and_an_edge_that_of_every_client() -> None:
    one_edge = {"tiers": {"client": 2, "edge": 1, "cloud": 1}}
    asked = wanted(split=one_edge, train={"in_flight": 2, "accumulate": 3})
    found = ledger(asked)
    assert found.of("client-0").activations == 2 * graph(asked, 0, 2)
    assert found.of("edge").activations == 2 * 2 * graph(asked, 2, 4)
    assert found.of("cloud").activations == graph(asked, 4, 6)
    kept = ledger(wanted(labels="client", split=one_edge, train={"in_flight": 2, "accumulate": 3}))
    assert kept.of("cloud").activations == 2 * 2 * graph(asked, 4, 6)


def test_no_more_is_under_way_than_a_step_has() -> None:
    assert ledger(wanted(train={"in_flight": 9, "accumulate": 2})).of("client-0").activations == 2 * graph(
        wanted(), 0, 2
    )


def test_in_one_process_clients_take_turns_unless_they_wait_for_one_another() -> None:
    alone = ledger(wanted(train={"accumulate": 1}))
    branch = graph(wanted(), 0, 2) + graph(wanted(), 2, 4) + graph(wanted(), 4, 6)
    assert alone.together.activations == branch
    for changes in ({"train": {"in_flight": 2}}, {"server": {"batching": "synchronous"}}):
        together = ledger(wanted(**changes)).together.activations
        assert together == (1 + ("train" in changes)) * 2 * branch


def test_checkpointing_keeps_inputs_and_one_block() -> None:
    asked = wanted(cuts=(), train={"activation_checkpointing": True})
    config, modules = model("gpt2")
    work = work_of(asked, config, modules, 0, 6)
    saving, plain = ledger(asked).of("client-0"), ledger(wanted(cuts=())).of("client-0")
    assert saving.activations == activation_bytes(config, work) + recomputed_bytes(config, work) < plain.activations / 2
    assert replace(saving, activations=0) == replace(plain, activations=0)


@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_only_the_role_with_the_loss_holds_logits(labels: str) -> None:
    asked = wanted(labels=labels)
    config, _ = model("gpt2")
    for name, parts in ledger(asked).roles().items():
        has_head = name.startswith("client" if labels == "client" else "cloud")
        rows = asked.train.batch_size * asked.data.max_length
        assert parts.logits == (logits_bytes(config, rows, torch.float64) if has_head else 0), name


def test_messages_grow_with_children_and_shrink_with_codecs() -> None:
    long = {"max_length": 64}
    plain, coded = ledger(wanted(data=long)), ledger(wanted(data=long, wire={"up": "int8", "down": "bf16"}))
    assert plain.of("cloud").messages > plain.of("edge-0").messages > plain.of("client-0").messages > 0
    for name in ("client-0", "edge-0", "cloud"):
        assert coded.of(name).messages < plain.of(name).messages
    config, _ = model("gpt2")
    hidden = hidden_bytes(wanted(data=long), config)
    assert plain.of("client-0").messages >= 3 * hidden


def test_what_codecs_carry_on_is_bounded_by_the_rows_and_by_the_recipe() -> None:
    some = ledger(wanted(wire={"down": "int4"})).of("edge-0").messages
    rows = 5 * 2 * 3 * 8 * 32 * 4  # steps, accumulate, rows, tokens, width, two bf16 numbers
    assert some - ledger(wanted(wire={"down": "int4", "feedback_mib": 0})).of("edge-0").messages == rows
    none = ledger(wanted(wire={"down": "int8"})).of("client-0")
    assert ledger(wanted(wire={"down": "int4"})).of("client-0").messages <= none.messages


def test_a_limit_of_the_tier_leaves_the_allocator_no_holes() -> None:
    free, limited = ledger(wanted()), ledger(wanted(split={"memory_mib": {"client": 800}}))
    assert limited.of("client-0") == replace(free.of("client-0"), allocator=0) != free.of("client-0")
    assert limited.of("edge-0") == free.of("edge-0")


def test_parts_make_the_total_on_the_device_and_beside_it() -> None:
    parts = Parts(**{part: 2**number for number, part in enumerate(PARTS)})
    assert parts.total == 2 ** len(PARTS) - 1
    beside = parts.process + parts.offloaded + parts.messages + parts.journal + parts.allocator
    assert parts.on_device == parts.total - beside


@pytest.mark.parametrize("count", counts(2, 8))
def test_more_rows_or_tokens_never_take_less(count: int) -> None:
    @settings(max_examples=count)
    @given(st.integers(1, 5), st.integers(2, 12), st.sampled_from(["client", "cloud"]))
    def check(rows: int, length: int, labels: str) -> None:
        def totals(rows: int, length: int) -> list[int]:
            asked = wanted("llama", labels, train={"batch_size": rows}, data={"max_length": length})
            found = ledger(asked, "llama")
            return [found.together.total, *(parts.total for parts in found.roles().values())]

        for more in (totals(rows + 1, length), totals(rows, length + 1)):
            assert all(a <= b for a, b in zip(totals(rows, length), more, strict=True))

    check()


def test_a_quantised_tier_holds_less_and_takes_one_weight_whole_for_a_moment() -> None:
    half = {"dtype": "bfloat16"}
    before, after = (
        ledger(wanted("llama", **half, **q), "llama").of("edge-0") for q in ({}, {"quantization": {"edge": "nf4"}})
    )
    assert after.weights < before.weights and after.scratch > before.scratch
    assert after.adapters == before.adapters


IN_TWO: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero 1": {"zero": {"stage": 1}},
    "zero 2 in host memory": {"zero": {"stage": 2, "offload_optimizer": "cpu"}},
    "zero 3": {"zero": {"stage": 3}},
    "zero 3 in host memory": {"zero": {"stage": 3, "offload_param": "cpu"}},
    "fsdp": {"fsdp": True},
}


@pytest.mark.parametrize("engine", IN_TWO)
def test_a_rank_holds_its_part_of_what_an_engine_spreads(engine: str) -> None:
    one, two = (
        ledger(wanted(dtype="float32", lora={"dropout": 0.0}, server={"processes": count, **IN_TWO[engine]}))
        for count in (1, 2)
    )
    for name in ("edge-0", "cloud"):
        alone, (rank_0, rank_1) = one.of(name), two.processes(name)
        assert rank_0 == two.of(name)
        assert rank_0.adapters == rank_1.adapters == rank_0.gradients == alone.adapters
        weights, optimizer = alone.weights + alone.offloaded, alone.optimizer
        half = engine in ("zero 3", "zero 3 in host memory", "fsdp")
        if not engine.startswith("zero 2"):  # where the state is in the host's memory, too
            assert (
                (0.5 if half else 1) * weights <= rank_0.weights + rank_0.offloaded < (0.6 if half else 1.01) * weights
            )
        if engine == "zero 1":
            assert rank_0.optimizer == rank_1.optimizer == -(-optimizer // 2)
        elif engine == "zero 2 in host memory":
            assert rank_0.offloaded == rank_1.offloaded == -(-alone.offloaded // 2)
        else:
            assert rank_0.optimizer == optimizer and rank_1.optimizer == 0
    assert two.of("client-0") == one.of("client-0") and len(two.processes("client-0")) == 1


def test_each_rank_has_its_rows_and_rank_0_alone_the_head_and_the_clients() -> None:
    rows = {"train": {"batch_size": 4, "accumulate": 1}, "lora": {"dropout": 0.0}}
    one, two = (ledger(wanted(server={"processes": count}, **rows), process=PROCESS) for count in (1, 2))
    for name in ("edge-0", "cloud"):
        alone, (rank_0, rank_1) = one.of(name), two.processes(name)
        assert rank_0.activations == rank_1.activations == alone.activations // 2
        assert rank_0.scratch == rank_1.scratch < 0.6 * alone.scratch
        assert rank_0.logits == alone.logits and rank_0.journal == alone.journal
        assert (rank_1.logits, rank_1.journal, rank_1.rounds) == (0, 0, 0)
        assert rank_0.messages > alone.messages > rank_1.messages > 0
        assert rank_0.process == rank_1.process == PROCESS
    assert two.together == one.together, "splitllm train has one process for all roles"
    assert two.apart == sum(parts.total for name in two.roles() for parts in two.processes(name))


def test_micro_batches_of_which_something_is_dropped_stay_whole() -> None:
    rows = {"train": {"batch_size": 4, "accumulate": 1}, "lora": {"dropout": 0.1}}
    one, two = (ledger(wanted(server={"processes": count, "fsdp": True}, **rows)) for count in (1, 2))
    assert two.of("edge-0").activations == one.of("edge-0").activations
    assert two.of("edge-0").scratch == one.of("edge-0").scratch
