"""Which clients a recipe's servers take in, and with how many rows a micro-batch: by what each costs in memory.

Nothing but the recipe and the model decides, for all clients at once and before any of them comes. So a client gets the
same batch size whoever came before it, again after a restart of its server, and in `splitllm train`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedConfig

from splitllm.errors import RecipeError
from splitllm.model.joined import Rows
from splitllm.model.memory import Price, role_price, tenant_price
from splitllm.policy.admission import MIB, Admitted, Refused, admit_all, lacking, most_rows
from splitllm.policy.batching import Budget
from splitllm.recipe import Recipe, client_cuts, client_names, clients_below, goes_by_lanes, lora_of, role_names

Prices = Callable[[int, int], Price]


@dataclass(frozen=True)
class Room:
    """Memory for graphs between forward and backward, where clients at their own pace take turns for it.

    Attributes:
        bytes: of it, for at least one micro-batch of any client; one that comes late has as much beside it.
        graphs: cut layer -> bytes of the largest graph of a client that is cut there.
        positions: of that micro-batch.
    """

    bytes: int
    graphs: Mapping[int, int]
    positions: int

    def price(self, rows: Rows) -> int:
        """Bytes that the graph of a micro-batch takes at most, beside others to whose length it is padded."""
        positions = len(rows.lengths) * max(rows.lengths) / (1 - Budget.padding)
        return min(self.bytes, math.ceil(self.graphs[rows.entry] * positions / self.positions))


@dataclass(frozen=True)
class Admission:
    """Of one server right above clients.

    Attributes:
        budget: bytes of `server.memory_mib`.
        own: bytes that the server holds before any client comes.
        clients: number -> whether it may come, and with what batch size.
        room: for the graphs of all clients; None where each has memory for its own set aside.
    """

    budget: int
    own: int
    clients: Mapping[int, Admitted | Refused]
    room: Room | None = None

    @property
    def admitted(self) -> dict[int, Admitted]:
        """Those that may come."""
        return {client: one for client, one in self.clients.items() if isinstance(one, Admitted)}

    @property
    def batch_sizes(self) -> dict[int, int]:
        """Theirs."""
        return {client: one.batch_size for client, one in self.admitted.items()}

    @property
    def refused(self) -> dict[int, Refused]:
        """Those that may not."""
        return {client: one for client, one in self.clients.items() if isinstance(one, Refused)}


def admissions(recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str]) -> dict[str, Admission]:
    """Server -> whom it takes in, of all servers right above clients; none where `server.memory_mib` says nothing.

    A client is priced with rows of `data.max_length` and as many micro-batches between forward and backward as
    `train` allows it. Where clients go at their own pace they take turns for the graphs of these: then there must be
    room for two.

    Args:
        recipe: as it was resolved.
        config: of the whole text model.
        modules: global names of the modules that LoRA adapts.
    """
    if recipe.server.memory_mib is None or len(recipe.split.tiers) < 2:
        return {}
    servers = list(role_names(recipe).values())[1]
    return {server: _admission(recipe, config, modules, server) for server in servers}


def batch_sizes(recipe: Recipe, found: Mapping[str, Admission]) -> dict[int, int]:
    """Client -> rows of a micro-batch, where every client takes part.

    Args:
        recipe: as it was resolved.
        found: whom its servers take in.

    Raises:
        RecipeError: a server refuses one.
    """
    sizes = dict.fromkeys(range(len(_names(recipe))), recipe.train.batch_size)
    for server, admission in found.items():
        if admission.refused:
            raise RecipeError([_refusal(recipe, server, admission)])
        sizes |= admission.batch_sizes
    return sizes


def problems(recipe: Recipe, found: Mapping[str, Admission]) -> list[str]:
    """Why a recipe cannot run: a server has memory for no client, or none for one that is waited for without end."""
    lines = []
    for server, admission in found.items():
        if admission.own > admission.budget:
            lines.append(_own_line(server, admission))
        elif admission.refused and (recipe.wire.absent == "wait" or not admission.batch_sizes):
            lines.append(_refusal(recipe, server, admission))
    return lines


def lines_of(recipe: Recipe, found: Mapping[str, Admission]) -> list[str]:
    """Whom every server takes in, for the user."""
    lines = []
    for server, admission in found.items():
        counts = Counter(admission.batch_sizes.values())
        sizes = [f"{clients} with batches of {rows}" for rows, clients in sorted(counts.items())]
        if admission.refused:
            sizes.append(f"but not {', '.join(_names(recipe)[client] for client in sorted(admission.refused))}")
        held = f"{admission.own / MIB:.1f} of {admission.budget // MIB} MiB are its own"
        if admission.room is not None:
            held += f", {admission.room.bytes / MIB:.1f} for activations by turns"
        lines.append(f"memory of {server}: {held}; of its clients it takes in {', '.join(sizes)}")
    return lines


def _refusal(recipe: Recipe, server: str, admission: Admission) -> str:
    client, refused = next(iter(admission.refused.items()))
    others, free = len(admission.refused) - 1, min(one.free for one in admission.refused.values())
    more = lacking(sum(one.needed for one in admission.refused.values()), free)
    all_ = f"; for the {others} others that are refused as well, by {more}" if others else ""
    return f"server.memory_mib: {server} refuses {_names(recipe)[client]}: {refused.line}{all_}"


def _own_line(server: str, admission: Admission) -> str:
    needs, has = -(-admission.own // MIB), admission.budget // MIB
    return f"server.memory_mib: {has} MiB do not hold {server} itself, which takes {needs} without a client; use more"


def _admission(recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str], server: str) -> Admission:
    assert recipe.server.memory_mib is not None
    budget, own = recipe.server.memory_mib * MIB, role_price(recipe, config, modules, server).total
    clients, prices = clients_below(recipe, server), _prices(recipe, config, modules, server)
    if goes_by_lanes(recipe):
        return _by_turns(recipe, Admission(budget, own, {}), clients, prices)
    taken_in = admit_all(lambda c, rows: prices(c, rows).total, clients, budget - own, recipe.train.batch_size)
    return Admission(budget, own, taken_in)


def _by_turns(recipe: Recipe, bare: Admission, clients: Sequence[int], prices: Prices) -> Admission:
    """All with the same number of rows: the largest for which there is room for two graphs of any client."""
    cuts, free = client_cuts(recipe), bare.budget - bare.own

    def graphs(rows: int) -> dict[int, int]:
        found = dict.fromkeys((cuts[client] for client in clients), 0)
        for client in clients:
            found[cuts[client]] = max(found[cuts[client]], prices(client, rows).activations)
        return found

    def outcome(rows: int) -> dict[int, Admitted | Refused]:
        left = free - 2 * max(graphs(rows).values())
        return admit_all(lambda c, r: prices(c, r).total - prices(c, r).activations, clients, left, rows)

    def fits(rows: int) -> bool:
        return all(isinstance(one, Admitted) and one.batch_size == rows for one in outcome(rows).values())

    rows = most_rows(recipe.train.batch_size, fits)
    taken_in, largest = outcome(rows), max(graphs(rows).values())
    left = free - sum(one.bytes for one in taken_in.values() if isinstance(one, Admitted))
    room = Room(max(largest, left - largest), graphs(rows), rows * recipe.data.max_length)
    return replace(bare, clients=taken_in, room=room)


def _prices(recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str], server: str) -> Prices:
    """Client and rows -> what it costs; with the graph of one micro-batch where clients take turns for it."""
    cuts, under_way = client_cuts(recipe), min(recipe.train.in_flight, recipe.train.accumulate)
    cost = partial(tenant_price, recipe, config, modules, server)
    found: dict[tuple[int, str, int], Price] = {}

    def price(client: int, rows: int) -> Price:
        kind = cuts[client], lora_of(recipe, client).model_dump_json(), rows  # these cost alike
        if kind not in found:
            found[kind] = cost(client, rows=rows, in_flight=under_way)
            if goes_by_lanes(recipe):
                found[kind] = replace(found[kind], activations=cost(client, rows=rows).activations)
        return found[kind]

    return price


def _names(recipe: Recipe) -> list[str]:
    """Of the clients."""
    return client_names(recipe)
