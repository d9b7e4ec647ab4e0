"""How roles come to their parts in rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from splitllm.model.lora import adapter_shapes, block_of, matched_modules
from splitllm.recipe import load_recipe
from splitllm.roles import rounding
from splitllm.roles.rounds import Rounds
from tests.tiny import write_recipe


def test_a_tensor_s_block_is_worked_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["rounds.replicas=local", "rounds.cloud_every=2"])
    config = AutoConfig.from_pretrained(tmp_path / "base")
    asked = list[str]()

    def look(config: object, name: str) -> int:
        asked.append(name)
        return block_of(config, name)  # type: ignore[arg-type]

    monkeypatch.setattr(rounding, "block_of", look)
    modules = matched_modules(config, None)
    of_run = rounding.Rounding(recipe, config, modules)
    names = list(adapter_shapes(config, recipe.lora, modules))
    for _ in range(3):
        local = of_run.local({})
        assert local is not None
        assert sorted({local.block(name) for name in names}) == [0, 1, 2, 3]
    assert len(asked) == len(names)


@pytest.mark.parametrize("lanes", [False, True], ids=["one gate", "lanes"])
def test_the_top_alone_keeps_what_it_hands_out_of_all_that_rounds_average(tmp_path: Path, lanes: bool) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["rounds.replicas=local", "rounds.cloud_every=2"])
    config = AutoConfig.from_pretrained(tmp_path / "base")
    of_run = rounding.Rounding(recipe, config, matched_modules(config, None), lanes=lanes)

    def of(name: str, level: int) -> Rounds:
        found = of_run.in_hall(name, level) if lanes else of_run.of(name, level, None, {})
        assert found is not None and found.averager is not None
        return found

    assert of("edge", 1).decided() == {}
    top, (a, b) = of("cloud", 2), (f"base_model.model.transformer.h.0.attn.c_attn.lora_{side}.weight" for side in "AB")
    assert {name.split(".h.")[1][0] for name in top.decided()} == {"0"}, (
        "of the other blocks one role alone has an adapter"
    )
    before = top.decided()
    top.averager.handed_out({f"adapter/{b}": torch.full_like(before[b], 3.0)})  # type: ignore[union-attr]
    assert torch.equal(top.decided()[b], torch.full_like(before[b], 3.0)) and torch.equal(top.decided()[a], before[a])
    again = of("cloud", 2)
    again.averager.load(top.averager.state())  # type: ignore[union-attr]
    assert all(torch.equal(tensor, again.decided()[name]) for name, tensor in top.decided().items())
