"""The comparison of paradigms: recipes that differ by their cuts alone, runs that are not repeated, and its chart."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import chart
import compare_paradigms as compare
import pytest
import torch
from safetensors.torch import save_file

from splitllm.recipe import Recipe, changed_keys, dump_recipe, goes_by_rounds, load_recipe

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
CELL = compare.Cell("e2e", "split", 4, 1.6e-2, 0)


def recipe_of(cell: compare.Cell) -> Recipe:
    return compare.recipe_of(cell, {}, Path("stories"), {})


def test_the_base_loads_as_its_first_line_says() -> None:
    path = ROOT / "recipes" / "compare" / "base.yaml"
    words = shlex.split(path.read_text(encoding="utf-8").splitlines()[0][2:])
    assert words[:3] == ["splitllm", "train", "recipes/compare/base.yaml"]
    assert not goes_by_rounds(load_recipe(path))


def test_paradigms_differ_in_cuts_and_rounds_alone_and_see_as_many_rows_a_step() -> None:
    recipes = {name: recipe_of(replace(CELL, paradigm=name)) for name in compare.paradigms()}
    assert list(recipes) == ["centralised", "federated", "split", "hierarchical"]
    for recipe in recipes.values():
        changed = {line.split(":")[0] for line in changed_keys(recipes["centralised"], recipe)}
        assert all(key.startswith(("split.", "rounds.")) or key == "train.accumulate" for key in changed)
        assert recipe.split.tiers["client"] * recipe.train.accumulate * recipe.train.batch_size == 8
    edges, tops = recipes["hierarchical"].rounds.edge_every, recipes["hierarchical"].rounds.cloud_every
    assert edges == 10 and tops is not None and tops > edges


@pytest.mark.parametrize("variant", compare.VARIANTS)
def test_every_variant_is_another_recipe_than_its_paradigm(variant: str) -> None:
    paradigm, keys = compare.VARIANTS[variant]
    cell = replace(CELL, paradigm=paradigm)
    changed = changed_keys(recipe_of(cell), recipe_of(replace(cell, variant=variant)))
    assert changed and all(line.startswith(tuple(keys)) for line in changed)


def test_a_run_counts_as_done_with_a_summary_of_the_same_recipe_wherever_its_rows_lay(tmp_path: Path) -> None:
    recipe = recipe_of(CELL)
    assert not compare.is_done(recipe, tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert not compare.is_done(recipe, tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    assert compare.is_done(compare.recipe_of(CELL, {"data.source": "elsewhere.jsonl"}, Path("stories"), {}), tmp_path)
    assert not compare.is_done(recipe_of(replace(CELL, rank=8)), tmp_path)


def test_a_client_trains_what_lies_below_its_cut(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    shapes = {"lora_A": (4, 64), "lora_B": (64, 4)}
    names = [f"model.layers.{block}.self_attn.q_proj.{side}.weight" for block in range(5) for side in shapes]
    tensors = {name: torch.zeros(shapes[name.split(".")[-2]]) for name in names}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    numbers = {p: compare.client_numbers(recipe_of(replace(CELL, paradigm=p)), tmp_path) for p in compare.paradigms()}
    assert numbers == {"centralised": 2560, "federated": 2560, "split": 512, "hierarchical": 512}


def test_rates_go_on_until_the_largest_is_not_the_best_which_is_kept_for_the_other_seeds() -> None:
    asked = []

    def run(cell: compare.Cell) -> compare.Outcome:
        asked.append((cell.rate, cell.seed))
        return compare.Outcome(abs(cell.rate - 0.02) + cell.seed, 512, 10 + cell.seed, 0)

    options = Namespace(seeds=[0, 1], rates=[0.01, 0.02])
    found = compare.choose(run, options, "e2e", "split", 4)
    assert asked == [(0.01, 0), (0.02, 0), (0.04, 0), (0.02, 1)]
    assert found["rate"] == 0.02 and found["losses"] == [0.0, 1.0] and found["up"] == 10.5


def test_the_table_names_the_lowest_loss_of_each_rank_and_compares_with_centralised() -> None:
    same = {"data": "e2e", "rank": 1, "rate": 0.01, "numbers": 5, "up": 2e6, "down": 0.0, "error": 0.0}
    results = [
        {**same, "paradigm": "centralised", "losses": [2.0, 2.0]},
        {**same, "paradigm": "federated", "losses": [2.2, 2.0]},
        {**same, "paradigm": "split", "losses": [1.9, 1.9]},
    ]
    lines = "\n".join(compare.result_table(results, "e2e"))
    assert "| 1 | federated | 2.1000 ± 0.1414 | +5.00% | 0.01 |  | 5 | 2.00 | 0 |" in lines
    assert "| split | **1.9000 ± 0.0000** | -5.00% |" in lines


def test_the_chart_is_svg_with_a_line_a_paradigm_and_a_mark_a_point(tmp_path: Path) -> None:
    points = [chart.Point("1", 2.0, 1.9, 2.1), chart.Point("2", 1.8, 1.8, 1.8)]
    panels = [chart.Panel("R & D", {"split": points, "federated": points}, "rank", "loss")] * 2
    chart.write_chart(tmp_path / "x.svg", panels)
    tags = [element.tag.rpartition("}")[2] for element in ElementTree.parse(tmp_path / "x.svg").iter()]
    assert tags.count("polyline") == 4 and tags.count("circle") == 8
    for element in ElementTree.parse(tmp_path / "x.svg").iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 < float(element.attrib["cx"]) < 2 * chart.WIDTH and 0 < float(element.attrib["cy"]) < chart.HEIGHT


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data beside the checkout")
def test_rows_are_the_same_every_time_and_no_row_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    for name in compare.DATA:
        for folder in (tmp_path / "one", tmp_path / "two"):
            folder.mkdir(exist_ok=True)
            compare.write_rows(SHARED, folder, name)
        files = [(tmp_path / each / f"{name}-{key}.jsonl") for key in ("source", "eval") for each in ("one", "two")]
        source, again, held, held_again = (file.read_text(encoding="utf-8") for file in files)
        assert source == again and held == held_again
        rows, aside = source.splitlines(), held.splitlines()
        assert (len(rows), len(aside)) == (compare.ROWS, compare.HELD_OUT)
        assert not set(rows) & set(aside)
        assert all(json.loads(row)["owner"] for row in rows)
