"""AdamW with its state spread over ranks: ZeRO stages 1 and 2, by DeepSpeed, for what a server trains.

DeepSpeed hooks itself into the backward of whatever it steps, so it steps twins of the parameters, which share their
memory: these get the step's gradients, which are summed and clipped already, through a loss of which they are the
gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from splitllm.engines.groups import join_group, rank_of
from splitllm.engines.zero import library
from splitllm.errors import CheckpointError
from splitllm.recipe import OptimizerRecipe, ZeroRecipe

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
Slots = dict[str, torch.Tensor]
Tell = Callable[[str, float, Sequence[torch.Tensor]], AbstractContextManager[object]]
IN_STEP = threading.RLock()
"""Held from what is told until it is done, so that all ranks do it in one order."""


class SpreadAdamW:
    """What `Trainable` needs of an optimiser. What is collective rank 0 tells the others, by `tell`, and they `follow`.

    Args:
        parameters: fp32, all of which step together, on every rank with the same gradients.
        recipe: the optimiser's.
        zero: stage, and where the state lies.

    Attributes:
        state: parameter -> `step`, `exp_avg` and `exp_avg_sq`, whole, as torch's AdamW has them.
        tell: called on rank 0 with what the other ranks have to do at the same time; done inside what it returns.

    Raises:
        RecipeError: DeepSpeed is not installed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], recipe: OptimizerRecipe, zero: ZeroRecipe) -> None:
        self._parameters = list(parameters)
        self._twins = [nn.Parameter(parameter.detach()) for parameter in parameters]
        self._steps = 0
        self._client = torch.optim.AdamW(
            self._twins,
            lr=recipe.lr,
            betas=(recipe.betas[0], recipe.betas[1]),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
        )
        device = self._parameters[0].device
        self._library, ranks = library(zero, device), join_group(device)
        numbers = sum(twin.numel() for twin in self._twins)
        with rank_of(device):
            self._engine, *_ = self._library.initialize(
                model=nn.ParameterList(self._twins),
                optimizer=self._client,
                config=_configuration(zero, ranks, numbers),
            )
        for parameter, twin in zip(self._parameters, self._twins, strict=True):
            parameter.data = twin.data  # a part of DeepSpeed's buffer
        self._set_rates(0.0)
        self._step([torch.zeros_like(twin) for twin in self._twins])  # from the first step on there is a state
        self._set_rates(recipe.lr)
        self._set_steps(0)
        self._waiting: dict[nn.Parameter, Slots] = {}
        self._known: dict[nn.Parameter, Slots] = {}
        self.state = _State(self)
        self.tell: Tell = _alone

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One, whose `lr` may be set."""
        return self._client.param_groups

    def step(self) -> None:
        """Step by the gradients of all parameters; without any nothing happens."""
        gradients = [parameter.grad for parameter in self._parameters]
        if all(gradient is None for gradient in gradients):
            return
        with IN_STEP:
            self.settle()
            values = [parameter.detach() for parameter in self._parameters]
            found = [gradient for gradient in gradients if gradient is not None]
            rate = self.param_groups[0]["lr"]
            with self.tell("step", rate, [*values, *found]):
                self._step_from(rate, [*values, *found])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def slots(self, parameter: nn.Parameter) -> Slots:
        """The state of one parameter; nothing before the first step."""
        with IN_STEP:
            self.settle()
            if not self._steps:
                return {}
            if parameter not in self._known:
                with self.tell("gather", 0.0, []):
                    self._known = dict(zip(self._parameters, self._gather(0.0, []), strict=True))
            return {STEP: torch.tensor(float(self._steps)), **self._known.pop(parameter)}

    def set_slots(self, parameter: nn.Parameter, slots: Mapping[str, torch.Tensor]) -> None:
        """Set the state of one parameter, before the next step or reading that of all of them; nothing: a new one."""
        self._waiting[parameter] = dict(slots)

    def nbytes(self) -> int:
        """What this process holds: its part of the state and of the adapter, beside the adapter."""
        parts = [part for group in self._client.param_groups for part in group["params"]]
        moments = [self._client.state[part][key] for part in parts for key in MOMENTS]
        return sum(tensor.nbytes for tensor in (*parts, *moments))

    def settle(self) -> None:
        """Take over what was set.

        Raises:
            CheckpointError: it was set for some parameters alone, or not all have taken as many steps.
        """
        if not self._waiting:
            return
        steps = {int(slots[STEP]) if slots else 0 for slots in self._waiting.values()}
        if len(steps) > 1 or len(self._waiting) != len(self._parameters):
            raise CheckpointError("server.zero.stage: 1 and 2 need adapters of which all tensors took as many steps")
        moments = []
        for parameter in self._parameters:
            slots = self._waiting[parameter]
            moments += [slots[key] if slots else torch.zeros_like(parameter) for key in MOMENTS]
        self._waiting, (taken,) = {}, steps
        with self.tell("settle", taken, moments):
            self._settle(taken, moments)

    def follow(self, action: str, number: float, tensors: Sequence[torch.Tensor]) -> None:
        """Do what rank 0 does.

        Args:
            action: what it told.
            number: that goes with it.
            tensors: that go with it.
        """
        {"step": self._step_from, "settle": self._settle, "gather": self._gather}[action](number, tensors)

    def _step_from(self, rate: float, tensors: Sequence[torch.Tensor]) -> None:
        """A step at this rate: the values of all parameters, and their gradients."""
        values, gradients = tensors[: len(self._twins)], tensors[len(self._twins) :]
        for twin, value in zip(self._twins, values, strict=True):
            self._library.utils.safe_set_full_fp32_param(twin, value.to(twin.device))
        self._set_rates(rate)
        self._step([gradient.to(twin.device) for twin, gradient in zip(self._twins, gradients, strict=True)])
        self._steps, self._known = self._steps + 1, {}

    def _settle(self, steps: float, moments: Sequence[torch.Tensor]) -> None:
        """So many steps were taken, which have left these moments, parameter by parameter."""
        coming = iter(moments)
        for twin in self._twins:
            for key in MOMENTS:
                self._library.utils.safe_set_full_optimizer_state(twin, next(coming).to(twin.device), key)
        self._set_steps(int(steps))
        self._known = {}

    def _gather(self, _number: float, _tensors: Sequence[torch.Tensor]) -> list[Slots]:
        """The moments of all parameters, whole."""
        whole = self._library.utils.safe_get_full_optimizer_state
        return [{key: whole(twin, key) for key in MOMENTS} for twin in self._twins]

    def _step(self, gradients: Sequence[torch.Tensor]) -> None:
        assert len(gradients) == len(self._twins), "all parameters step together"
        products = [(twin * gradient).sum() for twin, gradient in zip(self._twins, gradients, strict=True)]
        self._engine.backward(torch.stack(products).sum())
        self._engine.step()

    def _set_rates(self, rate: float) -> None:
        for group in self._client.param_groups:
            group["lr"] = rate

    def _set_steps(self, steps: int) -> None:
        self._steps = steps
        for state in self._client.state.values():
            state[STEP].fill_(steps)


def _alone(_action: str, _number: float, _tensors: Sequence[torch.Tensor]) -> AbstractContextManager[object]:
    """There is no other rank."""
    return nullcontext()


class _State:
    """The state of all parameters, read and set by parameter."""

    def __init__(self, optimizer: SpreadAdamW) -> None:
        self._optimizer = optimizer

    def get(self, parameter: nn.Parameter, _otherwise: object = None) -> Slots:
        return self._optimizer.slots(parameter)

    def pop(self, parameter: nn.Parameter, _otherwise: object = None) -> None:
        self._optimizer.set_slots(parameter, {})

    def __setitem__(self, parameter: nn.Parameter, slots: Mapping[str, torch.Tensor]) -> None:
        self._optimizer.set_slots(parameter, slots)


def _configuration(zero: ZeroRecipe, ranks: int, numbers: int) -> dict[str, Any]:
    stage: dict[str, Any] = {"stage": zero.stage}
    stage["reduce_bucket_size"] = numbers  # taken in every backward; by default 5e8 numbers, whatever is trained
    if zero.offload_optimizer != "none":
        stage["offload_optimizer"] = {"device": zero.offload_optimizer}
    return {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own steps on the host as well, and needs no compiler
        "zero_optimization": stage,
    }
