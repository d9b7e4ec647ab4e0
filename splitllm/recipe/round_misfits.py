"""What must hold between `rounds` and the rest of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from splitllm.recipe.cuts import goes_by_lanes
from splitllm.recipe.rounds import (
    AT_ANY_PACE,
    ONE_SHAPE,
    ONLY_FACTORS,
    WITH_FROZEN,
    asked_at_once,
    between,
    clients_of_a_server,
    goes_by_rounds,
    hides,
    intervals,
)

if TYPE_CHECKING:
    from splitllm.recipe.schema import Recipe, RoundsRecipe

Misfit = tuple[tuple[str, ...], str]
"""The keys involved, and the complaint."""


def rounds_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """Yields what is wrong between keys that are right by themselves: the keys involved and the complaint."""
    if not goes_by_rounds(recipe):
        yield from _without_rounds(recipe.rounds)
        return
    yield from _interval_misfits(recipe)
    yield from _rule_misfits(recipe)
    yield from _participation_misfits(recipe)
    if not goes_by_lanes(recipe):
        yield from _hiding_misfits(recipe)
    yield from _turn_misfits(recipe)
    yield from _checking_misfits(recipe)
    yield from _elsewhere_misfits(recipe)
    yield from _pace_misfits(recipe)


def _without_rounds(rounds: RoundsRecipe) -> Iterator[Misfit]:
    for key in sorted(rounds.model_fields_set - {"replicas"}):
        if getattr(rounds, key) != type(rounds).model_fields[key].get_default(call_default_factory=True):
            yield (f"rounds.{key}", "rounds.replicas"), f"rounds.{key}: needs rounds.replicas: local; use that"


def _interval_misfits(recipe: Recipe) -> Iterator[Misfit]:
    rounds, levels = recipe.rounds, between(recipe)
    keys: tuple[str, ...] = ("rounds.edge_every", "split.tiers")
    edge, above = rounds.edge_every, "top" if rounds.exchange is None else "the other sites"
    if edge is not None and not levels:
        yield keys, f"rounds.edge_every: {edge} is of tiers between clients and top, and there is none; leave it out"
        return
    if isinstance(edge, tuple) and len(edge) != levels:
        tiers = f"the tiers between clients and {above} ({', '.join(list(recipe.split.tiers)[1 : levels + 1])})"
        advice = f"give {levels}, such as {[edge[0]] * levels}, or one number for all"
        yield keys, f"rounds.edge_every: {list(edge)} has {len(edge)} for {tiers}; {advice}"
        return
    if rounds.cloud_every is None:
        yield ("rounds.cloud_every",), "rounds.cloud_every: missing; give the steps between rounds of all, such as 20"
        return
    found = intervals(recipe)
    for level, (low, high) in enumerate(pairwise(found), start=2):
        if high % low:
            key = "rounds.cloud_every" if level == len(found) else "rounds.edge_every"
            why = f"is no multiple of the {low} of the tier below, whose rounds it takes in"
            advice = f"use {' or '.join(str(low * times) for times in (high // low, high // low + 1) if times)}"
            yield ("rounds.edge_every", "rounds.cloud_every"), f"{key}: {high} {why}; {advice}"


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
    fewest, _ = clients_of_a_server(recipe)
    if wanted.policy == "all" and (wanted.share != 1.0 or wanted.count is not None):
        keys: tuple[str, ...] = (f"{key}.policy", f"{key}.share", f"{key}.count")
        yield keys, f"{key}.policy: all takes no share or count; use random, poisson or oort, or leave them out"
    if wanted.count is not None and (wanted.share != 1.0 or wanted.policy == "poisson"):
        keys = (f"{key}.count", f"{key}.share", f"{key}.policy")
        yield keys, f"{key}.count: {wanted.count} beside a share, or with poisson, which has none; use share alone"
    if wanted.policy == "poisson" and wanted.minimum > 1:
        keys = (f"{key}.minimum", f"{key}.policy")
        yield (
            keys,
            f"{key}.minimum: {wanted.minimum} with poisson, which draws until there are so many; use random, or 1",
        )
    for name in ("count", "minimum"):
        value = getattr(wanted, name)
        if value is not None and value > fewest:
            keys = (f"{key}.{name}", "split.tiers")
            yield keys, f"{key}.{name}: {value} is more than the {fewest} clients of a server; use at most {fewest}"


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
    fewest, most = (asked_at_once(recipe, clients) for clients in clients_of_a_server(recipe))
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


def _pace_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """What needs clients that go at their own pace, and what they cannot have."""
    rounds, some, pace = recipe.rounds, recipe.rounds.participation, "server.batching: continuous"
    if not goes_by_lanes(recipe):
        for key, value, usual in (
            ("participation.over", some.over, 1.0),
            ("participation.deadline", some.deadline, None),
            ("buffer.size", rounds.buffer.size, None),
        ):
            if value != usual:
                keys: tuple[str, ...] = (f"rounds.{key}", "server.batching")
                yield (
                    keys,
                    f"rounds.{key}: {value} needs {pace}; elsewhere all step together, and nobody is late",
                )
        return
    if recipe.lora.adapters == "per_client":
        why = "rounds average what clients hold at their server, and what is trained above them between servers"
        keys = ("lora.adapters", "server.batching", "rounds.replicas")
        yield keys, f"lora.adapters: per_client with {pace}: {why}; use common"
    if rounds.rule not in AT_ANY_PACE:
        why = "what it changes at once is more than A and B, and there is no step at which all could change that"
        keys = ("rounds.rule", "server.batching")
        yield keys, f"rounds.rule: {rounds.rule} with {pace}: {why}; use {', '.join(AT_ANY_PACE)}"
    for key, found, wrong, advice in (
        ("rounds.moments", rounds.moments, rounds.moments == "average", "use keep or reset"),
        ("rounds.secure.aggregate", "true", rounds.secure.aggregate, "leave it out"),
        ("rounds.privacy.clip", rounds.privacy.clip, rounds.privacy.clip is not None, "leave it out"),
        ("rounds.exchange", rounds.exchange, rounds.exchange is not None, "leave it out"),
        ("lora.dora", "true", recipe.lora.dora, "use false"),
    ):
        if wrong:
            why = "needs rounds that all hold at one step"
            yield (key, "server.batching"), f"{key}: {found} {why}, unlike {pace}; {advice}"
    if some.over != 1.0 and some.policy not in ("random", "oort"):
        keys = ("rounds.participation.over", "rounds.participation.policy")
        yield keys, f"rounds.participation.over: {some.over:g} with policy: {some.policy}; use random or oort"
    yield from _buffer_misfits(recipe)


def _buffer_misfits(recipe: Recipe) -> Iterator[Misfit]:
    rounds, between_top = recipe.rounds, list(recipe.split.tiers.values())[1:-1]
    if rounds.buffer.size is None:
        for key in ("discount", "oldest"):
            if getattr(rounds.buffer, key) != type(rounds.buffer).model_fields[key].default:
                yield (f"rounds.buffer.{key}",), f"rounds.buffer.{key}: needs rounds.buffer.size; give that, too"
        return
    below = between_top[-1] if between_top else 0
    if rounds.buffer.size > below:
        keys: tuple[str, ...] = ("rounds.buffer.size", "split.tiers")
        advice = f"use at most {below}" if below else "leave it out"
        yield keys, f"rounds.buffer.size: {rounds.buffer.size} of the {below} servers below the top; {advice}"
    if rounds.rule not in ONLY_FACTORS:
        keys = ("rounds.buffer.size", "rounds.rule")
        why = "adds up changes of A and B, which are of one shape"
        yield keys, f"rounds.buffer.size: {why}, unlike {rounds.rule}; use fedavg"
