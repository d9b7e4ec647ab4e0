"""Any other rank: computes what rank 0 orders, and keeps nothing between two runs of the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from splitllm.model.joined import Joined
from splitllm.ranks import adapters
from splitllm.ranks.peers import Peers
from splitllm.ranks.pieces import ask_of, go_backward
from splitllm.roles.worker import Ask, Worker

LEADER = 0


@dataclass(frozen=True)
class Held:
    """A forward whose backward may come.

    Attributes:
        asks: with inputs that are leaves.
        outputs: attached to the graph.
        extra: how many of the first are a companion, whose outcome nobody reads.
    """

    asks: Sequence[Ask]
    outputs: Sequence[torch.Tensor]
    extra: int


class Follower:
    """Computes shares.

    Args:
        worker: like that of rank 0.
        peers: all ranks.
    """

    def __init__(self, worker: Worker, peers: Peers) -> None:
        self._worker, self._peers = worker, peers
        for trainable in worker.lent.values():  # copies of one tensor, which each gets its own values here
            for parameter in trainable.parameters.values():
                parameter.data = parameter.data.clone()
        self._adapters = adapters.by_key(worker)
        self._optimizers = adapters.spread(worker)
        self._held: dict[int, Held] = {}
        self._orders = {"forward": self._forward, "backward": self._backward}

    def follow(self) -> None:
        """Until rank 0 says that it is the end.

        Raises:
            RankError: rank 0 is gone.
        """
        while True:
            values, tensors = self._peers.receive(LEADER)
            if values["order"] == "end":
                return
            if values["order"] == "optimize":
                self._optimizers[values["key"]].follow(values["action"], values["number"], tensors)
                continue
            try:
                answer = self._orders[values["order"]](values, tensors)
            except (RuntimeError, ValueError) as error:
                self._peers.send(LEADER, {"error": " ".join(f"{type(error).__name__}: {error}".split())})
            else:
                self._peers.send(LEADER, {"error": None}, answer)

    def _forward(self, values: Mapping[str, Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        coming = iter(tensors)
        for number in values["forget"]:
            self._held.pop(number, None)
        for key in values["adapters"]:
            adapters.put_values(self._adapters[key], next(coming))
        asks = [ask_of(each, coming) for each in values["asks"]]
        device, graph, extra = self._worker.device, values["graph"], int(values["companion"])
        leaves = [ask.inputs.to(device).requires_grad_(graph) for ask in asks]
        outputs = self._worker.through(asks, leaves, graph=graph)
        if graph:
            held = [replace(ask, inputs=leaf) for ask, leaf in zip(asks, leaves, strict=True)]
            self._held[values["run"]] = Held(held, outputs, extra)
        return outputs[extra:]

    def _backward(self, values: Mapping[str, Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        held = self._held.pop(values["run"])
        nothing = [torch.zeros_like(output) for output in held.outputs[: held.extra]]
        gradients = [*nothing, *(tensor.to(self._worker.device) for tensor in tensors)]
        self._worker.shard.key.begin(Joined(tuple(ask.rows for ask in held.asks)))
        go_backward(held.outputs, gradients)
        own = held.asks[held.extra :]
        inputs = [ask.inputs.grad for ask in own if ask.input_gradient]
        clients = {ask.rows.micro_batch.client for ask in own}
        found = [adapters.gradients(self._adapters[key]) for key in adapters.used(self._adapters, clients)]
        for parameters in self._adapters.values():
            for parameter in parameters:
                parameter.grad = None
        return [*(each for each in inputs if each is not None), *found]
