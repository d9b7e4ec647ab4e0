"""Which blocks each role holds, and whose adapter trains them: from the recipe alone."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from splitllm.recipe.roles import client_names, role_names
from splitllm.recipe.rounds import goes_by_rounds

if TYPE_CHECKING:
    from splitllm.recipe.schema import LoraRecipe, Recipe

Bounds = tuple[int, int]
"""First block, and the block after the last."""


def client_cuts(recipe: Recipe) -> list[int]:
    """The cut layer of every client: the first block that it does not hold. At least two tiers."""
    clients = client_names(recipe)
    return [recipe.split.client_cuts.get(name, recipe.split.cuts[0]) for name in clients]


def tier_bounds(recipe: Recipe, layers: int) -> list[Bounds]:
    """Of every tier, bottom up: the blocks that at least one of its roles holds.

    The tier above the clients begins where the first of them is cut.
    """
    bounds = list(pairwise([0, *recipe.split.cuts, layers]))
    if len(bounds) > 1:
        cuts = client_cuts(recipe)
        bounds[0], bounds[1] = (0, max(cuts)), (min(cuts), bounds[1][1])
    return bounds


def role_bounds(recipe: Recipe, layers: int) -> dict[str, Bounds]:
    """Of every role."""
    found: dict[str, Bounds] = {}
    for names, bounds in zip(role_names(recipe).values(), tier_bounds(recipe, layers), strict=True):
        found.update(dict.fromkeys(names, bounds))
    if len(recipe.split.tiers) > 1:
        clients = client_names(recipe)
        found.update({name: (0, cut) for name, cut in zip(clients, client_cuts(recipe), strict=True)})
    return found


def goes_by_lanes(recipe: Recipe) -> bool:
    """Whether the clients of a deployment go at their own pace, each with steps of its own."""
    return recipe.server.batching == "continuous"


def sharing(recipe: Recipe, name: str) -> str:
    """With whom a role can exchange its state, since they hold the same: its tier, or nobody but itself.

    The latter where it trains an adapter by itself or for its clients, or clients are cut at different layers.
    """
    tier = next(tier for tier, names in role_names(recipe).items() if name in names)
    alike = recipe.lora.adapters == "shared" and not recipe.split.client_cuts and not goes_by_rounds(recipe)
    return tier if alike else name


def lora_of(recipe: Recipe, client: int) -> LoraRecipe:
    """The adapter that one client has of its own."""
    name = client_names(recipe)[client]
    other = recipe.lora.clients.get(name)
    return recipe.lora if other is None else recipe.lora.model_copy(update=other.model_dump(exclude_none=True))


def own_blocks(recipe: Recipe, layers: int) -> range:
    """The blocks whose adapter is each client's own, wherever they run.

    `shared`: none. `per_client`: all (SplitFed V1). `common`: those below the deepest cut (HASFL, arXiv 2506.08426).
    """
    above = {"shared": 0, "per_client": layers, "common": tier_bounds(recipe, layers)[0][1]}
    return range(above[recipe.lora.adapters])


def tenant_blocks(recipe: Recipe, layers: int) -> range:
    """The blocks in which a server computes every client with parameters of that client alone.

    Those whose adapter is the client's own; where clients go at their own pace all, as each computes with a copy of
    what is common, which stays as it is while a step of that client is open.
    """
    return range(layers) if goes_by_lanes(recipe) else own_blocks(recipe, layers)


def holders(recipe: Recipe, layers: int) -> list[int]:
    """For each block, how many roles hold an adapter of it that they step together."""
    if goes_by_rounds(recipe):
        return [1] * layers
    counts, own = [0] * layers, own_blocks(recipe, layers)
    for start, stop in role_bounds(recipe, layers).values():
        for block in range(start, stop):
            counts[block] += block not in own
    if recipe.train.processes > 1:
        start, _ = tier_bounds(recipe, layers)[-1]
        if len(recipe.split.tiers) > 1:
            for block in range(start, layers):
                counts[block] += recipe.train.processes - 1
    return counts


def averaged_blocks(recipe: Recipe, layers: int) -> frozenset[int]:
    """The blocks for which rounds have something to average: more than one adapter of them is trained.

    Of a site all: other sites hold them, too.
    """
    if recipe.rounds.exchange is not None:
        return frozenset(range(layers))
    counts, own = [0] * layers, own_blocks(recipe, layers)
    for start, stop in role_bounds(recipe, layers).values():
        for block in range(start, stop):
            counts[block] += block not in own
    for block in own:
        counts[block] += len(client_names(recipe))
    return frozenset(block for block, count in enumerate(counts) if count > 1)
