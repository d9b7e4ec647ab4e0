"""Rounds of whole runs in one process: what is averaged is the average, whatever the tree, and nothing is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitllm.errors import DivergedError, RecipeError
from splitllm.metrics import read_records
from splitllm.recipe import clients_below, load_recipe, parent_of, tier_of
from splitllm.recipe.rounds import level_due
from splitllm.train import train
from splitllm.wire.link import LocalLink
from splitllm.wire.message import Message
from tests.grids import cases, each_fast
from tests.tiny import write_recipe

Tensors = dict[str, torch.Tensor]
TREES: dict[str, list[str]] = {
    "whole": ["split.tiers={client: 3}", "split.cuts=[]"],
    "two tiers": ["split.tiers={client: 3, cloud: 1}", "split.cuts=[2]"],
    "three tiers": ["split.tiers={client: 4, edge: 2, cloud: 1}", "split.cuts=[1, 3]"],
    "mixed cuts": [
        *("split.tiers={client: 4, edge: 2, cloud: 1}", "split.cuts=[1, 3]"),
        "split.client_cuts={client-1: 2, client-2: 2}",
    ],
    "uneven": ["split.tiers={client: 5, edge: 2, cloud: 1}", "split.cuts=[2, 3]"],
    "four tiers": ["split.tiers={client: 4, hub: 3, edge: 2, cloud: 1}", "split.cuts=[1, 2, 3]"],
}
PLAIN = ["train.clip_norm=null", "lora.dropout=0.0", "train.schedule={name: constant}"]
SGD = ["model.dtype=float64", "train.optimizer={name: sgd, lr: 0.3}", *PLAIN]
LOCAL = "rounds.replicas=local"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    write_recipe(folder)
    return folder


class Seen:
    """Every message of a round and its reply, as they were when they crossed, and the labels of every step."""

    def __init__(self) -> None:
        self.messages: list[tuple[Message, Message]] = []
        self.labels: dict[tuple[int, int], int] = {}

    def of_clients(self, step: int, since: int = 0) -> dict[int, tuple[Tensors, float]]:
        """Client -> its value, and the labels that it was trained on since so many steps."""
        found = {}
        for message, _ in self.messages:
            if message.sender.startswith("client") and message.step == step:
                ((client, _rows),) = message.header["examples"].items()
                labels = sum(self.labels.get((client, at), 0) for at in range(since, step))
                found[int(client)] = (dict(message.tensors), float(labels))
        return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen, request = Seen(), LocalLink.request

    async def spy(self: LocalLink, message: Message) -> Message:
        asked = replace(message, tensors={name: tensor.clone() for name, tensor in message.tensors.items()})
        reply = await request(self, message)
        if message.kind == "round":
            seen.messages.append((asked, reply))
        if message.kind == "open" and reply.header.get("takes_part") and message.sender.startswith("client"):
            seen.labels.update({(c, message.step): sum(labels) for c, labels in message.header["labels"].items()})
        return reply

    monkeypatch.setattr(LocalLink, "request", spy)
    return seen


def run(folder: Path, tmp_path: Path, *overrides: str, name: str = "run") -> Tensors:
    train(load_recipe(folder / "recipe.yaml", overrides), tmp_path / name)
    return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")


def rounds_in(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(folder / "metrics.jsonl") if record["event"] == "round"]


def apart(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def every_one(tree: str) -> list[str]:
    """Rounds of all tiers after each step."""
    edges = {"three tiers": ["rounds.edge_every=1"], "four tiers": ["rounds.edge_every=[1, 1]"]}
    return [LOCAL, "rounds.cloud_every=1", *edges.get(tree, [])]


WEIGHTS = {"tokens": "token", "equal": "tenant"}


@pytest.mark.parametrize(
    ("tree", "adapters", "weights"),
    cases(
        [case for case in product(TREES, ["shared", "common", "per_client"], WEIGHTS) if case[:2] not in
         [("whole", "common"), ("whole", "per_client")]],
        lambda tree, adapters, weights: weights == "tokens"
        and (tree, adapters) in [("mixed cuts", "shared"), ("four tiers", "shared"), ("three tiers", "per_client")],
    ),
)  # fmt: skip
def test_with_plain_sgd_a_round_after_every_step_is_centralised_sgd_on_the_weighted_loss(
    folder: Path, tmp_path: Path, tree: str, adapters: str, weights: str
) -> None:
    common = [*TREES[tree], *SGD, f"train.loss_weights={WEIGHTS[weights]}"]
    central = run(folder, tmp_path, *common, name="central")
    local = [*every_one(tree), f"rounds.weights={weights}", f"lora.adapters={adapters}"]
    assert apart(run(folder, tmp_path, *common, *local), central) < 1e-11


@pytest.mark.parametrize("tree", each_fast("two tiers", slow=["mixed cuts", "three tiers"]))
def test_where_each_client_trains_all_blocks_alone_the_cut_does_not_show(
    folder: Path, tmp_path: Path, tree: str
) -> None:
    """SplitFed V1 is FedAvg of the unsplit model, with AdamW, clipping and rounds apart."""
    clients = "4" if tree != "two tiers" else "3"
    common = ["model.dtype=float64", "lora.dropout=0.1", LOCAL, "rounds.cloud_every=2", "rounds.moments=average"]
    whole = run(folder, tmp_path, f"split.tiers={{client: {clients}}}", "split.cuts=[]", *common, name="whole")
    split = run(folder, tmp_path, *TREES[tree], *common, "lora.adapters=per_client")
    assert apart(split, whole) < 1e-11


def exact(values: Mapping[int, tuple[Tensors, float]], module: str, scales: Mapping[int, float]) -> torch.Tensor:
    """The sum over clients of p s B A."""
    total = math.fsum(weight for _, weight in values.values())
    a, b = f"adapter/{module}.lora_A.weight", f"adapter/{module}.lora_B.weight"
    return sum(weight / total * scales[c] * (v[b] @ v[a]).double() for c, (v, weight) in values.items())  # type: ignore[return-value]


def product_of(adapter: Mapping[str, torch.Tensor], module: str, scale: float) -> torch.Tensor:
    return scale * (adapter[f"{module}.lora_B.weight"].double() @ adapter[f"{module}.lora_A.weight"].double())


def config_scale(folder: Path) -> float:
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return float(config["lora_alpha"]) / float(config["r"])


@pytest.mark.parametrize("rule", each_fast("fedavg", "fedex", "ffa", slow=["flora", "rolora"]))
def test_a_round_makes_what_its_rule_says_and_the_exported_adapter_is_that(
    folder: Path, tmp_path: Path, seen: Seen, rule: str
) -> None:
    """One round at the end of the run: Done when W equals W0 + s sum p B A to 1e-6 in fp32."""
    whole = ["split.tiers={client: 3}", "split.cuts=[]", LOCAL, "rounds.cloud_every=4", f"rounds.rule={rule}"]
    adapter = run(folder, tmp_path, *whole, "train.verify_adapter=true")
    sent = seen.of_clients(4)
    start = seen_start(folder, tmp_path, *whole)
    sent = {c: ({f"adapter/{n}": t for n, t in start.items()} | value, w) for c, (value, w) in sent.items()}
    modules = sorted({name.split(".lora_")[0] for name in start})
    scale, made = (1.0 if rule == "flora" else 2.0), config_scale(tmp_path / "run")  # FLoRA's B travel scaled
    errors = [
        float((exact(sent, module, dict.fromkeys(sent, scale)) - product_of(adapter, module, made)).abs().max())
        for module in modules
    ]
    (report,) = rounds_in(tmp_path / "run")
    if rule == "fedavg":
        assert max(errors) > 1e-5
        assert report["error"] > 1e-3
    else:
        assert max(errors) < 1e-6
        assert report["error"] < 1e-6


def seen_start(folder: Path, tmp_path: Path, *overrides: str) -> Tensors:
    """The adapter before the first step: what one of a rate of almost nothing leaves."""
    tiny = ["train.steps=1", "train.optimizer.lr=1.0e-30", "train.schedule={name: constant}"]
    quiet = [o for o in overrides if not o.startswith("rounds.")]
    return run(folder, tmp_path, *quiet, *tiny, "data.eval_fraction=0.1", name="start")


@pytest.mark.parametrize("rule", each_fast("flora", slow=["fedex"]))
def test_what_tiers_freeze_between_rounds_of_the_top_is_averaged_too(
    folder: Path, tmp_path: Path, seen: Seen, rule: str
) -> None:
    """Rounds at the edges, at both, at the edges, and at the end at both: every time nothing of the mean is lost."""
    edges = ["rounds.edge_every=1", "rounds.cloud_every=2", "rounds.weights=equal", f"rounds.rule={rule}"]
    adapter = run(folder, tmp_path, *TREES["three tiers"], LOCAL, *edges, "train.verify_adapter=true")
    module, scale = "base_model.model.transformer.h.0.attn.c_attn", 1.0 if rule == "flora" else 2.0
    wanted = torch.zeros(48, 16, dtype=torch.float64)
    for step in (2, 4):
        values = seen.of_clients(step)
        if step == 4:
            wanted = wanted + exact({c: (v, 1.0) for c, (v, _) in values.items()}, module, dict.fromkeys(values, scale))
        frozen = {c: frozen_in(value, module) for c, (value, _) in values.items()}
        assert all(part is not None for part in frozen.values()), "what the edges froze goes up with the adapter"
        wanted = wanted + sum(frozen.values()) / 4
        if step == 2:
            trained = exact({c: (v, 1.0) for c, (v, _) in values.items()}, module, dict.fromkeys(values, scale))
            after = next(reply for m, reply in seen.messages if m.sender == "client-0" and m.step == 2)
            mean = (
                product_of({n.removeprefix("adapter/"): t for n, t in after.tensors.items()}, module, scale)
                if rule == "fedex"
                else 0.0
            )
            wanted = wanted + trained - mean
    assert float((wanted - product_of(adapter, module, config_scale(tmp_path / "run"))).abs().max()) < 1e-6


def frozen_in(value: Mapping[str, torch.Tensor], module: str) -> torch.Tensor:
    return value[f"frozen/{module}.lora_B.weight"].double() @ value[f"frozen/{module}.lora_A.weight"].double()


@pytest.mark.parametrize(
    ("tree", "rule"),
    cases(
        product(["whole", "two tiers", "mixed cuts"], ["flora", "flexlora", "hetlora"]),
        lambda tree, rule: (tree, rule) in [("two tiers", "hetlora"), ("mixed cuts", "flexlora")],
    ),
)
def test_ranks_may_differ_from_client_to_client(folder: Path, tmp_path: Path, seen: Seen, rule: str, tree: str) -> None:
    ranks = ["lora.clients={client-0: {rank: 2, alpha: 2}, client-2: {rank: 6, alpha: 9}}"]
    edge = ["rounds.edge_every=4"] if tree == "mixed cuts" else []
    local = [LOCAL, "rounds.cloud_every=4", f"rounds.rule={rule}", "rounds.weights=equal", *edge]
    verify = f"train.verify_adapter={str(rule == 'flora').lower()}"
    adapter = run(folder, tmp_path, *TREES[tree], *ranks, *local, verify)
    module = "base_model.model.transformer.h.0.attn.c_attn"
    values = {c: (value, 1.0) for c, (value, _) in seen.of_clients(4).items()}
    wanted = exact(values, module, dict.fromkeys(values, 1.0))
    off = float((wanted - product_of(adapter, module, config_scale(tmp_path / "run"))).abs().max())
    if rule == "flora":
        assert off < 1e-6
    elif rule == "flexlora":
        best = torch.linalg.svdvals(wanted)[6:]
        assert off <= float(best.norm()) + 1e-6, "the best of rank 6, which the largest client has"
    else:
        assert 0 < off < float(wanted.norm())


def test_the_last_step_ends_with_a_round_of_all_and_no_update_is_lost(folder: Path, tmp_path: Path, seen: Seen) -> None:
    """Four steps, a round after each third: the fourth is averaged as well, and counts as one step's labels."""
    local = [LOCAL, "rounds.cloud_every=3", "split.tiers={client: 3}", "split.cuts=[]"]
    adapter = run(folder, tmp_path, *local)
    assert sorted({message.step for message, _ in seen.messages}) == [3, 4]
    values = seen.of_clients(4, since=3)
    assert len(values) == 3
    total = sum(labels for _, labels in values.values())
    for name, tensor in adapter.items():
        mean = sum(value[f"adapter/{name}"].double() * (labels / total) for value, labels in values.values())
        assert torch.allclose(tensor.double(), mean, atol=1e-7), name  # type: ignore[arg-type]


