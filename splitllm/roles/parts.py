"""What each child owes in one generation: by who takes part in it, and who lacks a state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from splitllm.errors import PeerError
from splitllm.roles.checks import Allowed
from splitllm.roles.recovery import Decision
from splitllm.wire.message import Message


@dataclass(frozen=True)
class Part:
    """Of one child.

    Attributes:
        clients: the numbers of those clients below it that take part.
        tiers: adapter tensors by tier, of the tiers whose donor is below it.
    """

    clients: frozenset[int]
    tiers: Mapping[str, frozenset[str]]

    def check(self, message: Message) -> None:
        """Look at a request of this child, which the recipe allows.

        Raises:
            PeerError: it speaks for others than it should, or not for all of them.
        """
        if message.kind in _CHECKS:
            _CHECKS[message.kind](self, message)


def part_of(allowed: Allowed, child: str, present: Collection[str], decision: Decision) -> Part:
    """What a child owes.

    Args:
        allowed: by the recipe.
        child: whose part it is.
        present: the child and the roles below it that take part.
        decision: from which state the generation goes on.
    """
    clients = frozenset(number for number, name in allowed.children[child].clients.items() if name in present)
    given = [tier for tier, donor in decision.donors.items() if donor in present]
    return Part(clients, {tier: frozenset(allowed.tiers[tier]) for tier in given if allowed.tiers[tier]})


def _share(part: Part, message: Message) -> None:
    due = frozenset[str]().union(*part.tiers.values())
    found = {name.partition("/")[2] for name in message.tensors}
    _need(found == due, message, f"the states of {len(found)} adapter tensors, where those of {len(due)} are due")


def _of_clients(key: str) -> Callable[[Part, Message], None]:
    def check(part: Part, message: Message) -> None:
        found = {int(client) for client in message.header[key]}
        clients = f"clients {sorted(found)}, where {sorted(part.clients)} take part"
        _need(found == part.clients, message, f"{key} of {clients}")

    return check


def _close(part: Part, message: Message) -> None:
    _of_clients("losses")(part, message)
    odd = {int(client) for client in message.header["own"]} - part.clients
    _need(not odd, message, f"norms of clients {sorted(odd)}, which take no part")


def _round(part: Part, message: Message) -> None:
    _of_clients("examples" if "examples" in message.header else "weights")(part, message)


_CHECKS: dict[str, Callable[[Part, Message], None]] = {
    "share": _share,
    "open": _of_clients("labels"),
    "close": _close,
    "round": _round,
    "evaluated": _of_clients("losses"),
}


def _need(fits: bool, message: Message, found: str) -> None:
    if not fits:
        raise PeerError(f"{message.sender} sent {message.kind} with {found}")
