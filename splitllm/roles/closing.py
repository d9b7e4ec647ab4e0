"""The end of a step: what goes up when it closes, what comes down, and the optimiser steps.

Adapter tensors are of three kinds. Of a tensor that one role alone holds the squared norm goes up; of one that several
roles hold, the gradient itself, to be summed; of a client's own adapter (`lora.adapters`) the norms, by client, since
it is clipped and stepped by itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitllm.errors import DivergedError
from splitllm.model.common import Gift
from splitllm.model.trainable import Tensors, clip_factor, squared_norms
from splitllm.roles.local import LocalStep
from splitllm.roles.together import add_into, answered, expected, finite, is_number, travelled
from splitllm.roles.worker import Worker
from splitllm.wire.message import Message


@dataclass
class Closing:
    """What is known of a step below the role that closes it.

    Attributes:
        norms: squared norm of each tensor that one role alone holds.
        sums: gradients of the tensors that several roles hold.
        own: client -> squared norms of its own adapter's gradients.
        losses: client -> summed loss (None if it is not finite), labels, tokens.
        crossed: role -> bytes up and down over its link since the last step.
    """

    norms: dict[str, float | None] = field(default_factory=dict)
    sums: Tensors = field(default_factory=dict)
    own: dict[int, list[float | None]] = field(default_factory=dict)
    losses: dict[int, Sequence[Any]] = field(default_factory=dict)
    crossed: dict[str, Sequence[int]] = field(default_factory=dict)

    def take(self, message: Message) -> None:
        """Add what one child tells."""
        header = message.header
        self.norms.update(header["norms"])
        add_into(self.sums, message.tensors)
        for client, norms in header["own"].items():
            self.own.setdefault(int(client), []).extend(norms)
        self.losses.update({int(client): sums for client, sums in header["losses"].items()})
        self.crossed.update(header["bytes"])

    def hand_in(
        self, worker: Worker, summed: Collection[str], clients: Collection[int], local: tuple[str, float] | None = None
    ) -> None:
        """Add what a role computed itself.

        Args:
            worker: of that role.
            summed: names of the tensors whose gradients are summed over roles.
            clients: those that took part in the step.
            local: where the role steps by itself, its name and the norm of what it steps by.
        """
        gradients = worker.trainable.gradients() if local is None else {}
        if local is not None and worker.trainable.parameters:
            self.norms[local[0]] = finite(local[1] ** 2)
        alone = {name: gradient for name, gradient in gradients.items() if name not in summed}
        self.norms.update({name: finite(norm) for name, norm in squared_norms(alone).items()})
        add_into(self.sums, {name: gradient for name, gradient in gradients.items() if name in summed})
        for client in sorted(worker.own.keys() & clients):
            norms = squared_norms(worker.own[client].gradients())
            self.own.setdefault(client, []).extend(map(finite, norms.values()))

    def header(self) -> dict[str, Any]:
        """All but the sums, as it travels."""
        return {"norms": self.norms, "own": self.own, "losses": self.losses, "bytes": self.crossed}


@dataclass(frozen=True)
class Settled:
    """What everybody steps by.

    Attributes:
        norm: total gradient norm, over all adapters.
        factor: what the gradients that are not a client's own are multiplied by.
        own: client -> what the gradients of its own adapter are multiplied by; None: they are not finite, no step.
        sums: over all roles.
    """

    norm: float
    factor: float
    own: Mapping[int, float | None] = field(default_factory=dict)
    sums: Mapping[str, Any] = field(default_factory=dict)

    def header(self, clients: Collection[int]) -> dict[str, Any]:
        """As it travels to the roles that these clients are below."""
        return {"norm": self.norm, "factor": self.factor, "own": {c: self.own[c] for c in self.own if c in clients}}

    @classmethod
    def from_reply(cls, reply: Message, closing: Closing) -> Settled:
        """As it came down.

        Raises:
            PeerError: something is missing or of another kind.
        """
        norm, factor = (float(answered(reply, key, is_number)) for key in ("norm", "factor"))
        own = answered(reply, "own", lambda value: _are_factors(value, closing.own))
        sums = {name: expected(reply, name, tuple(tensor.shape)) for name, tensor in closing.sums.items()}
        return cls(norm, factor, {int(client): each for client, each in own.items()}, sums)


def settle(step: int, closing: Closing, totals: Tensors, clip: float | None, scales: Mapping[int, float]) -> Settled:
    """At the top: norms, clipping, and what all step by.

    Args:
        step: that closes.
        closing: of all roles.
        totals: its sums, over all processes.
        clip: the largest norm, or None.
        scales: client -> what turns its own gradients into those of the mean loss over its own labels.

    Raises:
        DivergedError: the gradients of what is trained together are not finite.
    """
    squares = [*closing.norms.values(), *map(finite, squared_norms(totals).values())]
    norm = math.sqrt(math.fsum(map(travelled, squares)))
    if not math.isfinite(norm):
        raise DivergedError(f"step {step + 1}: the gradient norm is {norm}; lower the learning rate")
    own = {client: scales[client] * math.sqrt(math.fsum(map(travelled, each))) for client, each in closing.own.items()}
    factors = {
        client: scales[client] * clip_factor(each, clip) if math.isfinite(each) else None
        for client, each in own.items()
    }
    total = math.hypot(norm, *filter(math.isfinite, own.values()))
    return Settled(total, clip_factor(norm, clip), factors, totals)


def apply(
    worker: Worker, settled: Settled, rate: float, gift: Gift | None = None, local: LocalStep | None = None
) -> None:
    """One optimiser step of all adapters of a role; one of its own whose gradients are not finite stays as it is.

    Args:
        worker: of that role.
        settled: what all step by.
        rate: multiplies the recipe's learning rate.
        gift: whose step it was, where what is trained together steps once enough was given.
        local: where the role steps by itself, what it steps by.
    """
    if local is not None:
        if local.factor is None:
            worker.trainable.end()
        else:
            worker.trainable.apply(local.gradients, local.factor, rate)
    else:
        _apply_together(worker, settled, rate, gift)
    for client, factor in settled.own.items():
        if client in worker.own and factor is not None:
            worker.own[client].apply(worker.own[client].gradients(), factor, rate)


def _apply_together(worker: Worker, settled: Settled, rate: float, gift: Gift | None) -> None:
    """One step of what roles step together, or what one client's step gives to it."""
    gradients = worker.trainable.gradients()
    together = {name: settled.sums.get(name, gradient) for name, gradient in gradients.items()}
    if worker.common is None:
        worker.trainable.apply(together, settled.factor, rate)
    else:
        assert gift is not None, "a step of a lane is that of one client"
        worker.common.give(gift, together, settled.factor, rate)
        worker.trainable.end()
        worker.common.lend(worker.trainable)


def scale_of(weight: float, labels: int) -> float:
    """What turns gradients of a client's weighted loss into those of the mean loss over its labels in the step."""
    return 1.0 / (weight * labels) if weight and labels else 1.0


def _are_factors(value: Any, clients: Collection[int]) -> bool:
    plain = isinstance(value, dict) and all(str(client).isdecimal() for client in value)
    return plain and {int(c) for c in value} == set(clients) and all(e is None or is_number(e) for e in value.values())
