"""Rounds that are misused, or combined oddly: what a hostile reading found, each mended."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splitllm.errors import RecipeError
from splitllm.federated.averager import Averager, Limits
from splitllm.federated.rounds import Arithmetic, Update
from splitllm.recipe import load_recipe
from splitllm.roles.client import Client
from splitllm.roles.participation import Participation
from splitllm.wire.link import LocalLink
from splitllm.wire.message import Message
from tests.families import corpus, recipe, roles_of
from tests.grids import each_fast
from tests.roles.test_rounds import LOCAL, TREES, Seen, apart, rounds_in, run, takes_part
from tests.roles.test_rounds import folder as folder
from tests.roles.test_rounds import seen as seen

EVERY = [LOCAL, "rounds.cloud_every=2", "rounds.weights=equal"]
MASKED = "rounds.secure={aggregate: true}"
FOUR = ["split.tiers={client: 4, cloud: 1}", "split.cuts=[2]", "train.batch_size=1"]


@pytest.mark.parametrize("rule", ["fedex", "flora"])
def test_what_rounds_freeze_beside_adapters_of_clients_own_is_kept(folder: Path, tmp_path: Path, rule: str) -> None:
    """`common` below the cut is `shared`, where all clients are cut alike."""
    both = [*TREES["two tiers"], LOCAL, "rounds.cloud_every=2", f"rounds.rule={rule}", "train.clip_norm=null"]
    shared = run(folder, tmp_path, *both, "lora.adapters=shared", name="shared")
    common = run(folder, tmp_path, *both, "lora.adapters=common", "train.verify_adapter=true", name="common")
    first = "base_model.model.transformer.h.0.attn.c_attn"
    products = [a[f"{first}.lora_B.weight"] @ a[f"{first}.lora_A.weight"] for a in (shared, common)]
    assert torch.allclose(*products, atol=1e-5)


def update(sender: str, value: float | None = None, dtype: torch.dtype = torch.float32) -> Update:
    shapes = {"adapter/x.lora_A.weight": (2, 5), "adapter/x.lora_B.weight": (4, 2)}
    make = torch.randn if value is None else (lambda shape: torch.full(shape, value))
    return Update(sender, 1.0, {name: make(shape).to(dtype) for name, shape in shapes.items()})


@pytest.mark.parametrize("rule", ["fedavg", "fedex", "flora", "flexlora", "hetlora", "median"])
def test_values_with_which_no_rule_can_count_are_left_out(rule: str) -> None:
    averager = Averager(Arithmetic(rule, 2.0), Limits(), None, {})
    made, rejected = averager.combine([update("a"), update("b", 3e38)])
    assert list(rejected) == ["b"]
    assert math.isfinite(made.error)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in made.value.values())


START = {"adapter/x.lora_A.weight": torch.zeros(2, 5), "adapter/x.lora_B.weight": torch.zeros(4, 2)}


@pytest.mark.parametrize(
    ("others", "rejected"), [([1.0], True), ([1.0, 1.1], True), ([1.0, 1.1, 1.2], True), ([], False)]
)
def test_one_of_any_number_of_updates_can_be_too_large(others: list[float], rejected: bool) -> None:
    averager = Averager(Arithmetic("fedavg"), Limits(reject_beyond=5.0), None, START)
    updates = [update(f"{number}", value) for number, value in enumerate([*others, 10.0])]
    assert list(averager.combine(updates)[1]) == ([f"{len(others)}"] if rejected else [])


def test_those_between_whom_there_is_no_factor_are_all_kept() -> None:
    averager = Averager(Arithmetic("fedavg"), Limits(reject_beyond=2.0), None, START)
    for values in ([1.0, 1.9], [1.0, 0.0, 1.1], [0.0, 0.0]):
        assert averager.combine([update(str(n), value) for n, value in enumerate(values)])[1] == {}


def test_what_one_holder_brings_in_parts_is_clipped_as_one() -> None:
    """Blocks that serve more clients weigh more, so a server's adapter comes in parts."""
    parts = {f"adapter/{block}.lora_{side}.weight": torch.full((3, 3), 1.0) for block in "xy" for side in "AB"}
    averager = Averager(Arithmetic("fedavg"), Limits(clip=0.5), None, {n: torch.zeros(3, 3) for n in parts})
    x, y = ({n: t for n, t in parts.items() if f"/{block}." in n} for block in "xy")
    made, _ = averager.combine([Update("edge-0", 1.0, x), Update("edge-0", 2.0, y)])
    norm = math.hypot(*(float(tensor.norm()) for tensor in made.value.values()))
    assert norm == pytest.approx(0.5)
    assert all(torch.allclose(tensor, torch.full((3, 3), 0.5 / 6)) for tensor in made.value.values())


