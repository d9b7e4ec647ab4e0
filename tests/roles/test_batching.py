"""Batched equals alone, through whole roles: every gradient of a step, whatever shares a batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from splitllm.data.corpus import Corpus
from splitllm.model.joined import Rows
from splitllm.model.randomness import MicroBatchId
from splitllm.model.trainable import Trainable
from splitllm.recipe import Recipe
from splitllm.roles.assembly import Roles
from splitllm.roles.worker import TENANT, Ask, Worker
from tests.families import LAYERS, corpus, recipe, roles_of
from tests.grids import cases, fast_if, in_turn
from tests.test_exactness import check, gradients, one_step, with_moved_b
from tests.unsplit import Unsplit

LABELS = ["client", "cloud"]
SYNCHRONOUS = {"batching": "synchronous"}


def wanted(family: str, cuts: list[int], labels: str, clients: int, dtype: str, **changes: Any) -> Any:
    names = {1: ["client", "cloud"], 2: ["client", "edge", "cloud"]}[len(cuts)]
    counts = [clients, *([max(1, clients // 2)] if len(cuts) == 2 else []), 1]
    train = {"batch_size": 2, "accumulate": 2, "clip_norm": None, **changes.pop("train", {})}
    split = {"tiers": dict(zip(names, counts, strict=True)), **changes.pop("split", {})}
    lora = {"rank": 4, "alpha": 8, "dropout": 0.2, **changes.pop("lora", {})}
    return recipe(family, cuts, labels, dtype, split=split, train=train, lora=lora, **changes)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Micro-batches in each forward of a server."""
    seen: list[int] = []
    forward = Worker.forward

    def note(self: Worker, asks: Any) -> Any:
        if self.shard.embeddings is None:
            seen.append(len(asks))
        return forward(self, asks)

    monkeypatch.setattr(Worker, "forward", note)
    return seen


TOLERANCES = {"float64": 1e-12, "float32": 1e-5}


def few_clients_or_a_diagonal(clients: int, family: str, labels: str, dtype: str) -> bool:
    """Of 16 clients two cases, in which every family, place and dtype is met once; the rest is left to the soak."""
    return clients == 3 or (family == "llama") == (labels == "cloud") == (dtype == "float32")


@pytest.mark.parametrize(
    ("clients", "family", "labels", "dtype"),
    cases(product((3, 16), ("gemma3", "llama"), LABELS, TOLERANCES), few_clients_or_a_diagonal, "soak"),
)
def test_a_shared_adapter_learns_from_a_batch_what_it_learns_one_by_one(
    clients: int,
    family: str,
    labels: str,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    batches: list[int],
) -> None:
    found = {}
    for batching in ("none", "synchronous"):
        roles = roles_of(
            wanted(family, [2, 4], labels, clients, dtype, server={"batching": batching}), corpus(clients, 5)
        )
        with_moved_b(roles)
        found[batching] = gradients(roles, monkeypatch)
        assert max(batches) == 1 if batching == "none" else max(batches) > clients // 4
        batches.clear()
    check(found["synchronous"], found["none"], TOLERANCES[dtype])


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("labels", ["client", "cloud"])
def test_a_small_budget_makes_smaller_batches_of_the_same_gradients(
    labels: str, in_flight: int, monkeypatch: pytest.MonkeyPatch, batches: Any
) -> None:
    found = []
    for tokens in (1, 60, 4096):
        server = {"batching": "synchronous", "tokens": tokens}
        train = {"in_flight": in_flight, "accumulate": 3}
        roles = roles_of(wanted("llama", [3], labels, 5, "float64", server=server, train=train), corpus(5, 7))
        with_moved_b(roles)
        found.append(gradients(roles, monkeypatch))
        assert max(batches) in {1: [1], 60: [2, 3, 4], 4096: [5]}[tokens]
        batches.clear()
    check(found[0], found[2], 1e-12)
    check(found[1], found[2], 1e-12)


