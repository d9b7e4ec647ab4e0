"""How roles come to their parts in rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from splitllm.model.lora import adapter_shapes, block_of, matched_modules
from splitllm.recipe import load_recipe
from splitllm.roles import rounding
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
