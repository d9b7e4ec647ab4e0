"""Which clients a recipe's servers take in, and with how many rows a micro-batch: by what each costs in memory.

Nothing but the recipe and the model decides, for all clients at once and before any of them comes. So a client gets the
same batch size whoever came before it, again after a restart of its server, and in `splitllm train`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from splitllm.errors import RecipeError
from splitllm.model.memory import role_price, tenant_price
from splitllm.policy.admission import MIB, Admitted, Refused, admit_all
from splitllm.recipe import Recipe, client_cuts, client_names, clients_below, lora_of, role_names


@dataclass(frozen=True)
class Admission:
    """Of one server right above clients.

    Attributes:
        budget: bytes of `server.memory_mib`.
        own: bytes that the server holds before any client comes.
        clients: number -> whether it may come, and with what batch size.
    """

    budget: int
    own: int
    clients: Mapping[int, Admitted | Refused]

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
    `train` allows it.

    Args:
        recipe: as it was resolved.
        config: of the whole text model.
        modules: global names of the modules that LoRA adapts.
    """
    if recipe.server.memory_mib is None or len(recipe.split.tiers) < 2:
        return {}
    servers = list(role_names(recipe).values())[1]
    return {server: _admission(recipe, config, modules, server) for server in servers}


def batch_sizes(recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str]) -> dict[int, int]:
    """Client -> rows of a micro-batch, where every client takes part.

    Args:
        recipe: as it was resolved.
        config: of the whole text model.
        modules: global names of the modules that LoRA adapts.

    Raises:
        RecipeError: a server refuses one.
    """
    sizes = dict.fromkeys(range(len(_names(recipe))), recipe.train.batch_size)
    for server, admission in admissions(recipe, config, modules).items():
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
            sizes.append(f"but not {len(admission.refused)}, {_names(recipe)[min(admission.refused)]} the first")
        held = f"{admission.own / MIB:.1f} of {admission.budget // MIB} MiB are its own"
        lines.append(f"memory of {server}: {held}; of its clients it takes in {', '.join(sizes)}")
    return lines


def _refusal(recipe: Recipe, server: str, admission: Admission) -> str:
    client, refused = next(iter(admission.refused.items()))
    return f"server.memory_mib: {server} refuses {_names(recipe)[client]}: {refused.line}"


def _own_line(server: str, admission: Admission) -> str:
    needs, has = -(-admission.own // MIB), admission.budget // MIB
    return f"server.memory_mib: {has} MiB do not hold {server} itself, which takes {needs} without a client; use more"


def _admission(recipe: Recipe, config: PreTrainedConfig, modules: Sequence[str], server: str) -> Admission:
    assert recipe.server.memory_mib is not None
    budget, own = recipe.server.memory_mib * MIB, role_price(recipe, config, modules, server).total
    cuts, under_way = client_cuts(recipe), min(recipe.train.in_flight, recipe.train.accumulate)
    costs: dict[tuple[int, str, int], int] = {}

    def price(client: int, rows: int) -> int:
        kind = cuts[client], lora_of(recipe, client).model_dump_json(), rows  # these cost alike
        if kind not in costs:
            costs[kind] = tenant_price(recipe, config, modules, server, client, rows=rows, in_flight=under_way).total
        return costs[kind]

    return Admission(
        budget, own, admit_all(price, clients_below(recipe, server), budget - own, recipe.train.batch_size)
    )


def _names(recipe: Recipe) -> list[str]:
    """Of the clients."""
    return client_names(recipe)
