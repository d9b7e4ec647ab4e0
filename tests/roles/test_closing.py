"""What everybody steps by: norms of what is together, and of each client by itself; and who makes no step."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import DivergedError, PeerError
from splitllm.model.randomness import MicroBatchId
from splitllm.model.trainable import Trainable
from splitllm.roles.closing import Closing, Settled, apply, scale_of, settle
from splitllm.roles.together import LARGEST_NORM
from splitllm.roles.worker import Worker
from splitllm.wire.message import Message
from tests.families import corpus, roles_of
from tests.roles.test_batching import wanted

NORMS = st.none() | st.floats(0, LARGEST_NORM)


def closing(own: dict[int, list[float | None]], **more: Any) -> Closing:
    return Closing(own=own, losses={client: [1.0, 2, 3] for client in own}, **more)


def test_each_client_is_scaled_and_clipped_by_itself() -> None:
    settled = settle(0, closing({0: [9.0, 16.0], 1: [0.25]}), {}, 1.0, {0: 2.0, 1: 1.0})
    assert settled.norm == pytest.approx(math.hypot(10.0, 0.5))
    assert settled.own[0] == pytest.approx(2.0 * 1.0 / 10.0) and settled.own[1] == 1.0
    assert settled.factor == 1.0, "nothing is trained together"


def test_who_has_no_finite_gradients_makes_no_step_and_counts_for_nobody() -> None:
    alone = settle(0, closing({1: [4.0]}), {}, 1.0, {1: 1.0})
    both = settle(0, closing({0: [1.0, None], 1: [4.0]}), {}, 1.0, {0: 1.0, 1: 1.0})
    assert both.own == {0: None, 1: alone.own[1]} and both.norm == alone.norm


@pytest.mark.parametrize("common", [{"norms": {"a": None}}, {"sums": {"a": torch.tensor([math.nan])}}])
def test_what_is_trained_together_must_be_finite(common: dict[str, Any]) -> None:
    found = closing({0: [1.0]}, **common)
    with pytest.raises(DivergedError, match="step 4: the gradient norm is"):
        settle(3, found, found.sums, 1.0, {0: 1.0})


@given(
    own=st.dictionaries(st.integers(0, 3), st.lists(NORMS, max_size=4), max_size=4),
    scale=st.floats(1e-3, 1e7),
    clip=st.none() | st.floats(1e-3, 1e3),
)
def test_whatever_norms_clients_tell_the_others_factors_stay_and_all_of_it_travels(
    own: dict[int, list[float | None]], scale: float, clip: float | None
) -> None:
    """Squared norms up to the largest that may travel, of clients whose few labels are scaled up."""
    scales = dict.fromkeys([*own, 7], scale)
    alone = settle(0, closing({7: [4.0]}), {}, clip, scales)
    settled = settle(0, closing({**own, 7: [4.0]}), {}, clip, scales)
    assert settled.own[7] == alone.own[7]
    reply = Message("close", "cloud", (0, 0, 0), json.loads(json.dumps(settled.header(scales), allow_nan=False)))
    assert Settled.from_reply(reply, closing({**own, 7: [4.0]})) == settled


def test_what_comes_down_goes_only_to_the_roles_above_a_client() -> None:
    settled = settle(0, closing({0: [1.0], 1: [4.0]}), {}, None, {0: 1.0, 1: 1.0})
    assert settled.header([1])["own"] == {1: 1.0}


@pytest.mark.parametrize("own", [{}, {"0": 1.0, "1": 1.0}, {"x": 1.0}, {"0": "1"}, [1.0]])
def test_factors_of_other_clients_are_refused(own: Any) -> None:
    reply = Message("close", "cloud", (0, 0, 0), {"norm": 1.0, "factor": 1.0, "own": own})
    with pytest.raises(PeerError, match="as own"):
        Settled.from_reply(reply, closing({0: [1.0]}))


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_clients_gradients_are_those_of_the_mean_over_its_own_labels(own: int, others: int) -> None:
    weight = 1.0 / (own + others)
    assert weight * own * scale_of(weight, own) == pytest.approx(1.0)
    assert scale_of(0.0, 0) == 1.0


def test_without_finite_gradients_neither_adapter_nor_moments_change() -> None:
    settings = wanted("gpt2", [2], "cloud", 2, "float64", lora={"adapters": "per_client"})
    worker = next(iter(roles_of(settings, corpus(2)).workers["cloud"].values()))
    for value in (1.0, math.nan, 2.0):
        before = {client: _state(own) for client, own in worker.own.items()}
        _learn(worker, {0: 0.5, 1: value})
        after = {client: _state(own) for client, own in worker.own.items()}
        assert (before[1] == after[1]) == math.isnan(value) and before[0] != after[0]
    assert {int(v) for key, v in worker.own[1].state().items() if key.startswith("step/")} == {2}


def _state(trainable: Trainable) -> dict[str, list[Any]]:
    return {name: tensor.flatten().tolist() for name, tensor in trainable.state().items()}


def _learn(worker: Worker, values: dict[int, float]) -> None:
    """One step with gradients that are this everywhere."""
    ids = [MicroBatchId(0, client, 0) for client in values]
    worker.expect(ids)
    for client, value in values.items():
        for parameter in worker.own[client].parameters.values():
            parameter.grad = torch.full_like(parameter, value)
        worker.own[client].collect([ids[client]])
    found = Closing(losses={client: [1.0, 1, 1] for client in values})
    found.hand_in(worker, (), values)
    apply(worker, settle(0, found, {}, None, dict.fromkeys(values, 1.0)), 1.0)
