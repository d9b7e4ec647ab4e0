"""What rounds add to a role: as much as real roles keep, or at most what a real run comes to."""

from __future__ import annotations

import asyncio
from itertools import product
from typing import Any

import pytest

from splitllm.recipe import Recipe
from splitllm.roles.assembly import Roles
from splitllm.roles.round_ledger import RoundsHeld, rounds_held
from splitllm.roles.worker import Worker
from tests.families import corpus, roles_of
from tests.grids import cases
from tests.roles.test_ledger import ledger, model, wanted


def asked(**rounds: Any) -> Recipe:
    return wanted(rounds={"replicas": "local", "edge_every": 1, "cloud_every": 2, **rounds})


def held(recipe: Recipe, name: str) -> RoundsHeld:
    return rounds_held(recipe, *model("gpt2"), name, ledger(recipe).of(name).adapters)


def workers(roles: Roles) -> dict[str, Worker]:
    return {name: worker for each in roles.workers.values() for name, worker in each.items()}


def run(recipe: Recipe) -> Roles:
    """All steps, as in one process."""
    roles = roles_of(recipe, corpus(2))

    async def steps() -> None:
        for step in range(recipe.train.steps):
            await asyncio.gather(*(client.step(step) for client in roles.clients))

    asyncio.run(steps())
    return roles


def test_without_rounds_there_is_nothing() -> None:
    assert held(wanted(), "edge-0") == RoundsHeld()
    assert ledger(wanted()).of("edge-0").rounds == ledger(wanted()).together.rounds == 0


@pytest.mark.parametrize("prox", [0.0, 0.1])
def test_anchors_are_as_large_as_what_trains(prox: float) -> None:
    recipe = asked(prox=prox)
    for name, worker in workers(roles_of(recipe, corpus(2))).items():
        anchor = sum(t.nbytes for t in worker.trainable.anchor().values()) if prox else 0
        assert held(recipe, name).anchors == anchor


@pytest.mark.parametrize(
    ("clip", "outer"),
    cases(
        product((None, 100.0), ("none", "fedavgm", "fedadam")), lambda clip, outer: (clip is None) == (outer == "none")
    ),
)
def test_servers_keep_what_they_gave_out_and_the_top_its_moments(clip: float | None, outer: str) -> None:
    recipe = asked(clip_update=clip, outer={"name": outer})
    for name, worker in workers(run(recipe)).items():
        kept = 0 if worker.kept is None else sum(tensor.nbytes for tensor in worker.kept.state().values())
        if worker.kept is not None:
            kept -= sum(t.nbytes for key, t in worker.kept.state().items() if key.startswith("participation/"))
        assert held(recipe, name).kept >= kept, name
        assert held(recipe, name).kept == kept or name.startswith("edge"), name  # an edge looks at no moments


@pytest.mark.parametrize("rule", ["fedex", "flora"])
def test_what_is_frozen_stays_within_what_was_predicted(rule: str) -> None:
    recipe = asked(rule=rule)
    for name, worker in workers(run(recipe)).items():
        assert worker.frozen is not None
        frozen = sum(t.nbytes for t in (*worker.frozen.state().values(), *worker.frozen.whole().values()))
        assert frozen <= held(recipe, name).frozen, name
        assert (frozen > 0) == (name != "cloud"), "its blocks are trained by nobody else"


def test_a_server_holds_the_values_of_all_its_children() -> None:
    plain, averaged = asked(), asked(moments="average")
    assert held(plain, "cloud").values > held(plain, "edge-0").values > held(plain, "client-0").values > 0
    assert held(averaged, "cloud").values == 3 * held(plain, "cloud").values


def test_a_coordinator_of_whole_models_is_counted_in_one_process() -> None:
    recipe = wanted(cuts=(), rounds={"replicas": "local", "cloud_every": 1})
    apart = sum(parts.rounds for parts in ledger(recipe).roles().values())
    assert ledger(recipe).together.rounds > apart > 0
