"""The tree: who hangs on whom, on which process, and that replicas stay one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from splitllm.model.export import save_adapter
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import lora_config, matched_modules
from splitllm.recipe import Recipe, ScheduleRecipe, role_bounds
from splitllm.roles.assembly import Assembly, Roles, Site, _share, schedule_of, tenant_weights, token_weights
from splitllm.wire.message import Message
from tests.families import corpus, recipe, roles_of
from tests.test_exactness import adapter_of, one_step, with_moved_b

Wire = list[tuple[Message, Message]]
COUNTS = st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 50), min_size=1, max_size=4), min_size=1)


def tree(counts: list[int], cuts: list[int] | None = None) -> Recipe:
    names = ["client", *"abc"[: len(counts) - 2], "cloud"][: len(counts)]
    default = [2, 3, 4, 5][: len(counts) - 1]
    return recipe("gpt2", default if cuts is None else cuts, split={"tiers": dict(zip(names, counts, strict=True))})


def at(site: Site, wanted: Recipe, clients: int) -> Roles:
    base = Checkpoint(wanted.model.base)
    modules = matched_modules(base.config, None)
    return Assembly(wanted, corpus(clients, rows=2), base, modules, role_bounds(wanted, 6), lambda _: 1.0, site).build()


def parents(wire: Wire) -> dict[str, dict[int, int]]:
    """Tier -> child -> parent, by number, from who answered whom."""
    found: dict[str, dict[int, int]] = {}
    for message, reply in wire:
        tier, _, child = message.sender.partition("-")
        found.setdefault(tier, {})[int(child or 0)] = int(reply.sender.partition("-")[2] or 0)
    return found


@pytest.mark.parametrize(
    "counts", [[3], [5, 1], [5, 2, 1], [4, 4, 1], [7, 3, 1], [5, 4, 2, 1], [1, 1, 1, 1, 1]], ids=str
)
def test_children_hang_on_the_tier_above_side_by_side_and_evenly(counts: list[int], wire: Wire) -> None:
    roles = roles_of(tree(counts), corpus(counts[0], rows=2))
    one_step(roles)
    found = parents(wire)
    assert len(found) == max(1, len(counts) - 1)
    for tier, count, upper in zip(tree(counts).split.tiers, counts, [*counts[1:], 1], strict=False):
        above = found.get(tier, {0: 0})  # the top is nobody's child
        assert sorted(above) == list(range(count)), tier
        in_order = [above[child] for child in range(count)]
        assert in_order == sorted(in_order) and set(in_order) == set(range(upper))
        sizes = [in_order.count(parent) for parent in range(upper)]
        assert max(sizes) - min(sizes) <= 1
    assert {tier: len(workers) for tier, workers in roles.workers.items()} == tree(counts).split.tiers


@given(count=st.integers(0, 60), size=st.integers(1, 20))
def test_processes_share_the_replicas_exactly_evenly_and_in_order(count: int, size: int) -> None:
    shares = [_share(count, Site(rank, size)) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("counts", [[4], [4, 1], [6, 3, 1], [5, 2, 1], [6, 4, 3, 1]], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_client_is_on_exactly_one_process_with_its_whole_branch(counts: list[int], size: int) -> None:
    wanted = tree(counts)
    parts = [at(Site(rank, size), wanted, counts[0]) for rank in range(size)]
    assert sorted(client.index for part in parts for client in part.clients) == list(range(counts[0]))
    for tier, count in list(wanted.split.tiers.items())[:-1] or [("client", counts[0])]:
        held = [name for part in parts for name in part.workers.get(tier, {})]
        assert len(held) == len(set(held)) == count
    if len(counts) > 1:
        assert all(list(part.workers["cloud"]) == ["cloud"] for part in parts)


@pytest.mark.parametrize("labels", ["client", "cloud"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_replicas_stay_equal_to_the_bit(labels: str, dropout: float) -> None:
    changes = {"lora": {"rank": 4, "alpha": 8, "dropout": dropout}, "model": {"dtype": "float32"}}
    wanted = recipe("gpt2", [2, 4], labels, **changes, split={"tiers": {"client": 5, "edge": 2, "cloud": 1}})
    roles = roles_of(wanted, corpus(5, rows=7))
    before = adapter_of(roles)
    for step in range(3):
        one_step(roles, step)
    for tier in ("client", "edge"):
        first, *others = [worker.trainable.state() for worker in roles.workers[tier].values()]
        for other in others:
            assert all(torch.equal(other[name], tensor) for name, tensor in first.items())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in adapter_of(roles).items())


def test_replicas_share_frozen_weights_and_no_adapter() -> None:
    roles = roles_of(recipe("gpt2", [2, 4]), corpus(2))
    first, second = (worker.shard for worker in roles.workers["client"].values())
    shared = {p.data_ptr() for p in first.parameters()} & {p.data_ptr() for p in second.parameters()}
    assert shared == {p.data_ptr() for p in first.parameters() if not p.requires_grad}


def test_a_state_is_put_on_every_replica() -> None:
    roles, other = (roles_of(recipe("llama", [2, 4]), corpus(2)) for _ in range(2))
    for step in range(2):
        one_step(roles, step)
    state = {name: tensor.clone() for name, tensor in roles.state().items()}
    other.load(state)
    assert one_step(other, 2) == one_step(roles, 2)
    for tier, workers in roles.workers.items():
        for name, worker in workers.items():
            theirs = other.workers[tier][name].trainable.state()
            assert all(torch.equal(theirs[key], tensor) for key, tensor in worker.trainable.state().items())


def test_roles_may_start_from_an_adapter(tmp_path: Path) -> None:
    wanted = recipe("llama", [2, 4])
    adapter = with_moved_b(roles_of(wanted, corpus(2)))
    config = Checkpoint(wanted.model.base).config
    save_adapter(tmp_path / "adapter", adapter, lora_config(config, wanted.lora, ["q_proj", "v_proj"]))
    lora = {"rank": 4, "alpha": 8, "start_from": str(tmp_path / "adapter")}
    for cuts in ([], [1], [2, 4]):
        started = adapter_of(roles_of(recipe("llama", cuts, lora=lora), corpus(2)))
        assert set(started) == set(adapter)
        assert all(torch.equal(started[name], tensor) for name, tensor in adapter.items())


@given(COUNTS)
def test_by_token_every_label_weighs_the_same(counts: dict[int, list[int]]) -> None:
    weights, total = token_weights(counts), sum(map(sum, counts.values()))
    assert set(weights) == set(counts) and len(set(weights.values())) == 1
    weight = sum(weights[client] * sum(labels) for client, labels in counts.items())
    assert weight == pytest.approx(1.0 if total else 0.0)


@given(COUNTS)
def test_by_tenant_every_client_with_labels_weighs_the_same(counts: dict[int, list[int]]) -> None:
    weights = tenant_weights(counts)
    present = [client for client, labels in counts.items() if sum(labels)]
    for client, labels in counts.items():
        share = 1 / len(present) if client in present else 0.0
        assert weights[client] * sum(labels) == pytest.approx(share)
    assert {client for client, weight in weights.items() if weight} == set(present)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_the_schedule_is_transformers_own_as_a_function_of_the_step(name: str) -> None:
    ours = schedule_of(ScheduleRecipe(name=name, warmup_steps=3), 10)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs, rates = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=10), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert [ours(step) for step in range(10)] == pytest.approx(rates, abs=1e-15)
    assert ours(9) == ours(9)
