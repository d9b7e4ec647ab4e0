"""Lanes that ask nothing for long give way on the device, and come back as they were."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from splitllm.errors import RejoinError
from splitllm.model.trainable import Trainable
from tests.roles.test_lanes import joined, lanes_of, raises, said, trains, tree
from tests.roles.tree import Tree

__all__ = ["tree"]
AFTER = 0.08


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where adapters were taken."""
    seen: list[str] = []
    move = Trainable.move

    def note(self: Trainable, device: torch.device) -> None:
        move(self, device)
        seen.append(device.type)

    monkeypatch.setattr(Trainable, "move", note)
    return seen


def test_who_is_idle_is_parked_once_and_brought_back_with_its_next_request(tree: Tree, moved: list[str]) -> None:
    async def test() -> None:
        lanes = lanes_of(tree, "cloud", [], park_after=AFTER)
        generation = await joined(lanes, 0)
        opening = replace(said("open", 0, labels={"0": [1]}), generation=generation)
        await lanes.handle(opening)
        assert not moved
        await asyncio.sleep(3 * AFTER)
        assert len(moved) == len(lanes.gates)  # the others have asked nothing at all
        await raises(lanes.handle(opening), RejoinError)  # the step that it left open is run again
        assert len(moved) == len(lanes.gates) + 1
        await trains(lanes, 0, await joined(lanes, 0))

    asyncio.run(test())


def test_without_the_key_nobody_is_parked(tree: Tree, moved: list[str]) -> None:
    async def test() -> None:
        await joined(lanes_of(tree, "cloud", []), 0)
        await asyncio.sleep(2 * AFTER)

    asyncio.run(test())
    assert not moved


def test_what_is_moved_is_the_adapter_with_its_optimiser_and_no_open_step(tree: Tree) -> None:
    mine = tree.pasts["cloud"].worker.own[0]
    mine.apply({name: torch.ones_like(p) for name, p in mine.parameters.items()}, 1.0, 1.0)
    before = {name: tensor.clone() for name, tensor in mine.state().items()}
    mine.expect([])
    mine.move(torch.device("cpu"))
    after = mine.state()
    assert len(before) == 4 * len(mine.parameters)
    assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert mine.gradients() == {}
