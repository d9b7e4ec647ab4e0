"""The tree of roles that a recipe asks for: what each is called, and who hangs on whom.

A role is called after its tier, with its index (`edge-0`) where the tier has several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from splitllm.errors import RecipeError

if TYPE_CHECKING:
    from splitllm.recipe.schema import Recipe

_INDEXED = re.compile(r"(?P<tier>.+)-(?P<index>0|[1-9][0-9]{0,17})")
LISTED = 4
"""Of a tier with more roles than this a message names the first and the last."""


def role_names(recipe: Recipe) -> dict[str, list[str]]:
    """The roles of every tier, bottom-up."""
    tiers = recipe.split.tiers
    return {tier: [_name(tier, count, index) for index in range(count)] for tier, count in tiers.items()}


def client_names(recipe: Recipe) -> list[str]:
    """The clients, by number."""
    return next(iter(role_names(recipe).values()))


def tier_of(recipe: Recipe, name: str) -> tuple[int, int]:
    """Which role `name` is: the number of its tier, 0 for the lowest, and its index there.

    Raises:
        RecipeError: `split.tiers` has no such role.
    """
    found = find_role(recipe.split.tiers, name)
    if found is None:
        raise RecipeError(
            [f"name {name!r}: split.tiers has no such role; use one of {known_roles(recipe.split.tiers)}"]
        )
    return found


def command_of(recipe: Recipe, name: str) -> str:
    """The command that runs a role: `client` in the lowest tier, `cloud` in the highest, `edge` between them.

    Raises:
        RecipeError: `split.tiers` has no role `name`.
    """
    tier, _ = tier_of(recipe, name)
    if tier == 0:
        return "client"
    return "cloud" if tier + 1 == len(recipe.split.tiers) else "edge"


def role_in_tier(recipe: Recipe, place: str, name: str | None) -> str:
    """The role meant by one of the commands client (`bottom`), edge (`middle`) and cloud (`top`).

    Raises:
        RecipeError: `name` is missing where there are several, or is a role of another place.
    """
    names = list(role_names(recipe).values())
    choices = {"bottom": names[:1], "middle": names[1:-1], "top": names[1:][-1:]}[place]
    there = [role for tier in choices for role in tier]
    if name is None and len(there) == 1:
        return there[0]
    if name is None or name not in there:
        given = "missing" if name is None else f"{name!r} is no role that this command runs"
        known = ", ".join([*there[:LISTED], *(["..."] if len(there) > LISTED else [])]) or "none in this recipe"
        raise RecipeError([f"--name: {given}; use one of {known}"])
    return name


def parent_of(recipe: Recipe, name: str) -> str | None:
    """The role above `name`; None for the top.

    Raises:
        RecipeError: `split.tiers` has no role `name`.
    """
    tier, index = tier_of(recipe, name)
    tiers = list(recipe.split.tiers.items())
    return None if tier + 1 == len(tiers) else _name(*tiers[tier + 1], _parent(tiers, tier, index))


def children_of(recipe: Recipe, name: str) -> list[str]:
    """The roles below `name`, by index; none for a client.

    Raises:
        RecipeError: `split.tiers` has no role `name`.
    """
    tier, index = tier_of(recipe, name)
    tiers = list(recipe.split.tiers.items())
    if tier == 0:
        return []
    below, count = tiers[tier - 1]
    return [_name(below, count, child) for child in range(count) if _parent(tiers, tier - 1, child) == index]


def clients_below(recipe: Recipe, name: str) -> list[int]:
    """The indices of the clients whose branch goes through `name`; of a client, its own.

    Raises:
        RecipeError: `split.tiers` has no role `name`.
    """
    tier, index = tier_of(recipe, name)
    tiers = list(recipe.split.tiers.items())
    owners = list(range(tiers[0][1]))
    for below in range(tier):
        owners = [_parent(tiers, below, owner) for owner in owners]
    return [client for client, owner in enumerate(owners) if owner == index]


def find_role(tiers: Mapping[str, int], name: str) -> tuple[int, int] | None:
    """The number of the tier and the index there of the role `name`; None if there is none."""
    numbers = {tier: number for number, tier in enumerate(tiers)}
    if tiers.get(name) == 1:
        return numbers[name], 0
    found = _INDEXED.fullmatch(name)
    if found is None or int(found["index"]) >= tiers.get(found["tier"], 0) or tiers[found["tier"]] == 1:
        return None
    return numbers[found["tier"]], int(found["index"])


def shared_name(tiers: Mapping[str, int]) -> str | None:
    """A name that roles of two tiers would bear, as in {a: 2, a-0: 1}; None if there is none."""
    for tier, count in tiers.items():
        rest = {other: number for other, number in tiers.items() if other != tier}
        if count == 1 and find_role(rest, tier) is not None:
            return tier
    return None


def known_roles(tiers: Mapping[str, int]) -> str:
    """The roles of these tiers for a message; of a large tier the first and the last."""
    names: list[str] = []
    for tier, count in tiers.items():
        if count <= LISTED:
            names += [_name(tier, count, index) for index in range(count)]
        else:
            names.append(f"{tier}-0 to {tier}-{count - 1}")
    return ", ".join(names)


def _name(tier: str, count: int, index: int) -> str:
    return tier if count == 1 else f"{tier}-{index}"


def _parent(tiers: list[tuple[str, int]], tier: int, index: int) -> int:
    return index * tiers[tier + 1][1] // tiers[tier][1]
