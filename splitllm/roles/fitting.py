"""Whether there is room for what a recipe will hold; where there is not, which other recipe would fit.

Only what was worked out to fit is named, with what it then takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedConfig

from splitllm.policy.admission import MIB
from splitllm.recipe import Recipe, role_names, spreads_weights
from splitllm.roles.ledger import PARTS, Ledger, Parts

Changes = dict[str, Any]
"""Key of the recipe, such as `train.batch_size` -> another value."""
SHORTEST = 32  # tokens: rows are not made shorter than this
FILES = "/var/tmp"
"""For weights in files: unlike /tmp it is never memory."""
LARGEST_NAMED = 3
CUTS_TRIED = 8


@dataclass(frozen=True)
class Need:
    """What has to fit somewhere.

    Attributes:
        place: where.
        what: in words, with the verb.
        needed: bytes.
        room: bytes.
        parts: of what is needed.
    """

    place: str
    what: str
    needed: int
    room: int
    parts: Parts

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.needed <= self.room


@dataclass(frozen=True)
class Offer:
    """Other values of a recipe, and what it would then need."""

    changes: Changes
    needs: Sequence[Need]

    @property
    def fits(self) -> bool:
        """Whether all of it does."""
        return all(need.fits for need in self.needs)

    @property
    def excess(self) -> float:
        """The largest share of room that is needed anywhere."""
        return max(need.needed / max(1, need.room) for need in self.needs)

    def needed(self, like: Need) -> int:
        """Bytes in the place of another need."""
        return next(need.needed for need in self.needs if need.place == like.place)


Needs = Callable[[Recipe, Ledger], Sequence[Need]]


def needs_of_limits(recipe: Recipe, ledger: Ledger) -> list[Need]:
    """Every kind of role against what `split.memory_mib` gives its tier."""
    found = []
    for tier, names in role_names(recipe).items():
        limit = recipe.split.memory_mib.get(tier)
        if limit is not None:
            worst = max(names, key=lambda name: ledger.of(name).total)
            what = f"split.memory_mib.{tier}: {limit} MiB do not hold {_process(worst, ledger)}, which takes"
            found.append(Need(tier, what, ledger.of(worst).total, limit * MIB, ledger.of(worst)))
    return found


def shortage(
    recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str], ledger: Ledger, needs: Needs
) -> list[str]:
    """A line for each need that is not met: what takes most, and what would fit.

    Args:
        recipe: as it was resolved.
        config: of the whole text model.
        modules: global names of the modules that LoRA adapts.
        ledger: of the recipe.
        needs: what has to fit, of any recipe.
    """
    unmet = [need for need in needs(recipe, ledger) if not need.fits]
    if not unmet:
        return []
    remedies = _Remedies(recipe, config, modules, ledger.process, needs)
    fitting, best = remedies.that_fit(), None
    if not fitting:
        best = remedies.nearest()
    return [
        f"{need.what} {_mib(need.needed)} ({_largest(need.parts)}); {_advice(need, fitting, best)}" for need in unmet
    ]


def _advice(need: Need, fitting: Sequence[Offer], best: Offer | None) -> str:
    """What would fit, with what is then needed in the same place; or how little of it would be needed."""
    if fitting:
        offers = ", or ".join(f"{_said(o.changes)} ({_mib(o.needed(need))} MiB)" for o in fitting)
        several = any("server.processes" in offer.changes for offer in fitting)
        return f"what would fit: {offers}" + (
            "; server.processes is for servers that are started alone" if several else ""
        )
    if best is None:
        return "nothing that was tried fits"
    least = f"{_said(best.changes)} would take {_mib(best.needed(need))} MiB of {_mib(need.room)}"
    return f"nothing that was tried fits: {least}"


def _largest(parts: Parts) -> str:
    sizes = sorted(((getattr(parts, part), part) for part in PARTS), reverse=True)[:LARGEST_NAMED]
    return ", ".join(f"{part} {_mib(size)}" for size, part in sizes)


def _mib(size: int) -> str:
    return f"{-(-size // MIB):,}"


@dataclass
class _Remedies:
    """Recipes like one that does not fit."""

    recipe: Recipe
    config: PreTrainedConfig
    modules: Sequence[str]
    process: int
    needs: Needs

    def that_fit(self) -> list[Offer]:
        """Single changes that will do; where there are none, several at once."""
        single = [offer for changes in self._single() if (offer := self._offer(changes)) is not None and offer.fits]
        return single or [offer for offer in self._offers_of_several() if offer.fits][:1]

    def nearest(self) -> Offer | None:
        """What comes nearest to fitting."""
        return min(self._offers_of_several(), key=lambda offer: offer.excess, default=None)

    def _offers_of_several(self) -> Iterator[Offer]:
        for changes in self._several():
            offer = self._offer(changes)
            if offer is not None:
                yield offer

    def _single(self) -> Iterator[Changes]:
        """One change at a time, as small as will do."""
        train = self.recipe.train
        if not train.activation_checkpointing:
            yield {"train.activation_checkpointing": True}
        if train.batch_size > 1:
            yield {"train.batch_size": self._rows({})}
        if train.in_flight > 1:
            yield {"train.in_flight": 1}
        if (length := self._length({})) is not None:
            yield {"data.max_length": length}
        yield from self._quantised()
        for places in self._offloads():
            yield from self._first_that_fits(iter(places))
        yield from self._first_that_fits(self._cuts())

    def _quantised(self) -> Iterator[Changes]:
        """Frozen weights of one tier in fewer bits, or of all."""
        plain = [tier for tier in self.recipe.split.tiers if tier not in self.recipe.quantization]
        for tier in plain:
            yield {f"quantization.{tier}": "nf4"}
        if len(plain) > 1:
            yield {f"quantization.{tier}": "nf4" for tier in plain}

    def _offloads(self) -> list[list[Changes]]:
        """Elsewhere than on a server's device: its frozen weights, its optimisers, or a part of what it holds."""
        files = {"stage": 3, "offload_param": "nvme", "nvme_path": FILES}
        more: Changes = {"server.processes": 2 * self.recipe.server.processes}
        engines: list[Changes] = [{"server.fsdp": True}, {"server.zero": {"stage": 3}}, {"server.zero": {"stage": 2}}]
        return [
            [{"server.zero": {"stage": 3, "offload_param": "cpu"}}, {"server.zero": files}],
            [{"server.zero": {"stage": 2, "offload_optimizer": "cpu"}}],
            [more] if spreads_weights(self.recipe) else [more | engine for engine in engines],
        ]

    def _several(self) -> Iterator[Changes]:
        """Changes at once, ever more of them."""
        changes: Changes = {"train.activation_checkpointing": True}
        changes |= {"train.in_flight": 1} if self.recipe.train.in_flight > 1 else {}
        yield dict(changes)
        changes |= {"train.batch_size": self._rows(changes)} if self.recipe.train.batch_size > 1 else {}
        yield changes
        if (length := self._length(changes)) is not None:
            yield {**changes, "data.max_length": length}
        for quantised in self._quantised():
            yield {**changes, **quantised}
        for place in itertools.chain.from_iterable(self._offloads()):
            yield {**changes, **place}
        for cuts in self._cuts():
            yield {**changes, **cuts}

    def _rows(self, beside: Changes) -> int:
        """The largest half, quarter, ... of the batch size that fits; 1 if none does."""
        rows = self.recipe.train.batch_size // 2
        while rows > 1 and not self._fits({**beside, "train.batch_size": rows}):
            rows //= 2
        return rows

    def _length(self, beside: Changes) -> int | None:
        """The longest half, quarter, ... of the rows' length that fits."""
        length = self.recipe.data.max_length // 2
        while length >= SHORTEST:
            if self._fits({**beside, "data.max_length": length}):
                return length
            length //= 2
        return None

    def _cuts(self) -> Iterator[Changes]:
        """One cut elsewhere: nearest first."""
        cuts, layers = list(self.recipe.split.cuts), self.config.num_hidden_layers
        if self.recipe.split.client_cuts or self.recipe.train.full_tiers:  # of these it would change what trains
            return
        for distance in range(1, CUTS_TRIED + 1):
            for place, cut in enumerate(cuts):
                low, high = ([0, *cuts][place], [*cuts, layers + 1][place + 1])
                for other in (cut - distance, cut + distance):
                    if low < other < high:
                        yield {"split.cuts": [*cuts[:place], other, *cuts[place + 1 :]]}

    def _first_that_fits(self, several: Iterator[Changes]) -> Iterator[Changes]:
        found = next((changes for changes in several if self._fits(changes)), None)
        if found is not None:
            yield found

    def _fits(self, changes: Changes) -> bool:
        offer = self._offer(changes)
        return offer is not None and offer.fits

    def _offer(self, changes: Changes) -> Offer | None:
        """None where these changes make no recipe."""
        recipe = _changed(self.recipe, changes)
        if recipe is None:
            return None
        return Offer(changes, self.needs(recipe, Ledger(recipe, self.config, self.modules, self.process)))


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe | None:
    """The recipe with other values; None where they do not go together."""
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        return None