@pytest.mark.parametrize("rule", ["fedavg", "hetlora"])
def test_one_narrow_value_makes_no_average_narrow(rule: str) -> None:
    made = Arithmetic(rule).combine([update("a", dtype=torch.bfloat16), update("b")])
    assert {tensor.dtype for tensor in made.value.values()} == {torch.float32}


def test_half_an_adapter_beside_what_it_was_frozen_into_is_none() -> None:
    whole = update("a").tensors
    odd = {"adapter/x.lora_B.weight": whole["adapter/x.lora_B.weight"]}
    odd |= {name.replace("adapter", "frozen"): tensor for name, tensor in whole.items()}
    made = Arithmetic("flora").combine([update("b"), Update("a", 1.0, odd)])
    assert set(made.value) == {"frozen/x.lora_A.weight", "frozen/x.lora_B.weight"}


def test_a_client_that_tells_an_absurd_loss_stops_nobody(folder: Path) -> None:
    recipe = load_recipe(
        folder / "recipe.yaml",
        [*TREES["two tiers"], LOCAL, "rounds.cloud_every=2", "rounds.participation={policy: oort, count: 1}"],
    )
    kept = Participation(recipe, {0: "client-0"})
    kept.count({0: 1}, {0: (1e300, 1, 1)})
    kept.count({0: 1}, {0: (3.0, 1, 1)})
    assert kept.weights({0: 1}) == {0: [2.0]}, "labels count, whatever the loss"
    kept.held(1, 1, [], {0: 1})
    seen = kept.history.clients["client-0"]
    assert seen.utility is not None and math.isfinite(seen.utility)
    again = Participation(recipe, {0: "client-0"})
    again.load(kept.state())
    assert again.history == kept.history


SOME = each_fast("random, share: 0.5", slow=["random, count: 2", "oort, count: 2"])


@pytest.mark.parametrize("some", SOME)
def test_sums_are_masked_among_those_who_are_asked(folder: Path, tmp_path: Path, some: str) -> None:
    masked = run(folder, tmp_path, *FOUR, *EVERY, MASKED, f"rounds.participation={{policy: {some}}}", name="masked")
    if "oort" not in some:
        plain = run(folder, tmp_path, *FOUR, *EVERY, f"rounds.participation={{policy: {some}}}", name="plain")
        assert apart(plain, masked) < 1e-5


@pytest.mark.parametrize(
    "some", each_fast("random, count: 1, minimum: 2", slow=["random, share: 0.25, minimum: 3", "random, share: 0.5"])
)
def test_the_mean_of_clipped_changes_is_over_those_who_are_asked(folder: Path, tmp_path: Path, some: str) -> None:
    every = [*FOUR, *EVERY, f"rounds.participation={{policy: {some}}}"]
    plain = run(folder, tmp_path, *every, name="plain")
    private = run(folder, tmp_path, *every, "rounds.privacy={clip: 100.0}", name="private")
    assert apart(plain, private) < 1e-4


