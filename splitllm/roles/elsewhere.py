"""Rounds of several sites: the top of one averages with the tops of others, and another engine does the averaging."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from splitllm.errors import AverageError, PeerError, RecipeError
from splitllm.federated.exchange import Exchange
from splitllm.federated.rounds import Arithmetic, Tensors
from splitllm.roles.outcomes import usable

logger = logging.getLogger(__name__)
SAID_SECONDS = 60.0
APART = 1e-6
"""How far what all sites start from may be, by rounding of the average, from what one of them does."""


@dataclass
class Elsewhere:
    """What stands above the top of a site.

    Attributes:
        exchange: where the engine takes values and gives outcomes.
        arithmetic: of the rule.
        steps: of the run.
        first: the steps after which the first round is held.
        start: what the site starts from, as a value, where the engine must know; None: it need not.
        patience: seconds between two lines that say what is waited for.
    """

    exchange: Exchange
    arithmetic: Arithmetic
    steps: int
    first: int
    start: Tensors | None = None
    patience: float = SAID_SECONDS
    _waits: bool = field(default=False, init=False)

    @property
    def waits(self) -> bool:
        """Whether a round waits for the other sites now."""
        return self._waits

    async def outcome(self, steps: int, weight: float, value: Mapping[str, torch.Tensor]) -> Tensors | None:
        """What all sites go on from.

        Args:
            steps: done.
            weight: of this site; 0: it takes the outcome and counts nothing.
            value: of this site.

        Returns:
            The value of all, on the CPU; None where nobody counted, and the round is void.

        Raises:
            AverageError: it is of no use here, or the sites do not start from the same adapter.
        """
        if self.start is not None and steps == self.first:
            await self._begin(self.start)
        found = await self._averaged(steps, weight, value)
        if not found:
            return None
        try:
            return usable(found, value, self.arithmetic, self.exchange.address)
        except PeerError as error:
            raise AverageError(f"{error}; use one recipe at all sites") from error

    async def _begin(self, start: Tensors) -> None:
        """Tell what the site starts from, and hear whether the others do, too."""
        found = await self._averaged(0, 1.0, start)
        for name, mine in start.items():
            other = found.get(name)
            if other is None or other.shape != mine.shape or float((other - mine).abs().max()) > APART:
                raise AverageError(f"{name} is another where other sites start; use one seed and lora.start_from")

    async def _averaged(self, steps: int, weight: float, value: Mapping[str, torch.Tensor]) -> Tensors:
        self._waits, saying = True, asyncio.create_task(self._say(steps))
        try:
            return await self.exchange.average(steps, weight, value, last=steps == self.steps)
        finally:
            self._waits = False
            saying.cancel()

    async def _say(self, steps: int) -> None:
        """From time to time what is waited for."""
        seconds = 0.0
        while True:
            await asyncio.sleep(self.patience)
            seconds += self.patience
            who = "the other sites" if self.exchange.is_taken else "an engine that takes this site's part"
            fields = {"step": steps, "seconds": seconds, "exchange": self.exchange.address}
            line = f"the round after step {steps} has waited {seconds:.0f} s for {who} at {self.exchange.address}"
            logger.warning(line, extra={"fields": fields})


@asynccontextmanager
async def _open(elsewhere: Elsewhere) -> AsyncIterator[None]:
    address = elsewhere.exchange.address
    try:
        await elsewhere.exchange.__aenter__()
    except OSError as error:
        why = f"cannot listen there ({error.strerror or error}); use another path or port, of this machine"
        raise RecipeError([f"rounds.exchange: {address}: {why}"]) from error
    try:
        yield
    finally:
        await elsewhere.exchange.__aexit__()


def opened(elsewhere: Elsewhere | None) -> AbstractAsyncContextManager[None]:
    """The exchange of a site, open; nothing where there is none.

    Raises:
        RecipeError: on entering, if the address cannot be listened on.
    """
    return nullcontext() if elsewhere is None else _open(elsewhere)