def test_every_client_counts_once_at_every_level(folder: Path, tmp_path: Path, seen: Seen) -> None:
    local = [LOCAL, "rounds.edge_every=2", "rounds.cloud_every=4", "rounds.weights=examples"]
    run(folder, tmp_path, *TREES["uneven"], *local)
    recipe = load_recipe(folder / "recipe.yaml", [*TREES["uneven"], *local])
    for message, _ in seen.messages:
        key = "examples" if message.sender.startswith("client") else "weights"
        assert sorted(map(int, message.header[key])) == clients_below(recipe, message.sender)
    at = [(message.step, message.sender) for message, _ in seen.messages]
    assert len(at) == len(set(at))
    assert {step for step, _ in at} == {2, 4}
    ups = {m.step for m, _ in seen.messages if m.sender.startswith("edge") and m.tensors}
    assert ups == {4}, "adapters go above the edges only when the cloud averages"


def test_blocks_that_one_role_alone_trains_do_not_travel(folder: Path, tmp_path: Path, seen: Seen) -> None:
    run(folder, tmp_path, "split.tiers={client: 2, edge: 1, cloud: 1}", LOCAL, "rounds.cloud_every=2")
    sent = {name for message, _ in seen.messages for name in message.tensors}
    assert {name.split(".h.")[1][0] for name in sent} == {"0"}


