"""When rounds are due, what they average, and what must hold between `rounds` and the rest of a recipe.

Levels are those who average: 1 is the tier above the clients (or, of whole-model clients, their coordinator), and so on
up to the top. With `rounds.exchange` the tree is one site of several, and the highest level is that of all sites,
which another engine averages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitllm.recipe.schema import Recipe, RoundsRecipe

Misfit = tuple[tuple[str, ...], str]
ONE_SHAPE = ("fedavg", "fedex", "ffa", "rolora", "trimmed_mean", "median")
"""Rules that need one rank and scale; the others take any."""
WITH_FROZEN = ("fedex", "flora")
"""Rules with an outcome that is added to frozen weights."""
ONLY_FACTORS = ("fedavg", "ffa", "rolora", "trimmed_mean", "median")
"""Rules whose outcome is a matrix A and a matrix B, which can be stepped towards."""


def goes_by_rounds(recipe: Recipe) -> bool:
    """Whether replicas train adapters of their own."""
    return recipe.rounds.replicas == "local"


def intervals(recipe: Recipe) -> list[int]:
    """Steps between the rounds of each level, bottom up; `replicas: local`."""
    rounds, between = recipe.rounds, _between(recipe)
    assert rounds.cloud_every is not None
    edge = rounds.cloud_every if rounds.edge_every is None else rounds.edge_every
    return [*(edge if isinstance(edge, tuple) else [edge] * between), rounds.cloud_every]


def _between(recipe: Recipe) -> int:
    """How many levels average below the highest."""
    return max(0, len(recipe.split.tiers) - 2) + (recipe.rounds.exchange is not None)


def level_due(recipe: Recipe, steps: int) -> int:
    """The highest level whose round is due after so many steps; 0: none. At the end of a run all are."""
    if not goes_by_rounds(recipe) or steps == 0:
        return 0
    if steps == recipe.train.steps:
        return len(intervals(recipe))
    return max((level for level, every in enumerate(intervals(recipe), 1) if steps % every == 0), default=0)


def side_that_trains(recipe: Recipe, step: int) -> str | None:
    """Which of the matrices A and B trains in a step, where it is one of them alone.

    `ffa`: B (arXiv 2403.12313); `rolora`: B and A by turns, from round to round of the top (arXiv 2502.01755).
    """
    if not goes_by_rounds(recipe) or recipe.rounds.rule not in ("ffa", "rolora"):
        return None
    turn = step // intervals(recipe)[-1] if recipe.rounds.rule == "rolora" else 0
    return "AB"[(turn + 1) % 2]


def rounds_line(recipe: Recipe) -> str:
    """Says in one line when rounds are held, and what they average."""
    rounds, names = recipe.rounds, list(recipe.split.tiers)[1:] or ["coordinator"]
    names += [] if rounds.exchange is None else ["other sites' tops"]
    held = [f"every {every} steps at the {name}" for name, every in zip(names, intervals(recipe), strict=True)]
    some = rounds.participation
    parts = [f"{rounds.rule} {' and '.join(held)}, weights: {rounds.weights}"]
    if some.policy != "all":
        wanted = f"{some.count}" if some.count is not None else f"{some.share:g}"
        parts.append(f"{some.policy} {wanted} of the clients at a time")
    if rounds.secure.aggregate:
        parts.append("masked: the server right above clients sees sums alone")
    if rounds.privacy.clip is not None:
        parts.append(f"changes clipped to {rounds.privacy.clip:g}, noise {rounds.privacy.noise:g}")
    return "; ".join(parts)


def what_leaves_in_rounds(recipe: Recipe) -> str:
    """What a client sends of its adapter."""
    if recipe.rounds.secure.aggregate:
        return "its adapter in rounds, masked"
    return "its clipped change in rounds" if recipe.rounds.privacy.clip is not None else "its adapter in rounds"


def rounds_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """Yields what is wrong between keys that are right by themselves: the keys involved and the complaint."""
    if not goes_by_rounds(recipe):
        yield from _without_rounds(recipe.rounds)
        return
    yield from _interval_misfits(recipe)
    yield from _rule_misfits(recipe)
    yield from _participation_misfits(recipe)
    yield from _hiding_misfits(recipe)
    yield from _turn_misfits(recipe)
    yield from _checking_misfits(recipe)
    yield from _elsewhere_misfits(recipe)


def _without_rounds(rounds: RoundsRecipe) -> Iterator[Misfit]:
    for key in sorted(rounds.model_fields_set - {"replicas"}):
        if getattr(rounds, key) != type(rounds).model_fields[key].get_default(call_default_factory=True):
            yield (f"rounds.{key}", "rounds.replicas"), f"rounds.{key}: needs rounds.replicas: local; use that"


def _interval_misfits(recipe: Recipe) -> Iterator[Misfit]:
    rounds, between = recipe.rounds, _between(recipe)
    keys: tuple[str, ...] = ("rounds.edge_every", "split.tiers")
    edge, above = rounds.edge_every, "top" if rounds.exchange is None else "the other sites"
    if edge is not None and not between:
        yield keys, f"rounds.edge_every: {edge} is of tiers between clients and top, and there is none; leave it out"
        return
    if isinstance(edge, tuple) and len(edge) != between:
        yield keys, f"rounds.edge_every: {list(edge)} has {len(edge)}; {between} tiers lie between clients and {above}"
        return
    if rounds.cloud_every is None:
        yield ("rounds.cloud_every",), "rounds.cloud_every: missing; give the steps between rounds of all, such as 20"
        return
    found = intervals(recipe)
    for low, high in pairwise(found):
        if high % low:
            keys = ("rounds.edge_every", "rounds.cloud_every")
            why = "a round further up takes in those below it"
            yield keys, f"rounds: {high} steps are no multiple of the {low} of the tier below; {why}"


def _rule_misfits(recipe: Recipe) -> Iterator[Misfit]:
    rounds, lora, rule = recipe.rounds, recipe.lora, f"rounds.rule: {recipe.rounds.rule}"
    if rounds.rule in ONE_SHAPE and any(own.rank or own.alpha for own in lora.clients.values()):
        advice = "use flora, flexlora or hetlora"
        yield ("rounds.rule", "lora.clients"), f"{rule} needs one rank and alpha, unlike lora.clients; {advice}"
    if lora.dora and rounds.rule != "fedavg":
        yield ("rounds.rule", "lora.dora"), f"{rule} is of A and B alone, and lora.dora has more; use fedavg"
    if rounds.rule in WITH_FROZEN and (lora.adapters == "per_client" or _mixed(recipe)):
        why = "adds to frozen weights, which a server's clients with adapters of their own share"
        keys = ("rounds.rule", "lora.adapters", "split.client_cuts")
        yield keys, f"{rule} {why}; use lora.adapters: shared, or rule: fedavg, flexlora or rolora"
    if rounds.outer.name != "none" and rounds.rule not in ONLY_FACTORS:
        yield (
            ("rounds.outer.name", "rounds.rule"),
            f"rounds.outer.name: {rounds.outer.name} steps A and B, which {rule} does not average; use fedavg",
        )
    for key in ("clip_update", "reject_beyond"):
        if getattr(rounds, key) is not None and lora.dora:
            what = f"rounds.{key}: measures changes of A and B, and lora.dora trains magnitudes beside them"
            yield (f"rounds.{key}", "lora.dora"), f"{what}; leave one out"
        if getattr(rounds, key) is not None and rounds.rule not in ONE_SHAPE:
            yield (
                (f"rounds.{key}", "rounds.rule"),
                f"rounds.{key}: measures changes of A and B, which {rule} does not keep; use fedavg",
            )
    if rounds.moments == "average" and rounds.rule not in ONE_SHAPE:
        why = "averages moments of A and B that are of one shape"
        yield ("rounds.moments", "rounds.rule"), f"rounds.moments: average {why}, unlike {rule}; use keep or reset"


def _participation_misfits(recipe: Recipe) -> Iterator[Misfit]:
    wanted, key = recipe.rounds.participation, "rounds.participation"
    clients, servers, *_ = [*recipe.split.tiers.values(), 1]
    fewest = clients // (servers if len(recipe.split.tiers) > 1 else 1)
    if wanted.policy == "all" and (wanted.share != 1.0 or wanted.count is not None):
        keys: tuple[str, ...] = (f"{key}.policy", f"{key}.share", f"{key}.count")
        yield keys, f"{key}.policy: all takes no share or count; use random, poisson or oort, or leave them out"
    if wanted.count is not None and (wanted.share != 1.0 or wanted.policy == "poisson"):
        keys = (f"{key}.count", f"{key}.share", f"{key}.policy")
        yield keys, f"{key}.count: {wanted.count} beside a share, or with poisson, which has none; use share alone"
    for name in ("count", "minimum"):
        value = getattr(wanted, name)
        if value is not None and value > fewest:
            keys = (f"{key}.{name}", "split.tiers")
            yield keys, f"{key}.{name}: {value} is more than the {fewest} clients of a server; use at most {fewest}"


def hides(recipe: Recipe) -> bool:
    """Whether clients send words that are summed, masked or with noise to come."""
    return goes_by_rounds(recipe) and (recipe.rounds.secure.aggregate or recipe.rounds.privacy.clip is not None)


def asked_at_once(recipe: Recipe, clients: int) -> int:
    """Of so many clients of a server, how many train until its next round, at most."""
    some = recipe.rounds.participation
    if some.policy in ("all", "poisson"):
        return clients
    goal = math.ceil(Fraction(str(some.share)) * clients) if some.count is None else some.count
    return min(max(goal, some.minimum), clients)


def _hiding_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """What needs more of each client than a sum of all."""
    rounds, secure = recipe.rounds, recipe.rounds.secure
    if rounds.privacy.noise and rounds.privacy.clip is None:
        keys: tuple[str, ...] = ("rounds.privacy.noise", "rounds.privacy.clip")
        yield keys, f"rounds.privacy.noise: {rounds.privacy.noise:g} needs rounds.privacy.clip, which bounds a client"
    if not secure.aggregate and (secure.threshold is not None or secure.bits != 32):
        keys = ("rounds.secure.threshold", "rounds.secure.aggregate")
        yield keys, "rounds.secure: threshold and bits need rounds.secure.aggregate: true; leave them out"
    if not hides(recipe):
        return
    key = "rounds.secure.aggregate: true" if secure.aggregate else f"rounds.privacy.clip: {rounds.privacy.clip:g}"
    place = "rounds.secure.aggregate" if secure.aggregate else "rounds.privacy.clip"
    why = "of which a server knows only the sum of all clients"
    if rounds.rule not in ("fedavg", "ffa", "rolora"):
        what = "orders values" if rounds.rule in ("trimmed_mean", "median") else "needs products of B and A"
        advice = "use fedavg, ffa or rolora"
        yield (place, "rounds.rule"), f"{key} with rounds.rule: {rounds.rule}, which {what} of each client; {advice}"
    for name, wanted, found in (
        ("weights", "equal", rounds.weights),
        ("moments", "keep or reset", "" if rounds.moments != "average" else rounds.moments),
    ):
        if found not in (wanted, ""):
            yield (place, f"rounds.{name}"), f"{key} with rounds.{name}: {found}, {why}; use {name}: {wanted}"
    for name in ("clip_update", "reject_beyond"):
        if getattr(rounds, name) is not None:
            yield (place, f"rounds.{name}"), f"{key} with rounds.{name}, which looks at each update; leave it out"
    lowest = next(iter(recipe.split.tiers))
    if recipe.lora.tiers is not None and lowest not in recipe.lora.tiers:
        yield (place, "lora.tiers"), f"{key} needs clients that train; add {lowest} to lora.tiers"
    if recipe.lora.adapters != "shared" or recipe.split.client_cuts or recipe.lora.dora:
        keys = (place, "lora.adapters", "split.client_cuts", "lora.dora")
        yield keys, f"{key} needs lora.adapters: shared, one cut and no DoRA: all clients sum the same tensors"
    yield from _group_misfits(recipe)


def _group_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """Groups that are too small to hide anybody in."""
    secure, wanted = recipe.rounds.secure, recipe.rounds.participation
    counts = [*recipe.split.tiers.values(), 1]
    servers = counts[1] if len(recipe.split.tiers) > 1 else 1
    fewest, most = (asked_at_once(recipe, clients) for clients in (counts[0] // servers, -(-counts[0] // servers)))
    if not secure.aggregate:
        return
    if wanted.policy == "poisson":
        keys: tuple[str, ...] = ("rounds.secure.aggregate", "rounds.participation.policy")
        yield keys, "rounds.secure.aggregate: true with poisson, which may draw fewer than can be hidden; use random"
    if fewest < 2:
        keys = ("rounds.secure.aggregate", "split.tiers", "rounds.participation.share", "rounds.participation.count")
        yield keys, "rounds.secure.aggregate: true needs two clients or more of each server: one is its own sum"
    elif secure.threshold is not None and not fewest >= secure.threshold > most / 2:
        keys = ("rounds.secure.threshold", "split.tiers")
        why = f"is not more than half of {most}" + (f" and at most {fewest}" if fewest < most else " and at most that")
        yield keys, f"rounds.secure.threshold: {secure.threshold} {why}"


def _turn_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """What a void round, or a round of a group on a server further up, would get wrong."""
    rounds, minimum = recipe.rounds, recipe.rounds.participation.minimum
    if rounds.rule == "rolora" and minimum > 1:
        why = "goes on to the other matrix after a round that is void"
        keys: tuple[str, ...] = ("rounds.rule", "rounds.participation.minimum")
        yield keys, f"rounds.rule: rolora {why}; use rounds.participation.minimum: 1, or ffa"
    if recipe.lora.adapters == "per_client" and len(recipe.split.tiers) > 2:
        for name in ("clip_update", "reject_beyond"):
            if getattr(rounds, name) is not None:
                keys = (f"rounds.{name}", "lora.adapters", "split.tiers")
                why = "measures changes from what a server handed out, which is not one thing for all its groups"
                yield keys, f"rounds.{name}: with lora.adapters: per_client and three tiers it {why}; leave it out"


def _checking_misfits(recipe: Recipe) -> Iterator[Misfit]:
    own_ranks = any(own.rank for own in recipe.lora.clients.values())
    if recipe.train.verify_adapter and own_ranks and recipe.rounds.rule in ("flexlora", "hetlora"):
        why = "compares one adapter with clients that hold as much of it as their ranks allow"
        keys = ("train.verify_adapter", "rounds.rule", "lora.clients")
        yield keys, f"train.verify_adapter: true {why}; use false, or rounds.rule: flora"


def _mixed(recipe: Recipe) -> bool:
    return recipe.lora.adapters == "common" and bool(recipe.split.client_cuts)


def _elsewhere_misfits(recipe: Recipe) -> Iterator[Misfit]:
    local = "rounds.replicas: local"
    if recipe.train.processes > 1:
        keys: tuple[str, ...] = ("rounds.replicas", "train.processes")
        yield keys, f"{local} is not possible with train.processes: {recipe.train.processes}; use 1, or a deployment"
    if recipe.wire.absent == "drop":
        why = "a client that was left out takes over the state of another, and here nobody holds the same"
        yield ("rounds.replicas", "wire.absent"), f"{local} needs wire.absent: wait: {why}"
    if recipe.server.batching == "continuous":
        why = "needs steps that all take together"
        keys = ("rounds.replicas", "server.batching")
        yield keys, f"{local} {why}; use server.batching: synchronous, or none"
