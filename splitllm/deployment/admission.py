"""Whom a server takes in, and what it lets pass of those who have fewer rows than the recipe's."""

from __future__ import annotations

import logging
from collections.abc import Callable

from splitllm.errors import PeerError
from splitllm.policy import admission as policy
from splitllm.policy.admission import MIB
from splitllm.recipe import Recipe, tier_of
from splitllm.roles.admission import Admission
from splitllm.wire.message import Message
from splitllm.wire.stream import Refused

logger = logging.getLogger(__name__)
Check = Callable[[Message], None]


def say(recipe: Recipe, admission: Admission | None) -> None:
    """Log what was decided, if there was anything to decide."""
    if admission is None:
        return
    sizes, wanted = admission.batch_sizes, recipe.train.batch_size
    fields = {
        "server.memory_mib": admission.budget // MIB,
        "own MiB": round(admission.own / MIB, 1),
        "clients MiB": round(sum(one.bytes for one in admission.admitted.values()) / MIB, 1),
        "clients": len(sizes),
        "smaller batches": {client: size for client, size in sizes.items() if size < wanted},
        "refused": sorted(admission.refused),
    }
    logger.info("admission", extra={"fields": fields})


def rows_for(recipe: Recipe, admission: Admission | None, name: str) -> int:
    """The batch size of a child that knocks: of a client its own, of other roles the recipe's.

    Raises:
        Refused: there is no memory for it.
    """
    if admission is None:
        return recipe.train.batch_size
    outcome = admission.clients[tier_of(recipe, name)[1]]
    if isinstance(outcome, policy.Refused):
        raise Refused("admission", f"server.memory_mib: {outcome.line}")
    return outcome.batch_size


def checked(check: Check, admission: Admission | None) -> Check:
    """The same check, which also refuses more rows than a client was let in with."""
    if admission is None:
        return check
    most = admission.batch_sizes

    def check_rows(message: Message) -> None:
        check(message)
        if message.kind != "forward":
            return
        rows, memory = len(message.header["lengths"]), most.get(message.micro_batch[1], 0)
        if rows > memory:
            raise PeerError(f"{message.sender} sent forward with {rows} rows, where there is memory for {memory}")

    return check_rows
