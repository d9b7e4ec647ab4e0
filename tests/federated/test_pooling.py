"""Averages for another engine: by the rules of the edges' recipe, what our own engine would hand out."""

from __future__ import annotations

import pytest
import torch

from splitllm.errors import AverageError, PeerError
from splitllm.federated.averager import Averager, Limits
from splitllm.federated.outer import Outer
from splitllm.federated.pooling import Arrays, Offer, Pooling, Rules, unviewed, viewed
from splitllm.federated.rounds import Arithmetic, Tensors, Update

FEDADAM = Outer("fedadam", 0.1, (0.9, 0.99), 1e-3)
ROLES = [
    Rules(Arithmetic("fedavg")),
    Rules(Arithmetic("fedex", scale=2.0)),
    Rules(Arithmetic("flora")),
    Rules(Arithmetic("median")),
    Rules(Arithmetic("fedavg"), Limits(clip=0.5), FEDADAM),
]


def value(seed: int, dtype: torch.dtype = torch.float32, blocks: int = 2) -> Tensors:
    drawn = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for block in range(blocks):
        made[f"adapter/h.{block}.lora_A.weight"] = torch.randn((4, 8), generator=drawn).to(dtype)
        made[f"adapter/h.{block}.lora_B.weight"] = torch.randn((6, 4), generator=drawn).to(dtype)
    return made


def offer(tensors: Tensors, step: int, weight: float = 1.0, rules: Rules = ROLES[0]) -> Offer:
    views, bfloat16 = viewed(tensors)
    arrays: Arrays = {name: tensor.numpy() for name, tensor in views.items()}
    return Offer(step, weight, False, rules.text(), arrays, bfloat16)


def back(outcome: tuple[Arrays, list[str]]) -> Tensors:
    return unviewed({name: torch.from_numpy(array) for name, array in outcome[0].items()}, outcome[1])


@pytest.mark.parametrize("rules", ROLES, ids=lambda rules: rules.arithmetic.rule + ("-outer" if rules.outer else ""))
def test_outcomes_are_those_of_our_own_engine_to_the_bit(rules: Rules) -> None:
    begun = value(0)
    start = begun if rules.look_at_changes else {}
    pooling, averager = Pooling(), Averager(rules.arithmetic, rules.limits, rules.outer, start)
    if rules.look_at_changes:
        outcomes, _ = pooling.outcomes({name: offer(begun, 0, 1.0, rules) for name in ("edge-0", "edge-1")})
        assert all(torch.equal(back(outcomes["edge-1"])[name], tensor) for name, tensor in begun.items())
    for step in (1, 2, 3):
        held = {"edge-1": value(2 * step), "edge-0": value(2 * step + 1)}
        offers = {name: offer(held[name], step, 1.0 + index, rules) for index, name in enumerate(held)}
        outcomes, told = pooling.outcomes(offers)
        updates = [Update(name, offers[name].weight, held[name]) for name in sorted(held)]
        wanted = averager.settle(averager.combine(updates)[0].value)
        averager.handed_out(wanted)
        assert "error" in told
        for name in held:
            found = back(outcomes[name])
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_an_edge_gets_what_is_of_its_own_layers_in_its_own_dtype() -> None:
    held = {"edge-0": value(1, torch.bfloat16), "edge-1": value(2, torch.bfloat16, blocks=1)}
    outcomes, _ = Pooling().outcomes({name: offer(tensors, 1) for name, tensors in held.items()})
    for name, tensors in held.items():
        assert {key: tensor.dtype for key, tensor in back(outcomes[name]).items()} == {
            k: t.dtype for k, t in tensors.items()
        }
    alone = "adapter/h.1.lora_A.weight"
    assert torch.equal(back(outcomes["edge-0"])[alone], held["edge-0"][alone])


def test_who_diverged_is_left_out_by_name_and_goes_on_from_the_others() -> None:
    held = {"edge-0": value(1), "edge-1": {name: t * float("nan") for name, t in value(2).items()}}
    outcomes, told = Pooling().outcomes({name: offer(tensors, 1) for name, tensors in held.items()})
    assert "without edge-1 (not finite)" in told
    assert all(torch.equal(back(outcomes["edge-1"])[name], tensor) for name, tensor in held["edge-0"].items())


def test_the_tenth_edge_is_added_after_the_ninth() -> None:
    offers = {f"edge-{number}": offer(value(number), 1) for number in (10, 2, 9)}
    assert list(Pooling().outcomes(offers)[0]) == ["edge-2", "edge-9", "edge-10"]


def test_different_recipes_end_the_run() -> None:
    pooling = Pooling()
    with pytest.raises(AverageError, match=r"edge-0, edge-1 have different rules; use one recipe everywhere"):
        pooling.outcomes({"edge-0": offer(value(1), 1), "edge-1": offer(value(1), 1, 1.0, ROLES[1])})
    pooling.outcomes({"edge-0": offer(value(1), 1)})
    with pytest.raises(AverageError, match="different rules"):
        pooling.outcomes({"edge-0": offer(value(1), 2, 1.0, ROLES[1])})


def test_rules_that_look_at_changes_need_the_start() -> None:
    with pytest.raises(AverageError, match="nobody told what the edges started from"):
        Pooling().outcomes({"edge-0": offer(value(1), 5, 1.0, ROLES[-1])})


@pytest.mark.parametrize("rules", ROLES, ids=str)
def test_rules_travel(rules: Rules) -> None:
    assert Rules.of(rules.text()) == rules


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"outer": null, "limits": {"x": 1}, "arithmetic": {}}'])
def test_rules_of_another_version_are_refused(text: str) -> None:
    with pytest.raises(PeerError, match="use the same splitllm everywhere"):
        Rules.of(text)
