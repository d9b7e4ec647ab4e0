"""Whether a server takes in a client: at its batch size, at a smaller one, or not, by what each costs in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Admitted:
    """The client may send batches of so many rows, for which so many bytes are set aside."""

    batch_size: int
    bytes: int


@dataclass(frozen=True)
class Refused:
    """There is no memory for the client.

    Attributes:
        needed: bytes, at the cheapest batch size that would do.
        free: bytes.
        line: what is missing and what would help.
    """

    needed: int
    free: int
    line: str


def admit(prices: Mapping[int, int], free: int, wanted: int, smallest: int = 1) -> Admitted | Refused:
    """The largest batch size that there is memory for.

    Args:
        prices: batch size -> bytes that a tenant of that batch size costs: adapter, gradients, optimiser, activations.
        free: bytes of the budget that no other tenant has.
        wanted: batch size of the client's recipe.
        smallest: batch size with which the client would still come.

    Raises:
        ValueError: no batch size between `smallest` and `wanted` has a price.
    """
    possible = {size: price for size, price in prices.items() if smallest <= size <= wanted}
    if not possible:
        raise ValueError(f"no price for a batch size from {smallest} to {wanted}: there are {sorted(prices)}")
    fitting = [size for size, price in possible.items() if price <= free]
    if fitting:
        return Admitted(max(fitting), possible[max(fitting)])
    needed, size = min((price, size) for size, price in possible.items())
    return Refused(needed, free, _line(needed, size, free))


def admit_all(
    price: Callable[[int, int], int], clients: Sequence[int], free: int, wanted: int
) -> dict[int, Admitted | Refused]:
    """All clients of a server at once, so that nothing depends on who comes first.

    Each gets memory for one row as long as there is any, in this order; what is left then goes to all of them alike:
    batch sizes differ by one row at most, and those that come first in this order have the larger one.

    Args:
        price: client and batch size, from 1 to `wanted` -> bytes that it costs; more rows never cost less.
        clients: their numbers.
        free: bytes of the budget.
        wanted: batch size of the recipe.
    """
    outcome: dict[int, Admitted | Refused] = {}
    for client in clients:
        outcome[client] = one = admit({1: price(client, 1)}, free, 1)
        free -= one.bytes if isinstance(one, Admitted) else 0
    inside = [client for client, one in outcome.items() if isinstance(one, Admitted)]
    free += sum(price(client, 1) for client in inside)
    rows = most_rows(wanted, lambda rows: sum(price(client, rows) for client in inside) <= free)
    free -= sum(price(client, rows) for client in inside)
    for client in inside:
        more = {size: price(client, size) - price(client, rows) for size in (rows, min(rows + 1, wanted))}
        one = admit(more, free, wanted)
        assert isinstance(one, Admitted), "no more than it has costs nothing more"
        free -= one.bytes
        outcome[client] = Admitted(one.batch_size, price(client, one.batch_size))
    return outcome


def most_rows(wanted: int, fits: Callable[[int], bool]) -> int:
    """The largest number of rows from 1 to `wanted` that fits; 1 is taken to."""
    if fits(wanted):
        return wanted
    low, high = 1, wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def lacking(needed: int, free: int) -> int:
    """Whole MiB by which a budget has to grow."""
    return max(1, math.ceil((needed - free) / MIB))


def _line(needed: int, size: int, free: int) -> str:
    """Rounded so that what is free is never said to be enough."""
    need, have = math.ceil(needed / MIB * 10) / 10, math.floor(max(0, free) / MIB * 10) / 10
    return (
        f"a client of batch size {size} needs {need:.1f} MiB of the server's memory, {have:.1f} MiB are left: "
        f"raise server.memory_mib by {lacking(needed, free)}, set a smaller data.max_length, or "
        "train.activation_checkpointing: true"
    )
