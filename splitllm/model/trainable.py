"""What a role trains: its adapter, the gradients of the step in a fixed order of summation, and the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from splitllm.model.randomness import MicroBatchId
from splitllm.recipe import OptimizerRecipe

Tensors = dict[str, torch.Tensor]
Build = Callable[[list[nn.Parameter], OptimizerRecipe], Any]
"""Makes an optimiser: one of torch's, or what has its `param_groups`, `state`, `step`, `zero_grad`, and `nbytes`."""
ADAPTER_SLOT, ANCHOR_SLOT = "adapter", "anchor"
NORM_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class OrderedSum:
    """Adds the gradients of micro-batches in the order of their ids, whatever the order they arrive in."""

    def __init__(self, ids: Sequence[MicroBatchId]) -> None:
        self._missing = sorted(ids, reverse=True)
        self._early: dict[MicroBatchId, Tensors] = {}
        self._total: Tensors | None = None

    def add(self, micro_batches: Sequence[MicroBatchId], gradients: Tensors) -> None:
        """Take the gradients of micro-batches that ran together: they count where the lowest of them does."""
        assert all(each in self._missing for each in micro_batches), micro_batches
        first = min(micro_batches)
        self._missing = [each for each in self._missing if each == first or each not in micro_batches]
        assert first not in self._early, first
        self._early[first] = gradients
        while self._missing and self._missing[-1] in self._early:
            self._fold(self._early.pop(self._missing.pop()))

    def total(self) -> Tensors:
        """The sum over all micro-batches of the step; of none nothing."""
        assert not self._missing, "a micro-batch of this step has no gradient yet"
        return self._total or {}

    def _fold(self, gradients: Tensors) -> None:
        if self._total is None:
            self._total = gradients
            return
        for name, gradient in gradients.items():
            self._total[name].add_(gradient)