@pytest.mark.parametrize(
    "options",
    [
        ["rounds.rule=fedex", "rounds.moments=average", "rounds.prox=0.5"],
        pytest.param(["rounds.rule=flora"], marks=pytest.mark.system),
        pytest.param(
            ["rounds.outer={name: fedadam, lr: 0.01}", "rounds.clip_update=0.5", "rounds.prox=0.1"],
            marks=pytest.mark.system,
        ),
        pytest.param(["rounds.rule=rolora", "rounds.outer={name: fedavgm, lr: 1.0}"], marks=pytest.mark.system),
        pytest.param(
            ["rounds.rule=flexlora", "lora.adapters=per_client", "rounds.moments=reset"], marks=pytest.mark.system
        ),
    ],
    ids=["fedex", "flora", "fedadam", "rolora", "flexlora"],
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    folder: Path, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import splitllm.checkpoint as checkpoint

    every = [*TREES["three tiers"], LOCAL, "rounds.edge_every=1", "rounds.cloud_every=2", "train.steps=6", *options]
    whole = run(folder, tmp_path, *every, name="whole")
    save = checkpoint.save

    class Crash(Exception):
        pass

    def crash(*args: Any) -> None:
        save(*args)
        if args[1].step == 3:
            raise Crash

    monkeypatch.setattr(checkpoint, "save", crash)
    with pytest.raises(Crash):
        run(folder, tmp_path, *every, name="again")
    monkeypatch.undo()
    train(load_recipe(folder / "recipe.yaml", every), tmp_path / "again", resume=True)
    resumed = load_file(tmp_path / "again" / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert rounds_in(tmp_path / "again") == rounds_in(tmp_path / "whole")


def test_who_sends_what_is_not_finite_is_left_out_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request = LocalLink.request

    async def poisoned(self: LocalLink, message: Message) -> Message:
        if message.kind == "round" and message.sender == "client-1":
            spoiled = {name: torch.full_like(tensor, math.nan) for name, tensor in message.tensors.items()}
            message = replace(message, tensors=spoiled)
        return await request(self, message)

    monkeypatch.setattr(LocalLink, "request", poisoned)
    run(folder, tmp_path, *TREES["two tiers"], LOCAL, "rounds.cloud_every=2")
    reports = rounds_in(tmp_path / "run")
    assert [report["rejected"] for report in reports] == [{"client-1": "not finite"}] * 2
    assert "cloud left client-1 out of its average (not finite)" in capsys.readouterr().out


def test_who_changed_absurdly_much_is_left_out_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = LocalLink.request

    async def loud(self: LocalLink, message: Message) -> Message:
        if message.kind == "round" and message.sender == "client-1":
            message = replace(message, tensors={name: tensor * 1e4 for name, tensor in message.tensors.items()})
        return await request(self, message)

    monkeypatch.setattr(LocalLink, "request", loud)
    run(folder, tmp_path, *TREES["two tiers"], LOCAL, "rounds.cloud_every=2", "rounds.reject_beyond=5.0")
    for report in rounds_in(tmp_path / "run"):
        assert list(report["rejected"]) == ["client-1"]


def test_where_nobody_is_left_the_run_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = LocalLink.request

    async def poisoned(self: LocalLink, message: Message) -> Message:
        if message.kind == "round":
            message = replace(message, tensors={n: torch.full_like(t, math.inf) for n, t in message.tensors.items()})
        return await request(self, message)

    monkeypatch.setattr(LocalLink, "request", poisoned)
    with pytest.raises(DivergedError, match="nothing is left to average"):
        run(folder, tmp_path, *TREES["two tiers"], LOCAL, "rounds.cloud_every=2")


@pytest.mark.parametrize("rule", each_fast("rolora", slow=["ffa"]))
def test_only_one_of_the_matrices_trains_and_travels(folder: Path, tmp_path: Path, seen: Seen, rule: str) -> None:
    run(folder, tmp_path, *TREES["two tiers"], LOCAL, "rounds.cloud_every=1", f"rounds.rule={rule}")
    sides = {step: {name.split(".lora_")[1][0] for m, _ in seen.messages if m.step == step for name in m.tensors}
             for step in range(1, 5)}  # fmt: skip
    assert sides == {1: {"B"}, 2: {"B"} if rule == "ffa" else {"A"}, 3: {"B"}, 4: {"B"} if rule == "ffa" else {"A"}}


def test_intervals_of_several_tiers_make_rounds_of_several_levels(folder: Path) -> None:
    four = [*TREES["four tiers"], LOCAL, "rounds.edge_every=[2, 4]", "rounds.cloud_every=8", "train.steps=11"]
    recipe = load_recipe(folder / "recipe.yaml", four)
    assert [level_due(recipe, steps) for steps in range(12)] == [0, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 3]
    assert parent_of(recipe, "hub-0") == "edge-0"
    assert tier_of(recipe, "hub-0")[0] == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rounds.rule=fedex"], "rounds.rule: needs rounds.replicas: local; use that"),
        ([LOCAL], "rounds.cloud_every: missing"),
        ([LOCAL, "rounds.cloud_every=3", "rounds.edge_every=2"], "rounds.cloud_every: 3 is no multiple of the 2"),
        ([LOCAL, "rounds.cloud_every=3", "rounds.edge_every=2"], "takes in; use 2 or 4"),
        ([LOCAL, "rounds.cloud_every=1", "rounds.edge_every=2"], "takes in; use 2"),
        ([LOCAL, "rounds.cloud_every=6", "rounds.edge_every=[2, 3]", *TREES["four tiers"]], "edge_every: 3 is no"),
        ([LOCAL, "rounds.cloud_every=4", "rounds.edge_every=[2, 2]"], "top (edge); give 1, such as [2], or one"),
        ([LOCAL, "rounds.cloud_every=4", "split.tiers={client: 2, cloud: 1}", "split.cuts=[2]", "rounds.edge_every=2"],
         "there is none; leave it out"),
        ([LOCAL, "rounds.cloud_every=4", "lora.clients={client-0: {rank: 2}}"], "use flora, flexlora or hetlora"),
        ([LOCAL, "rounds.cloud_every=4", "rounds.rule=flora", "lora.adapters=per_client"], "which a server's clients"),
        ([LOCAL, "rounds.cloud_every=4", "rounds.rule=flora", "rounds.outer.name=fedadam"], "steps A and B, which"),
        ([LOCAL, "rounds.cloud_every=4", "rounds.rule=fedex", "lora.dora=true"], "use fedavg"),
        ([LOCAL, "rounds.cloud_every=4", "rounds.rule=flexlora", "rounds.moments=average"], "use keep or reset"),
        ([LOCAL, "rounds.cloud_every=4", "rounds.rule=rolora", "rounds.participation={minimum: 2}"], "use rounds.part"),
        ([LOCAL, "rounds.cloud_every=4", "lora.adapters=per_client", "rounds.clip_update=1.0"], "it measures changes"),
        ([LOCAL, "rounds.cloud_every=4", "train.processes=2"], "use 1, or a deployment"),
        ([LOCAL, "rounds.cloud_every=4", "wire.absent=drop"], "needs wire.absent: wait"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_together_is_refused(folder: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(folder / "recipe.yaml", overrides)
    assert words in str(refused.value)


def takes_part(seen: Seen) -> dict[int, list[int]]:
    """Step -> the clients that trained in it."""
    found: dict[int, list[int]] = {}
    for client, step in sorted(seen.labels):
        found.setdefault(step, []).append(client)
    return found


@pytest.mark.parametrize(
    ("policy", "adapters"),
    cases(
        product(["random", "poisson", "oort"], ["shared", "per_client", "common"]),
        lambda *case: case in [("random", "shared"), ("oort", "per_client")],
    ),
)
def test_only_some_clients_train_between_rounds_and_all_go_on_from_their_average(
    folder: Path, tmp_path: Path, seen: Seen, policy: str, adapters: str
) -> None:
    some = [f"rounds.participation={{policy: {policy}, share: 0.5}}", f"lora.adapters={adapters}", "train.steps=8"]
    adapter = run(folder, tmp_path, *TREES["two tiers"], LOCAL, "rounds.cloud_every=2", "train.batch_size=1", *some)
    by_step = takes_part(seen)
    assert sorted(by_step) == list(range(8))
    assert all(by_step[step] == by_step[step + 1] for step in range(0, 8, 2)), "the same until the next round"
    assert {len(clients) for clients in by_step.values()} <= ({2} if policy != "poisson" else {1, 2, 3})
    assert len({tuple(clients) for clients in by_step.values()}) > 1
    last = {c: (value, labels) for c, (value, labels) in seen.of_clients(8, since=6).items() if labels}
    assert sorted(last) == by_step[7]
    name = next(name for name in adapter if ".h.0." in name)
    total = sum(labels for _, labels in last.values())
    mean = sum(value[f"adapter/{name}"].double() * (labels / total) for value, labels in last.values())
    assert torch.allclose(adapter[name].double(), mean, atol=1e-7)  # type: ignore[arg-type]
    assert [report["updates"] for report in rounds_in(tmp_path / "run")] == [
        len(by_step[step]) for step in (1, 3, 5, 7)
    ]


def poison(monkeypatch: pytest.MonkeyPatch, *, step: int) -> None:
    """Client 1 brings NaN to the round after so many steps."""
    request = LocalLink.request

    async def poisoned(self: LocalLink, message: Message) -> Message:
        if message.kind == "round" and message.sender == "client-1" and message.step == step:
            message = replace(message, tensors={n: torch.full_like(t, math.nan) for n, t in message.tensors.items()})
        return await request(self, message)

    monkeypatch.setattr(LocalLink, "request", poisoned)


def test_a_round_with_too_few_usable_updates_is_void_and_the_next_counts_all_steps(
    folder: Path, tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, step=2)
    least = "rounds.participation={minimum: 3}"
    adapter = run(folder, tmp_path, *TREES["two tiers"], LOCAL, "rounds.cloud_every=2", least)
    first, second = rounds_in(tmp_path / "run")
    assert first["void"] == "2 usable updates, where rounds.participation.minimum is 3"
    assert second["void"] is None and second["updates"] == 3
    assert "the round of cloud is void" in capsys.readouterr().out
    values = seen.of_clients(4, since=0)
    name = next(name for name in adapter if ".h.0." in name)
    total = sum(labels for _, labels in values.values())
    mean = sum(value[f"adapter/{name}"].double() * (labels / total) for value, labels in values.values())
    assert torch.allclose(adapter[name].double(), mean, atol=1e-7)  # type: ignore[arg-type]


def test_where_the_last_round_is_void_what_the_one_before_gave_comes_out(
    folder: Path, tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no client's own adapter, which it has trained on since."""
    poison(monkeypatch, step=4)
    least = "rounds.participation={minimum: 3}"
    adapter = run(folder, tmp_path, *TREES["two tiers"], LOCAL, "rounds.cloud_every=2", least)
    assert [report["void"] is None for report in rounds_in(tmp_path / "run")] == [True, False]
    (given,) = [reply.tensors for m, reply in seen.messages if m.sender == "client-0" and m.step == 2]
    of_clients = {name for name in adapter if ".h.0." in name or ".h.1." in name}
    assert {f"adapter/{name}" for name in of_clients} == set(given)
    assert all(torch.equal(adapter[name], given[f"adapter/{name}"]) for name in of_clients)


@pytest.mark.parametrize("policy", each_fast("oort", slow=["random"]))
def test_who_takes_part_is_the_same_in_a_resumed_run(folder: Path, tmp_path: Path, seen: Seen, policy: str) -> None:
    some = [f"rounds.participation={{policy: {policy}, share: 0.5}}", "train.checkpoint_every=1", "train.steps=6"]
    every = [*TREES["three tiers"], LOCAL, "rounds.edge_every=1", "rounds.cloud_every=2", "rounds.weights=equal", *some]
    adapter = run(folder, tmp_path, *every)
    import shutil

    for kept in (tmp_path / "run" / "checkpoints").iterdir():
        if kept.name != "step-5":
            shutil.rmtree(kept)
    before, seen.labels = takes_part(seen), {}
    train(load_recipe(folder / "recipe.yaml", every), tmp_path / "run", resume=True)
    assert takes_part(seen) == {5: before[5]}
    resumed = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name], resumed[name]) for name in adapter)


@pytest.mark.parametrize("tiers", ["[edge, cloud]", "[client]"])
def test_tiers_that_do_not_train_take_part_without_an_adapter(folder: Path, tmp_path: Path, tiers: str) -> None:
    every = [*TREES["three tiers"], LOCAL, "rounds.edge_every=1", "rounds.cloud_every=2", f"lora.tiers={tiers}"]
    adapter = run(folder, tmp_path, *every, "train.verify_adapter=true")
    assert {name.split(".h.")[1][0] for name in adapter} == ({"1", "2", "3"} if "edge" in tiers else {"0"})
