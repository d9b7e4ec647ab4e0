"""An adapter that several clients train together, each at its own pace.

Every client computes with a copy, which stays as it is while a step of that client is open. What the step has found is
given when it closes; once enough was given, the weighted mean of it, at that of their learning rates, is one step of
the optimiser. So the server part of
SplitFed V2 (arXiv 2004.12088) is trained, and a buffer is what FedBuff (arXiv 2106.06639) puts before an optimiser
whose clients wait for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from splitllm.model.trainable import ADAPTER_SLOT, Tensors, Trainable

PENDING = "pending/"


@dataclass(frozen=True)
class Buffer:
    """When the optimiser steps, and what the gifts weigh by then.

    Attributes:
        tenants, tokens: it steps after the steps of so many tenants, or so many tokens; None does not count.
        by_labels: a gift weighs as many as its labels; else all with a label weigh the same.
    """

    tenants: int | None = None
    tokens: int | None = None
    by_labels: bool = True


@dataclass(frozen=True)
class Gift:
    """What the gradients of one client's step are worth.

    Attributes:
        client: its number.
        step: of the client.
        labels, tokens: that it computed in the step.
    """

    client: int
    step: int
    labels: int
    tokens: int


class Common:
    """The adapter, its optimiser, and what was given since it last stepped.

    Values are published whole: nobody who reads them meanwhile sees half a step.

    Args:
        trainable: the adapter that is stepped; nobody computes with it.
        buffer: when it is.

    Attributes:
        given: client -> its steps so far whose gradients are in the adapter, or pending.
        steps: of the optimiser.
        changes: gifts, steps and outcomes of rounds so far.
    """

    def __init__(self, trainable: Trainable, buffer: Buffer) -> None:
        self.trainable, self.buffer = trainable, buffer
        self.given: dict[int, int] = {}
        self.steps = self.changes = 0
        self._round, self._closed = 0, False
        self._pending: Tensors = {}
        self._tenants, self._tokens, self._weight, self._rates = 0, 0, 0.0, 0.0
        self._values = self._published()

    def lend(self, copy: Trainable) -> None:
        """Let a client's copy be as the adapter is now; its tensors are shared, and never written to."""
        values = self._values  # replaced as a whole by another thread
        for name, parameter in copy.parameters.items():
            parameter.data = values[name]
            parameter.grad = None

    def give(self, gift: Gift, gradients: Mapping[str, torch.Tensor], factor: float, rate: float) -> None:
        """Take what a step of a client has found, once: a step that is run again was given before.

        Args:
            gift: whose it is.
            gradients: of the mean loss over the client's labels.
            factor: clipping, multiplies every gradient.
            rate: multiplies the recipe's learning rate.
        """
        if gift.step < self.given.get(gift.client, 0):
            return
        self.given[gift.client] = gift.step + 1
        self.changes += 1
        weight = float(gift.labels if self.buffer.by_labels else min(1, gift.labels))
        if self._closed:
            return
        if weight:
            self._add(gradients, factor * weight)
            self._weight, self._rates = self._weight + weight, self._rates + weight * rate
        self._tenants, self._tokens = self._tenants + 1, self._tokens + gift.tokens
        if self._is_enough():
            self.step()

    def step(self) -> None:
        """Step by what was given, if anything was."""
        if self._weight:
            self.trainable.apply(self._pending, 1.0 / self._weight, self._rates / self._weight)
            self.steps, self.changes = self.steps + 1, self.changes + 1
            self._values = self._published()
        self._pending, self._tenants, self._tokens, self._weight, self._rates = {}, 0, 0, 0.0, 0.0

    def go_on(
        self,
        before: Mapping[str, torch.Tensor],
        after: Mapping[str, torch.Tensor],
        number: int,
        *,
        reset: bool = False,
        last: bool = False,
    ) -> None:
        """Go on from what a round made of this adapter, once; what was stepped meanwhile stays on top.

        Args:
            before: as it was brought to the round.
            after: as the round gave it back.
            number: of the round, higher than those before.
            reset: forget the optimiser's moments.
            last: whether what is given later counts no more.
        """
        if number <= self._round:
            return
        now = {n: self.trainable.parameters[n].detach() for n in before}
        moved = {n: now[n] - tensor.to(now[n].device) for n, tensor in before.items()}
        there = {n: tensor.to(moved[n].device) for n, tensor in after.items()}
        made = {n: torch.where(moved[n] == 0, tensor, tensor + moved[n]) for n, tensor in there.items()}
        self.trainable.renew({f"{ADAPTER_SLOT}/{name}": tensor for name, tensor in made.items()}, reset=reset)
        self._round, self._closed, self.changes = number, last, self.changes + 1
        self._values = self._published()

    def adapter(self) -> Tensors:
        """Its tensors by their names in an adapter file."""
        return dict(self._values)

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """All that a resumed run needs: tensors, and plain values."""
        tensors = self.trainable.state() | {PENDING + name: tensor for name, tensor in self._pending.items()}
        return tensors, {
            "given": {str(client): steps for client, steps in self.given.items()},
            "steps": self.steps,
            "changes": self.changes,
            "pending": [self._tenants, self._tokens, self._weight, self._rates],
            "round": [self._round, self._closed],
        }

    def load(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Be as a `state()` tells."""
        self.trainable.load({key: tensor for key, tensor in tensors.items() if not key.startswith(PENDING)})
        devices = {name: parameter.device for name, parameter in self.trainable.parameters.items()}
        pending = {key.removeprefix(PENDING): tensor for key, tensor in tensors.items() if key.startswith(PENDING)}
        self._pending = {name: tensor.to(devices[name], copy=True) for name, tensor in pending.items()}
        self.given = {int(client): int(steps) for client, steps in values["given"].items()}
        self.steps, self.changes = int(values["steps"]), int(values["changes"])
        self._tenants, self._tokens, self._weight, self._rates = values["pending"]
        self._round, self._closed = values.get("round", (0, False))
        self._values = self._published()

    def nbytes(self) -> int:
        """Of its tensors: adapter, optimiser, published values and what is pending."""
        return sum(tensor.nbytes for tensor in (*self.state()[0].values(), *self._values.values()))

    def _add(self, gradients: Mapping[str, torch.Tensor], scale: float) -> None:
        for name, gradient in gradients.items():
            scaled = gradient * scale
            self._pending[name] = self._pending[name].add_(scaled) if name in self._pending else scaled

    def _is_enough(self) -> bool:
        tenants, tokens = self.buffer.tenants, self.buffer.tokens
        return (tenants is not None and self._tenants >= tenants) or (tokens is not None and self._tokens >= tokens)

    def _published(self) -> Tensors:
        return {name: parameter.detach().clone() for name, parameter in self.trainable.parameters.items()}