def test_groups_too_small_to_hide_in_are_refused_before_they_run(folder: Path) -> None:
    for some in (
        "rounds.participation={policy: random, count: 1}",
        "rounds.participation={policy: random, share: 0.2}",
    ):
        with pytest.raises(RecipeError, match="one is its own sum"):
            load_recipe(folder / "recipe.yaml", [*FOUR, *EVERY, MASKED, some])
    two = ["split.tiers={client: 2, cloud: 1}", "split.cuts=[2]", *EVERY]
    with pytest.raises(RecipeError, match="threshold"):
        load_recipe(folder / "recipe.yaml", [*two, "rounds.secure={aggregate: true, threshold: 1}"])
    uneven = ["split.tiers={client: 7, edge: 2, cloud: 1}", "split.cuts=[1, 3]", *EVERY]
    with pytest.raises(RecipeError, match="threshold"):
        load_recipe(folder / "recipe.yaml", [*uneven, "rounds.secure={aggregate: true, threshold: 2}"])


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> dict[int, str]:
    """Step -> who says something false of its masks at the end of that round."""
    found, request = dict[int, str](), LocalLink.request

    async def lie(self: LocalLink, message: Message) -> Message:
        if message.kind == "round" and "said" in message.header and message.step in found:
            said = message.header["said"]
            seeds = dict.fromkeys(said["seeds"], f"{0:066x}")
            message = replace(message, header={**message.header, "said": {**said, "seeds": seeds}})
        return await request(self, message)

    monkeypatch.setattr(LocalLink, "request", lie)
    return found


def test_after_a_void_round_only_those_who_are_asked_now_add_to_the_sum(
    folder: Path, tmp_path: Path, seen: Seen, lying: dict[int, str]
) -> None:
    lying[2] = "everybody"
    some = "rounds.participation={policy: random, count: 2}"
    run(folder, tmp_path, *FOUR, *EVERY, MASKED, some, "train.steps=8")
    by_step = takes_part(seen)
    assert by_step[1] != by_step[3], "others are asked after it"
    assert [report["void"] is None for report in rounds_in(tmp_path / "run")] == [False, True, True, True]
    assert [report["updates"] for report in rounds_in(tmp_path / "run")] == [0, 2, 2, 2]


def test_where_the_last_masked_round_is_void_nobody_hands_in_its_own_adapter(
    folder: Path, tmp_path: Path, lying: dict[int, str]
) -> None:
    """What a client hands in at the end is what the last round gave it."""
    every = ["split.tiers={client: 3, cloud: 1}", "split.cuts=[2]", *EVERY, MASKED]
    lying[4] = "everybody"
    long = run(folder, tmp_path, *every, "train.schedule={name: constant}", name="long")
    short = run(folder, tmp_path, *every, "train.schedule={name: constant}", "train.steps=2", name="short")
    of_clients = [name for name in long if ".h.0." in name or ".h.1." in name]
    assert all(torch.equal(long[name], short[name]) for name in of_clients)


ROLORA = ["split.tiers={client: 3, cloud: 1}", "split.cuts=[2]", *EVERY, MASKED, "rounds.rule=rolora", "train.steps=8"]


def test_what_a_void_masked_round_of_one_matrix_has_left_counts_in_its_next_turn(
    folder: Path, tmp_path: Path, lying: dict[int, str]
) -> None:
    """Rounds of B, A, B and A, of which the second is void: what A became in it counts in the last."""
    lying[4] = "everybody"
    long = ["train.schedule={name: constant}", "rounds.secure={aggregate: true, bits: 64}"]
    whole = run(folder, tmp_path, *ROLORA, *long, name="whole")
    assert [report["void"] is None for report in rounds_in(tmp_path / "whole")] == [True, False, True, True]
    changes = run(folder, tmp_path, *ROLORA, *long, "rounds.privacy={clip: 100.0}", name="changes")
    assert apart(whole, changes) < 1e-7, "changes are counted from what was handed out, not from after the void round"


def test_after_a_void_masked_round_of_one_matrix_nobody_hands_in_its_own(lying: dict[int, str]) -> None:
    lying[4] = "everybody"
    rounds = {
        "replicas": "local",
        "cloud_every": 2,
        "rule": "rolora",
        "weights": "equal",
        "secure": {"aggregate": True},
    }
    wanted = recipe("gpt2", [2], split={"tiers": {"client": 3, "cloud": 1}}, rounds=rounds, train={"steps": 6})
    roles = roles_of(wanted, corpus(3, rows=6))
    for step in range(6):
        asyncio.run(stepped(roles.clients, step))
    own = [client.worker.trainable.parameters for client in roles.clients]
    given = next(each.decided() for each in roles.rounds if each.decided())
    in_hand = [each.adapter() for each in roles.rounds if each.level == 0]
    (sides,) = {tuple(sorted(name for name in part if ".lora_A." in name)) for part in in_hand}
    for name in sides:
        assert not torch.equal(own[0][name], own[1][name]), "each has gone on with what it had"
        assert all(torch.equal(part[name], given[name]) for part in in_hand)