def test_the_same_recipe_makes_the_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for _ in range(2):
        roles = roles_of(wanted("gpt2", [2, 4], "cloud", 6, "float32", server=SYNCHRONOUS), corpus(6))
        with_moved_b(roles)
        found.append(gradients(roles, monkeypatch)[1])
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


MIXED = {"client_cuts": {"client-1": 3, "client-2": 1}}


def one_batching_in_turn(cuts: list[int], family: str, labels: str, batching: str) -> bool:
    return in_turn(len(cuts), family == "gpt2", labels == "client", batching == "none")


@pytest.mark.parametrize(
    ("cuts", "family", "labels", "batching"),
    cases(product(([2], [2, 5]), ("gpt2", "gemma3"), LABELS, ("none", "synchronous")), one_batching_in_turn),
)
def test_clients_cut_at_different_layers_train_the_unsplit_model(
    cuts: list[int], family: str, labels: str, batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a block that some clients hold and an edge too, all of them have the same adapter."""
    settings = wanted(family, cuts, labels, 4, "float64", split=MIXED, server={"batching": batching})
    roles = roles_of(settings, corpus(4, 5))
    expected = Unsplit(settings, corpus(4, 5), with_moved_b(roles)).gradients(0)
    check(gradients(roles, monkeypatch), expected, 1e-12)


def personal(roles: Roles, monkeypatch: pytest.MonkeyPatch, step: int = 0) -> dict[str, torch.Tensor]:
    """The gradients that every adapter would step with: those of a client's own by `tenant/CLIENT/NAME`."""
    owners = {
        id(trainable): f"{TENANT}{client}/"
        for workers in roles.workers.values()
        for worker in workers.values()
        for client, trainable in worker.own.items()
    }
    seen: dict[str, torch.Tensor] = {}

    def note(self: Trainable, gradients: Any, factor: float, _rate: float) -> None:
        for name in self.parameters:
            key = owners.get(id(self), "") + name
            assert key not in seen or torch.equal(seen[key], gradients[name] * factor)
            seen[key] = gradients[name] * factor

    with monkeypatch.context() as patch:
        patch.setattr(Trainable, "apply", note)
        one_step(roles, step)
    return seen


def alike(roles: Roles) -> dict[str, torch.Tensor]:
    """B starts at zero, which hides A's gradient: move it; all clients start alike."""
    state = {key: tensor.clone() for key, tensor in roles.state().items()}
    named = {key: key.rpartition("adapter/")[2] for key in state if "adapter/" in key}
    for number, name in enumerate(sorted({n for n in named.values() if ".lora_B." in n})):
        moved = torch.randn(64, 64, generator=torch.Generator().manual_seed(number), dtype=torch.float64) * 0.2
        for key in (key for key, its in named.items() if its == name):
            rows, rank = state[key].shape
            state[key] = moved.repeat(3, 1)[:rows, :rank].to(state[key].dtype)
    roles.load(state)
    return {name: state[key] for key, name in named.items()}


def alone(settings: Recipe, rows: Corpus, adapter: dict[str, torch.Tensor], clip: float | None) -> dict[str, Any]:
    """By client: the clipped gradients of the mean loss over its own labels, by transformers and PEFT alone."""
    found: dict[str, Any] = {}
    unsplit = Unsplit(settings, rows, adapter)
    for client in range(len(rows.train)):
        unsplit.optimizer.zero_grad()
        unsplit.model.train()
        batches = [each for each in unsplit.batches(0) if each[0] == client]
        labels = sum(batch.labels for _, _, batch in batches)
        for _, index, batch in batches:
            unsplit._key = (0, client, index)
            (unsplit.loss(batch) / labels).backward()
        found[f"{TENANT}{client}/"] = {name: p.grad.clone() for name, p in unsplit.parameters.items()}
    return found


PERSONAL = [*product(("per_client", "common"), ("none", "synchronous")), ("per_client", "continuous")]


def one_place_in_turn(cuts: str, labels: str, *way: str) -> bool:
    return in_turn(cuts == "mixed cuts", LABELS.index(labels), PERSONAL.index((way[0], way[1])))


@pytest.mark.parametrize(
    ("cuts", "labels", "adapters", "batching"),
    cases(
        ((cuts, labels, *way) for cuts, labels, way in product(("mixed cuts", "equal cuts"), LABELS, PERSONAL)),
        one_place_in_turn,
    ),
)
def test_a_clients_own_adapter_learns_as_if_it_were_alone_and_the_common_part_as_the_mean_of_all(
    cuts: str, labels: str, adapters: str, batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = cuts == "mixed cuts"
    split = MIXED if mixed else {}
    lora, server = {"adapters": adapters}, {"batching": batching}
    train = {"loss_weights": "tenant"}
    settings = wanted("gemma3", [2, 4], labels, 4, "float64", split=split, server=server, lora=lora, train=train)
    roles, rows = roles_of(settings, corpus(4, 5)), corpus(4, 5)
    expected = alone(settings, rows, alike(roles), None)
    found = personal(roles, monkeypatch)
    deepest = {"per_client": LAYERS, "common": 3 if mixed else 2}[adapters]
    for key, gradient in found.items():
        tenant, _, name = key.rpartition("/")
        parts = [expected[f"{tenant}/"][name]] if tenant else [each[name] / 4 for each in expected.values()]
        assert (int(name.split(".")[4]) < deepest) == bool(tenant)
        wanted_gradient = torch.stack(parts).sum(0)
        error = float((gradient - wanted_gradient).abs().max() / wanted_gradient.abs().max())
        assert error <= 1e-12, f"{key} is off by {error:.1e}"


RANKS = {"client-0": {"rank": 2}, "client-1": {"rank": 7, "alpha": 3, "dropout": 0.0}, "client-3": {"dropout": 0.5}}


def of_own(clients: int, family: str, adapters: str, dtype: str, batching: str) -> Recipe:
    """Mixed lengths, mixed cuts, adapter dropout and, where each has its own, mixed ranks, alphas and rates."""
    known = {f"client-{number}" for number in range(clients)} if clients > 1 else {"client"}
    lora: dict[str, Any] = {"adapters": adapters}
    if adapters == "per_client":
        lora["clients"] = {name: own for name, own in RANKS.items() if name in known}
    split = {"client_cuts": {name: 1 + number % 3 for number, name in enumerate(sorted(known))}}
    server = {"batching": batching}
    return wanted(family, [2, 4], "cloud", clients, dtype, lora=lora, split=split, server=server)


WAYS = [*((adapters, "synchronous") for adapters in ("shared", "per_client", "common")), ("per_client", "continuous")]


def mixtures() -> list[Any]:
    """One family in fp64, another in fp32; of 16 clients most is `system`; the rest is left to the soak."""
    found = []
    for clients, family, way, dtype in product((1, 3, 7, 16), ("gpt2", "gemma3"), WAYS, TOLERANCES):
        here = clients in (3, 16) and (family == "gpt2") == (dtype == "float32")
        last = dtype == "float64" and way == WAYS[-1]
        marks = fast_if(here and (clients == 3 or last), "system" if here else "soak")
        name = f"{clients}-{family}-{'-'.join(way)}-{dtype}"
        found.append(pytest.param(clients, family, *way, dtype, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("clients", "family", "adapters", "batched", "dtype"), mixtures())
def test_batched_equals_alone_whatever_is_mixed(
    clients: int,
    family: str,
    adapters: str,
    batched: str,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    batches: list[int],
) -> None:
    found = {}
    for batching in ("none", batched):
        roles = roles_of(of_own(clients, family, adapters, dtype, batching), corpus(clients, 5))
        alike(roles)
        found[batching] = personal(roles, monkeypatch)
        assert max(batches) == 1 if batching == "none" or clients == 1 else max(batches) > clients // 4
        batches.clear()
    assert found[batched].keys() == found["none"].keys()
    for key, tensor in found["none"].items():
        error = float((found[batched][key] - tensor).abs().max() / tensor.abs().max())
        assert error <= TOLERANCES[dtype], f"{key} is off by {error:.1e}"


@pytest.mark.parametrize("adapters", ["shared", "per_client"])
def test_a_tenants_gradients_do_not_change_with_its_batch_mates(adapters: str) -> None:
    """Client 0 beside nobody, beside three, and beside three others of other lengths, cuts and values."""
    settings = of_own(7, "llama", adapters, "float64", "synchronous")
    roles = roles_of(settings, corpus(7, 5))
    alike(roles)
    worker = roles.workers["cloud"]["cloud"] if adapters == "shared" else roles.workers["edge"]["edge-0"]
    found = []
    for mates in ([], [1, 2], [2], [1]):
        asks = [ask_of(client, seed=len(mates) * (client > 0)) for client in (0, *mates)]
        asks.sort(key=lambda ask: ask.rows.entry)
        runs = worker.forward(asks)
        (mine,) = (run for run in runs if run.micro_batch.client == 0)
        leaves = [mine.input_TD, *(worker.own[0].parameters.values() if adapters == "per_client" else ())]
        found.append(torch.autograd.grad(mine.output_TD.square().sum(), leaves))
    for others in found[1:]:
        for tensor, other in zip(found[0], others, strict=True):
            assert float((tensor - other).abs().max()) <= 1e-12 * float(tensor.abs().max())


def ask_of(client: int, seed: int) -> Ask:
    """A micro-batch whose values and lengths depend on both numbers."""
    lengths = tuple(3 + (client * 5 + seed + row) % 9 for row in range(2))
    hidden_TD = torch.randn(
        sum(lengths), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(client + seed)
    )
    rows = Rows(MicroBatchId(0, client, 0), lengths, entry=1 + client % 3)
    return Ask(rows, hidden_TD, input_gradient=True)


VARIANTS: dict[str, dict[str, Any]] = {
    "recomputed": {"train": {"activation_checkpointing": True}, "lora": {"adapters": "per_client"}},
    "recomputed, shared": {"train": {"activation_checkpointing": True}},
    "dora": {"lora": {"dora": True}},
    "rslora": {"lora": {"rslora": True, "adapters": "per_client"}},
    "all linear": {"lora": {"targets": "all-linear", "adapters": "common"}},
    "edge only": {"lora": {"tiers": ["edge"], "adapters": "per_client"}},
    "several in flight": {"train": {"in_flight": 3, "accumulate": 3}, "lora": {"adapters": "per_client"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_in_batches_what_it_gives_alone(
    variant: str, monkeypatch: pytest.MonkeyPatch, batches: list[int]
) -> None:
    found = []
    for batching in ("none", "synchronous"):
        changes = {key: dict(value) for key, value in VARIANTS[variant].items()}
        roles = roles_of(
            wanted("llama", [2, 4], "client", 4, "float64", server={"batching": batching}, **changes), corpus(4, 7)
        )
        alike(roles)
        found.append(personal(roles, monkeypatch))
    assert max(batches) > 1 and found[0].keys() == found[1].keys() and found[0]
    for key, tensor in found[0].items():
        assert float((found[1][key] - tensor).abs().max()) <= 1e-12 * float(tensor.abs().max()), key


def test_packed_rows_and_others_share_a_batch() -> None:
    """Position ids restart inside a row of one micro-batch; of the other nobody has any."""
    roles = roles_of(of_own(3, "llama", "shared", "float64", "synchronous"), corpus(3, 5))
    worker, (packed, plain) = roles.workers["cloud"]["cloud"], (ask_of(0, seed=1), ask_of(1, seed=1))
    longest = max(packed.rows.lengths)
    positions_BS = torch.cat([torch.arange(3), torch.arange(longest - 3)]).expand(2, -1)
    packed = replace(packed, position_ids_BS=positions_BS)
    together = {run.micro_batch.client: run.output_TD for run in worker.forward([packed, plain])}
    for ask in (packed, plain):
        (alone,) = worker.forward([ask])
        torch.testing.assert_close(together[ask.rows.micro_batch.client], alone.output_TD, rtol=1e-12, atol=1e-12)
    (unpacked,) = worker.forward([replace(packed, position_ids_BS=None)])
    assert not torch.allclose(together[0], unpacked.output_TD, rtol=1e-3)