class Trainable:
    """A role's adapter parameters with their optimiser.

    Args:
        parameters: name in the adapter file -> parameter.
        optimizer: the recipe's.
        prox: how hard a step is pulled back to where the parameters were after the last round (FedProx, mu).
        anchored: whether it remembers where they were, even without that.
        build: makes the optimiser; by default torch's of the recipe's name.

    Attributes:
        parameters: name in the adapter file -> parameter.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: OptimizerRecipe,
        prox: float = 0.0,
        *,
        anchored: bool = False,
        build: Build | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.base_rate = optimizer.lr
        self._prox, self._anchored, self._anchor = prox, anchored or prox > 0, dict[str, torch.Tensor]()
        for name in self.parameters:
            self._anchor_here(name)
        self._sum: OrderedSum | None = None
        build = _OPTIMIZERS[optimizer.name] if build is None else build
        self._optimizer = build(list(self.parameters.values()), optimizer) if parameters else None

    @property
    def optimizer(self) -> object:
        """What steps it; None: nothing trains."""
        return self._optimizer

    def expect(self, ids: Sequence[MicroBatchId]) -> None:
        """Open a step: these micro-batches will come."""
        self._sum = OrderedSum(ids)

    def train_only(self, side: str | None) -> None:
        """Train A or B alone; None: both."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(side is None or f".lora_{side}." in name)

    def collect(self, micro_batches: Sequence[MicroBatchId]) -> None:
        """Take what the backward of micro-batches that ran together left on the parameters."""
        if not self.parameters:
            return
        assert self._sum is not None
        gradients = {}
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
        self._sum.add(micro_batches, gradients)

    def forget(self) -> None:
        """Drop what a backward left on the parameters."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def end(self) -> None:
        """The step is over."""
        self._sum = None

    def gradients(self) -> Tensors:
        """The step's summed gradients of this role."""
        return self._sum.total() if self._sum is not None and self.parameters else {}

    def apply(self, gradients: Mapping[str, torch.Tensor], factor: float, rate: float) -> None:
        """One optimiser step.

        Args:
            gradients: by name, as the adapter is stepped by; what is not there stays as it is.
            factor: clipping, multiplies every gradient.
            rate: multiplies the recipe's learning rate (the schedule).
        """
        self.end()
        if self._optimizer is None:
            return
        for name, gradient in gradients.items():
            parameter = self.parameters[name]
            parameter.grad = gradient if factor == 1.0 else gradient * factor
            if self._prox:
                parameter.grad = parameter.grad.add(parameter.detach() - self._anchor[name], alpha=self._prox)
        for group in self._optimizer.param_groups:
            group["lr"] = self.base_rate * rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def move(self, device: torch.device) -> None:
        """Take parameters and optimiser to another device; what a step under way has summed up is forgotten."""
        self._sum = None
        self.forget()
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(device)
            slots = self._optimizer.state.get(parameter, {}) if self._optimizer is not None else {}
            for key, value in slots.items():
                slots[key] = value if key == "step" else value.to(device)

    def state(self) -> Tensors:
        """All that a resumed run needs: `adapter/NAME` and the optimiser's `KEY/NAME`, detached."""
        tensors = {f"{ADAPTER_SLOT}/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors.update({f"{ANCHOR_SLOT}/{name}": tensor for name, tensor in self._anchor.items()})
        if self._optimizer is not None:
            for name, parameter in self.parameters.items():
                slots = self._optimizer.state.get(parameter, {})
                tensors.update({f"{key}/{name}": torch.as_tensor(value) for key, value in slots.items()})
        return tensors

    def nbytes(self) -> int:
        """What this process holds of it, but for gradients."""
        held = sum(tensor.nbytes for tensor in (*self.parameters.values(), *self._anchor.values()))
        if isinstance(self._optimizer, torch.optim.Optimizer):
            slots = [each for p in self.parameters.values() for each in self._optimizer.state.get(p, {}).values()]
            return held + sum(torch.as_tensor(each).nbytes for each in slots)
        return held if self._optimizer is None else held + self._optimizer.nbytes()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set parameters and optimiser from `state()`, of this role or of another with the same tensors.

        What a step under way has summed up is forgotten.
        """
        self._sum, by_name = None, _by_name(tensors)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"{ADAPTER_SLOT}/{name}"])
            parameter.grad = None
            slots = {slot: tensor.clone() for slot, tensor in by_name[name].items()}
            if self._anchored:
                self._anchor[name] = slots[ANCHOR_SLOT].to(parameter.device)
            self._set_moments(name, {k: v for k, v in slots.items() if k not in (ADAPTER_SLOT, ANCHOR_SLOT)})

    def renew(self, tensors: Mapping[str, torch.Tensor], *, reset: bool) -> None:
        """Go on from the outcome of a round.

        Args:
            tensors: `adapter/NAME` and perhaps the optimiser's `KEY/NAME`, of some parameters or all.
            reset: forget the optimiser's moments.
        """
        by_name = _by_name(tensors)
        for name, parameter in self.parameters.items():
            moments = dict(by_name.get(name, {}))
            if (value := moments.pop(ADAPTER_SLOT, None)) is not None:
                parameter.data.copy_(value)
            if reset or moments:
                self._set_moments(name, {k: v.clone() for k, v in moments.items()})
            if value is not None or parameter.requires_grad:  # else it was not its turn to be averaged
                self._anchor_here(name)

    def _set_moments(self, name: str, slots: Mapping[str, torch.Tensor]) -> None:
        if self._optimizer is None:
            return
        parameter = self.parameters[name]
        self._optimizer.state.pop(parameter, None)
        if slots:
            self._optimizer.state[parameter] = {
                k: v if k == "step" else v.to(parameter.device) for k, v in slots.items()
            }

    def anchor(self) -> Tensors:
        """Where the parameters were after the last round, of one that remembers it."""
        return dict(self._anchor)

    def _anchor_here(self, name: str) -> None:
        if self._anchored:
            self._anchor[name] = self.parameters[name].detach().clone()


def _by_name(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensors]:
    """What is called `SLOT/NAME`: name -> slot -> tensor."""
    found: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        slot, _, name = key.partition("/")
        found.setdefault(name, {})[slot] = tensor
    return found


def squared_norms(gradients: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Squared L2 norm of every tensor, taken in fp64."""
    if not gradients:
        return {}
    values = torch.stack([gradient.double().square().sum() for gradient in gradients.values()]).tolist()
    return dict(zip(gradients, values, strict=True))


def clip_factor(norm: float, limit: float | None) -> float:
    """What gradients of this total norm are multiplied by, as in torch.nn.utils.clip_grad_norm_."""
    return 1.0 if limit is None else min(1.0, limit / (norm + NORM_EPSILON))


def _adamw(parameters: list[nn.Parameter], recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=recipe.lr,
        betas=(recipe.betas[0], recipe.betas[1]),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )


def _sgd(parameters: list[nn.Parameter], recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)


_OPTIMIZERS = {"adamw": _adamw, "sgd": _sgd}
