"""Which tiers hold their frozen linear layers in fewer bits: its short forms, what does not go with it, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from splitllm.recipe.round_misfits import Misfit

if TYPE_CHECKING:
    from splitllm.recipe.schema import QuantizationRecipe, Recipe

METHODS = ("nf4", "int8")
SHORT_FORM = "nf4 or int8 for all tiers, a mapping of tiers, such as {edge: nf4}, or {} for none"
SHORT_FORM_OF_TIER = "nf4 or int8, or a mapping such as {method: nf4, double: true}"


def for_all_tiers(recipe: Any) -> Any:
    """A recipe as it was read, with `quantization: nf4` written out for every tier."""
    if not isinstance(recipe, dict) or recipe.get("quantization") not in METHODS:
        return recipe
    split = recipe.get("split")
    tiers = split.get("tiers") if isinstance(split, dict) else None
    method = recipe["quantization"]
    return recipe | {"quantization": dict.fromkeys(tiers, method) if isinstance(tiers, dict) else {}}


def quantization_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """Yields what does not go with tiers of quantised weights: the keys involved and the complaint."""
    for tier, how in recipe.quantization.items():
        place = f"quantization.{tier}"
        keys: tuple[str, ...] = ("quantization", "split.tiers")
        if tier not in recipe.split.tiers:
            known = ", ".join(recipe.split.tiers)
            yield keys, f"{place}: {tier!r} is not a tier of split.tiers; use some of {known}"
            continue
        if how.double and how.method != "nf4":
            yield ("quantization",), f"{place}.double: true is for nf4, not {how.method}; leave it out"
        yield from _dora_misfits(recipe, tier, place)
    yield from _dtype_misfits(recipe)
    yield from _cut_misfits(recipe)


def _dtype_misfits(recipe: Recipe) -> Iterator[Misfit]:
    if recipe.quantization and recipe.model.dtype == "float64":
        why = f"has no products in float64, which are asked for on {', '.join(recipe.quantization)}"
        advice = "use model.dtype: float32 or bfloat16, or quantization: {}"
        yield ("quantization", "model.dtype"), f"quantization: bitsandbytes {why}; {advice}"


def _dora_misfits(recipe: Recipe, tier: str, place: str) -> Iterator[Misfit]:
    if recipe.lora.dora and (recipe.lora.tiers is None or tier in recipe.lora.tiers):
        why = "takes the norms of frozen weights, which are others once these are quantised"
        advice = "use lora.dora: false, or leave this tier out"
        yield ("quantization", "lora.dora", "lora.tiers"), f"{place}: lora.dora {why}; {advice}"


def _cut_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """A block that some clients hold themselves and others leave to the tier above has to be the same on both."""
    below, *above = recipe.split.tiers
    if not recipe.split.client_cuts or not above:
        return
    if recipe.quantization.get(below) != recipe.quantization.get(above[0]):
        why = f"has to be on {below} as on {above[0]}, since with split.client_cuts both hold some of the same blocks"
        advice = "write the same for both, or leave both out, or use split.client_cuts: {}"
        yield ("quantization", "split.client_cuts"), f"quantization: {why}; {advice}"


def quantization_line(recipe: Recipe) -> str:
    """Which tiers hold what, in one line."""
    said = ", ".join(f"{tier} {_words(how)}" for tier, how in recipe.quantization.items())
    return f"{said}; of blocks the linear layers alone, not norms, embeddings and head"


def _words(how: QuantizationRecipe) -> str:
    extra = ["scales quantised, too"] if how.double else []
    extra += [f"computed in {how.compute_dtype}"] if how.compute_dtype else []
    return how.method + (f" ({', '.join(extra)})" if extra else "")