def test_who_is_left_out_of_an_average_counts_nowhere_above_it(
    folder: Path, tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = LocalLink.request

    async def poisoned(self: LocalLink, message: Message) -> Message:
        if message.kind == "round" and message.sender == "client-1":
            message = replace(message, tensors={n: torch.full_like(t, math.nan) for n, t in message.tensors.items()})
        return await request(self, message)

    monkeypatch.setattr(LocalLink, "request", poisoned)
    run(folder, tmp_path, *TREES["three tiers"], LOCAL, "rounds.edge_every=2", "rounds.cloud_every=4")
    told = [m.header["weights"] for m, _ in seen.messages if m.sender == "edge-0" and m.step == 4]
    assert told[0][1] == [0.0, 0.0] and told[0][0] != [0.0, 0.0]


@pytest.mark.parametrize("rule", ["fedavg", "median", "trimmed_mean"])
def test_no_client_s_moments_make_all_steps_nothing(rule: str) -> None:
    def update(sender: str, moment: float) -> Update:
        name = "x.lora_A.weight"
        tensors = {f"adapter/{name}": torch.ones(2, 5), f"exp_avg_sq/{name}": torch.full((2, 5), moment)}
        return Update(sender, 1.0, tensors)

    averager = Averager(Arithmetic(rule, trim=0.34), Limits(), None, {})
    made, rejected = averager.combine([update("a", 0.1), update("b", 0.1), update("c", -1e9)])
    assert rejected == {"c": "a square below 0"}
    if rule != "fedavg":
        made, _ = averager.combine([update("a", 0.1), update("b", 0.1), update("c", 1e9)])
    assert torch.allclose(made.value["exp_avg_sq/x.lora_A.weight"], torch.tensor(0.1))


def test_limits_of_changes_are_refused_with_dora_whose_magnitudes_they_do_not_measure(folder: Path) -> None:
    every = [*TREES["two tiers"], LOCAL, "rounds.cloud_every=4", "lora.dora=true", "rounds.clip_update=0.01"]
    with pytest.raises(RecipeError, match="magnitudes"):
        load_recipe(folder / "recipe.yaml", every)


def test_a_server_s_block_whose_clients_are_not_asked_does_not_step() -> None:
    """Client 0 enters at block 1, client 1 at block 2; where the latter trains alone, block 1 must not step."""
    rounds = {"replicas": "local", "cloud_every": 2, "participation": {"policy": "random", "count": 1}}
    split = {"tiers": {"client": 2, "cloud": 1}, "client_cuts": {"client-1": 2}}
    sgd = {"lr": 1e-2, "weight_decay": 0.1}
    settings = {"steps": 20, "optimizer": sgd, "schedule": {"name": "constant"}}
    wanted = recipe("gpt2", [1], split=split, rounds=rounds, train=settings)
    roles = roles_of(wanted, corpus(2, rows=6))
    (cloud,) = roles.workers["cloud"].values()
    asked = next(each.participation for each in roles.rounds if each.participation is not None)
    trained, still = False, 0
    for step in range(0, 16, 2):
        before = {name: tensor.clone() for name, tensor in cloud.trainable.state().items()}
        asyncio.run(stepped(roles.clients, step))
        after, alone = cloud.trainable.state(), asked.asked(step) == {1}
        changed = {name.split(".h.")[1][0] for name, tensor in after.items() if not same(before.get(name), tensor)}
        assert changed == {"2", "3", "4", "5"} | (set() if alone else {"1"})
        trained, still = trained or not alone, still + (alone and trained)
        asyncio.run(stepped(roles.clients, step + 1))
    assert still, "with moments that would decay"


def same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and torch.equal(one, other)


async def stepped(clients: Sequence[Client], step: int) -> None:
    await asyncio.gather(*(client.step(step) for client in clients))
