"""A recipe from its file, back to text, and compared with another; every problem of a file is reported at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from splitllm.errors import RecipeError
from splitllm.recipe.problems import explain, locations
from splitllm.recipe.rounds import goes_by_rounds, what_leaves_in_rounds
from splitllm.recipe.schema import Recipe
from splitllm.recipe.text import apply_overrides, read_mapping


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file.
        overrides: `key.path=value`, the value in YAML; later ones win.

    Raises:
        RecipeError: with every problem found, one line each.
    """
    raw, problems = read_mapping(path)
    problems += apply_overrides(raw if raw is not None else {}, overrides)
    if raw is None:
        raise _refusal(problems)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise _refusal(problems + explain(error, Recipe) + _problems_behind(raw, error)) from None
    if problems:
        raise _refusal(problems)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load_recipe` reads it back to an equal recipe."""
    values = recipe.model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # YAML folds some characters that end a line for Unicode (U+0085, U+2028), unless they are escaped.
    return text if yaml.safe_load(text) == values else yaml.safe_dump(values, sort_keys=False)


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """The keys in which two recipes differ, as `train.steps: 100 -> 200`, in the order of the recipe."""
    before, after = (
        {key: json.dumps(value, ensure_ascii=False) for key, value in leaves(recipe)} for recipe in (old, new)
    )
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key below `section` with its value, as `train.steps` and 200, in the order of the recipe."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            yield f"{prefix}{name}", {key: _plain(entry) for key, entry in value.items()}
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def what_leaves_the_device(recipe: Recipe) -> str:
    """Says in one line what a run of this recipe sends away from its bottom tier."""
    (name, count), *above = recipe.split.tiers.items()
    trains = recipe.lora.tiers is None or name in recipe.lora.tiers
    if not above:
        if count > 1 and trains and goes_by_rounds(recipe):
            what = what_leaves_in_rounds(recipe)
            return f"only {what} leaves each {name}: {count} of them train the whole model in place"
        if count > 1 and trains:
            return f"only adapter gradients leave each {name}: the whole model is trained in place on {count} of them"
        return "nothing leaves the device: the whole model is trained in place"
    cuts = sorted({recipe.split.cuts[0], *recipe.split.client_cuts.values()})
    leaving = [f"activations at the cut (block {' or '.join(map(str, cuts))})"]
    if trains:
        together = count > 1 and recipe.lora.adapters == "shared" and not goes_by_rounds(recipe)
        leaving.append("gradients of its adapter" if together else "the norms of its adapter's gradients")
        leaving += [what_leaves_in_rounds(recipe)] if goes_by_rounds(recipe) else []
    if recipe.split.labels == "cloud":
        leaving.append("the lengths and labelled positions of rows")
        return f"{_listed(leaving)} leave the {name}, and so do the target token ids, which are text"
    leaving += ["loss gradients of the last hidden states", "the lengths and labelled positions of rows"]
    caveat = "token ids stay, but whoever knows the head can work out targets from those loss gradients"
    return f"{_listed(leaving)} leave the {name}; {caveat}"


def what_leaves_in_a_deployment(recipe: Recipe) -> str:
    """The same line for roles on several machines, where the top also collects metrics and the adapter."""
    line = what_leaves_the_device(recipe)
    name, *above = recipe.split.tiers
    if not above:
        return line
    line = f"{line}; the loss and the number of labels of each step and evaluation go up as well"
    if recipe.lora.tiers is None or name in recipe.lora.tiers:
        out = (
            "one adapter"
            if recipe.lora.adapters == "shared" or goes_by_rounds(recipe)
            else f"an adapter of each {name}"
        )
        line += f", and at the end so does the adapter of the {name}: {out} for the whole model comes out at the top"
    return line


def _refusal(problems: list[str]) -> RecipeError:
    """The error for `problems`, each kept on one line whatever characters its keys and values hold."""
    return RecipeError(["".join(c if c.isprintable() else repr(c)[1:-1] for c in problem) for problem in problems])


_PLACEHOLDERS: dict[str, dict[str, Any]] = {
    "model": {"base": "-"},
    "split": {"tiers": {"client": 1}, "labels": "client"},
    "data": {"source": "-"},
}


def _problems_behind(raw: dict[str, Any], error: ValidationError) -> list[str]:
    """What more is wrong, between the keys that `error` does not complain about."""
    mended = copy.deepcopy(raw)
    broken = locations(error)
    if not any(broken):
        return []
    for *above, last in broken:
        section: Any = mended
        for key in above:
            section = section[key]
        if section is not None:
            section.pop(last, None)
    for name, required in _PLACEHOLDERS.items():
        mended[name] = required | (mended.get(name) or {})
    try:
        Recipe.model_validate(mended, context={"broken": frozenset(".".join(location) for location in broken)})
    except ValidationError as behind:
        return explain(behind, Recipe)
    return []


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