def _said(changes: Mapping[str, Any]) -> str:
    """As overrides of the command line."""
    return " with ".join(f"{key}={_yaml(value)}" for key, value in changes.items())


def _yaml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(each)}" for key, each in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _process(name: str, ledger: Ledger) -> str:
    """Who holds what `Ledger.of` says, in words."""
    count = len(ledger.processes(name))
    return name if count == 1 else f"rank 0 of the {count} of {name}"


def role_needs(name: str, room: int, where: str, elsewhere: int = 0) -> Needs:
    """One role in what a machine has left.

    Args:
        name: of the role.
        room: bytes beside those of the processes that ask.
        where: whose they are, in words.
        elsewhere: how many of its processes are on other machines.
    """

    def needs(_recipe: Recipe, ledger: Ledger) -> list[Need]:
        ranks = ledger.processes(name)
        here = ranks[: max(1, len(ranks) - elsewhere)]
        who = name if len(here) == 1 else f"the {len(here)} processes of {name}"
        return [_on(where, who, here[0], sum(parts.total - parts.process for parts in here), room)]

    return needs


def together_needs(room: int, where: str) -> Needs:
    """All roles in one process, in what a machine has left."""

    def needs(_recipe: Recipe, ledger: Ledger) -> list[Need]:
        parts = ledger.together
        return [_on(where, "all roles in one process", parts, parts.total - ledger.process, room)]

    return needs


def apart_needs(room: int, where: str) -> Needs:
    """All roles as processes of one machine, in what it has left."""

    def needs(_recipe: Recipe, ledger: Ledger) -> list[Need]:
        largest = max(ledger.roles().values(), key=lambda parts: parts.total)
        return [_on(where, "all roles as processes, the largest of them", largest, ledger.apart, room)]

    return needs


def device_needs(name: str | None, room: int, where: str) -> Needs:
    """What lies on a device with memory of its own: of one role, or of all in one process."""

    def needs(_recipe: Recipe, ledger: Ledger) -> list[Need]:
        parts = ledger.together if name is None else ledger.of(name)
        who = "all roles in one process" if name is None else _process(name, ledger)
        return [_on(where, who, parts, parts.on_device, room)]

    return needs


def _on(where: str, who: str, parts: Parts, needed: int, room: int) -> Need:
    return Need(where, f"{where}: {_mib(room)} MiB are free, and {who} would take", needed, room, parts)
