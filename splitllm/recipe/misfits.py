"""What must hold between the keys of a recipe, each of which is right by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitllm.recipe.engines import engine_misfits
from splitllm.recipe.full import full_misfits
from splitllm.recipe.quantization import quantization_misfits
from splitllm.recipe.roles import find_role, known_roles
from splitllm.recipe.round_misfits import Misfit, rounds_misfits
from splitllm.recipe.rounds import WITH_FROZEN, goes_by_rounds

if TYPE_CHECKING:
    from splitllm.recipe.schema import DataRecipe, LoraRecipe, Recipe, ServerRecipe, SplitRecipe, WireRecipe


def misfits(recipe: Recipe) -> Iterator[Misfit]:
    """Yields what is wrong between keys that are right by themselves: the keys involved and the complaint."""
    yield from _split_misfits(recipe.split, recipe.lora)
    yield from _client_lora_misfits(recipe)
    yield from _data_misfits(recipe.data)
    if recipe.train.processes > 1 and recipe.lora.adapters != "shared":
        advice = "use processes: 1, or adapters: shared"
        yield (
            ("train.processes", "lora.adapters"),
            f"train.processes: {recipe.train.processes} with lora.adapters: {recipe.lora.adapters} is not possible, "
            f"as no process would have all adapters; {advice}",
        )
    yield from _pace_misfits(recipe)
    if recipe.wire.absent == "drop" and (recipe.split.client_cuts or recipe.lora.adapters != "shared"):
        keys3 = ("wire.absent", "split.client_cuts", "lora.adapters")
        why = "a client that was left out takes over the state of another, and here nobody holds the same"
        yield keys3, f"wire.absent: 'drop' needs lora.adapters: shared and no split.client_cuts: {why}; use wait"
    yield from rounds_misfits(recipe)
    yield from quantization_misfits(recipe)
    yield from _processes_misfits(recipe)
    yield from engine_misfits(recipe)
    yield from full_misfits(recipe)
    yield from _server_misfits(recipe.server, recipe.split)
    yield from _wire_misfits(recipe.wire, recipe.split)
    steps, schedule = recipe.train.steps, recipe.train.schedule
    if schedule.warmup_steps > steps:
        keys = ("train.schedule.warmup_steps", "train.steps")
        yield keys, f"{keys[0]}: {schedule.warmup_steps} is more than train.steps ({steps}); use at most {steps}"
    if schedule.name == "constant" and schedule.warmup_steps > 0:
        keys = ("train.schedule.name", "train.schedule.warmup_steps")
        yield keys, f"{keys[0]}: 'constant' has no warm-up; use constant_with_warmup, or warmup_steps: 0"


def _processes_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """What several processes of one server cannot share."""
    processes, rule = recipe.server.processes, recipe.rounds.rule
    if processes > 1 and goes_by_rounds(recipe) and rule in WITH_FROZEN:
        why = f"cannot share what rounds.rule: {rule} adds to the frozen weights"
        keys = ("server.processes", "rounds.rule")
        yield keys, f"server.processes: {processes} {why}; use 1, or a rule such as fedavg"


def _pace_misfits(recipe: Recipe) -> Iterator[Misfit]:
    """What clients that go at their own pace can train, and what does nothing without them."""
    server, adapters = recipe.server, recipe.lora.adapters
    keys: tuple[str, ...]
    continuous = server.batching == "continuous"
    if continuous and adapters == "shared":
        why = "lets clients go at their own pace, so that they cannot step one adapter of their blocks together"
        advice = "use lora.adapters: common (the blocks above all clients are trained together)"
        advice += "" if goes_by_rounds(recipe) else " or per_client"
        yield ("server.batching", "lora.adapters"), f"server.batching: continuous {why}; {advice}"
    if continuous and adapters == "common" and recipe.train.clip_norm is None:
        why = "lets one client's gradients move what others train with them at their own pace by any amount"
        keys = ("train.clip_norm", "server.batching", "lora.adapters")
        yield keys, f"train.clip_norm: null {why}; set a norm, such as 1.0"
    for name, count in list(recipe.split.tiers.items())[1:-1]:
        if continuous and adapters == "common" and count > 1 and not goes_by_rounds(recipe):
            why = (
                "servers of one tier, with server.batching: continuous, would each train a common adapter of their own"
            )
            keys = ("split.tiers", "server.batching", "lora.adapters")
            advice = "use 1, lora.adapters: per_client, or rounds.replicas: local, which averages them"
            yield keys, f"split.tiers.{name}: {count} {why}; {advice}"
    for key in ("step_tenants", "step_tokens"):
        value = getattr(server, key)
        if value is not None and not (continuous and adapters == "common"):
            why = "needs server.batching: continuous and lora.adapters: common; elsewhere all step together"
            keys = (f"server.{key}", "server.batching", "lora.adapters")
            yield keys, f"server.{key}: {value} {why}; leave it out"
    if server.step_tenants is not None and server.step_tokens is not None:
        yield (
            ("server.step_tokens", "server.step_tenants"),
            f"server.step_tokens: {server.step_tokens} beside server.step_tenants; leave one of the two out",
        )


def _split_misfits(split: SplitRecipe, lora: LoraRecipe) -> Iterator[Misfit]:
    wanted = len(split.tiers) - 1
    names = ", ".join(split.tiers)
    if len(split.cuts) != wanted:
        advice = f"{len(split.tiers)} tiers ({names}) need {wanted} cut{'' if wanted == 1 else 's'}"
        yield ("split.cuts", "split.tiers"), f"split.cuts: {list(split.cuts)} has {len(split.cuts)}; {advice}"
    yield from _client_cut_misfits(split, lora)
    for name in split.memory_mib:
        if name not in split.tiers:
            keys = ("split.memory_mib", "split.tiers")
            yield keys, f"split.memory_mib: {name!r} is not a tier of split.tiers; use some of {names}"
    for name in lora.tiers or ():
        if name not in split.tiers:
            keys = ("lora.tiers", "split.tiers")
            yield keys, f"lora.tiers: {name!r} is not a tier of split.tiers; use some of {names}"


def _client_cut_misfits(split: SplitRecipe, lora: LoraRecipe) -> Iterator[Misfit]:
    clients = dict(list(split.tiers.items())[:1])
    above = split.cuts[1] if len(split.cuts) > 1 else None
    for name, cut in split.client_cuts.items():
        keys: tuple[str, ...] = ("split.client_cuts", "split.tiers", "split.cuts")
        place = f"split.client_cuts.{name}"
        if len(split.tiers) == 1:
            yield keys, f"{place}: with one tier nothing is cut; leave it out"
        elif find_role(clients, name) is None:
            yield keys, f"{place}: {name!r} is not a client of split.tiers; use some of {known_roles(clients)}"
        elif above is not None and cut >= above:
            why = f"leaves nothing to the tier above, which ends before block {above}"
            yield keys, f"{place}: {cut} {why}; use 1 to {above - 1}"
    keys = ("split.client_cuts", "lora.tiers")
    if split.client_cuts and lora.tiers is not None:
        yield keys, "lora.tiers: with split.client_cuts a block may be on two tiers; leave one of the two out"
    if lora.adapters == "shared":
        return
    place = f"lora.adapters: {lora.adapters}"
    if lora.dora:
        why = "cannot be had with lora.dora, which scales the product of all tenants"
        yield ("lora.adapters", "lora.dora"), f"{place} {why}; use dora: false"
    if len(split.tiers) == 1:
        why = "needs a server that several clients share"
        yield ("lora.adapters", "split.tiers"), f"{place} {why}; use two tiers or more, or shared"


def _client_lora_misfits(recipe: Recipe) -> Iterator[Misfit]:
    lora, clients = recipe.lora, dict(list(recipe.split.tiers.items())[:1])
    for name, own in lora.clients.items():
        place = f"lora.clients.{name}"
        if find_role(clients, name) is None:
            keys: tuple[str, ...] = ("lora.clients", "split.tiers")
            yield keys, f"{place}: {name!r} is not a client of split.tiers; use some of {known_roles(clients)}"
        elif lora.adapters != "per_client" and recipe.rounds.replicas == "together":
            keys = ("lora.clients", "lora.adapters", "rounds.replicas")
            advice = "use that, rounds.replicas: local, or lora.clients: {}"
            yield keys, f"{place}: needs lora.adapters: per_client, not {lora.adapters}; {advice}"
        elif lora.start_from is not None and own.rank not in (None, lora.rank):
            keys = ("lora.clients", "lora.start_from", "lora.rank")
            yield keys, f"{place}.rank: {own.rank} is not that of lora.start_from ({lora.rank}); leave one of them out"


_FIELDS = {"prompt_completion": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}
_PARTITION_NEEDS = {"iid": (), "dirichlet": ("field", "alpha"), "field": ("field",), "file": (), "own": ()}


def _data_misfits(data: DataRecipe) -> Iterator[Misfit]:
    if data.pack and data.format != "text":
        keys = ("data.pack", "data.format")
        yield keys, f"data.pack: true needs data.format: text, not {data.format}; use pack: false or format: text"
    for field in data.fields:
        if field not in _FIELDS[data.format]:
            keys, known = ("data.fields", "data.format"), ", ".join(_FIELDS[data.format])
            yield keys, f"data.fields.{field}: format {data.format} has no such field; use {known}"
    by = data.partition.by
    for key in ("field", "alpha"):
        given, needed = getattr(data.partition, key) is not None, key in _PARTITION_NEEDS[by]
        keys = (f"data.partition.{key}", "data.partition.by")
        if needed and not given:
            example = "a field of the rows, such as group" if key == "field" else "a number above 0, such as 0.5"
            yield keys, f"{keys[0]}: missing; by: {by} needs {example}"
        elif given and not needed:
            yield keys, f"{keys[0]}: by: {by} does not use it; leave it out"
    sources = (data.source,) if isinstance(data.source, str) else data.source
    if by == "file" and any(source.startswith(("builtin:", "hub:")) for source in sources):
        keys = ("data.partition.by", "data.source")
        yield keys, f"{keys[0]}: 'file' needs local files, not {sources[0]}; use iid, dirichlet or field"


def _server_misfits(server: ServerRecipe, split: SplitRecipe) -> Iterator[Misfit]:
    clients = dict(list(split.tiers.items())[:1])
    for name in server.tenants:
        if find_role(clients, name) is None:
            keys: tuple[str, ...] = ("server.tenants", "split.tiers")
            place = f"server.tenants.{name}"
            yield keys, f"{place}: {name!r} is not a client of split.tiers; use some of {known_roles(clients)}"
    if server.memory_mib is not None and len(split.tiers) == 1:
        keys = ("server.memory_mib", "split.tiers")
        yield keys, f"server.memory_mib: {server.memory_mib} is of a server, and with one tier there is none; use null"


def _wire_misfits(wire: WireRecipe, split: SplitRecipe) -> Iterator[Misfit]:
    keys = ("wire.addresses", "split.tiers")
    servers = dict(list(split.tiers.items())[1:])
    taken: dict[str, str] = {}
    for name, address in wire.addresses.items():
        if find_role(servers, name) is None:
            advice = f"use some of {known_roles(servers)}" if servers else "split.tiers has none; leave it out"
            yield keys, f"wire.addresses: {name!r} is not a server of split.tiers; {advice}"
        elif (other := taken.setdefault(address.lower(), name)) != name:
            yield keys, f"wire.addresses: {other} and {name} are both at {address}; give each its own"


def covered(key: str, broken: frozenset[str]) -> bool:
    """Whether a key is one of those that are broken, or below one."""
    return any(key == entry or key.startswith(f"{entry}.") for entry in broken)
