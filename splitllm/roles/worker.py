"""What every role does with a micro-batch: forward through its shard, later backward, and count what it held.

Shape suffixes: B rows, S padded length, T real tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from splitllm.model.padding import pad, unpad
from splitllm.model.randomness import MicroBatchId
from splitllm.model.shard import Shard
from splitllm.model.trainable import Trainable

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass
class Pass:
    """One micro-batch in one shard, between its forward and its backward.

    Attributes:
        input_TD: what came over the cut, a leaf; None for the client, whose input are tokens.
        output_TD: what goes on, still attached to the graph.
    """

    micro_batch: MicroBatchId
    input_TD: torch.Tensor | None
    output_TD: torch.Tensor


class Worker:
    """A shard with its trainable part, computing micro-batches on one device.

    Attributes:
        shard: the blocks.
        trainable: its adapter and optimiser.
    """

    def __init__(
        self, shard: Shard, trainable: Trainable, device: torch.device, autocast: Autocast = nullcontext
    ) -> None:
        self.shard, self.trainable, self.device, self.autocast = shard, trainable, device, autocast
        self._activations, self._largest = 0, 0

    def forward(
        self,
        micro_batch: MicroBatchId,
        inputs: torch.Tensor,
        lengths: Sequence[int],
        position_ids_BS: torch.Tensor | None,
        *,
        train: bool,
        input_gradient: bool,
    ) -> Pass:
        """Run the shard.

        Args:
            micro_batch: keys the dropout masks.
            inputs: token ids [B, S] for a shard that embeds, else activations [T, D].
            lengths: of the B rows.
            position_ids_BS: of packed rows.
            train: dropout on and, if anything needs it, a graph for the backward.
            input_gradient: whether the sender wants the gradient of `inputs`.
        """
        self._mode(train)
        self.shard.key.micro_batch = micro_batch
        embeds = self.shard.embeddings is not None
        graph = train and (input_gradient or bool(self.trainable.parameters))
        input_TD = None if embeds else inputs.to(self.device).detach().requires_grad_(input_gradient and graph)
        positions = None if position_ids_BS is None else position_ids_BS.to(self.device)
        with torch.set_grad_enabled(graph), self.autocast(), self._counting(graph, len(lengths) * max(lengths)):
            hidden_BSD = self.shard.embed(inputs.to(self.device)) if input_TD is None else pad(input_TD, lengths)
            output_TD = unpad(self.shard.blocks(hidden_BSD, positions), lengths)
        return Pass(micro_batch, input_TD, output_TD)

    def backward(self, run: Pass, gradient: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor | None:
        """Run the shard's backward and put the adapter's gradients in their place in the sum.

        Args:
            run: the forward it belongs to.
            gradient: of `output`.
            output: what the gradient is of, by default `run.output_TD`.

        Returns:
            The gradient of the input [T, D], or None where nobody asked for it.
        """
        target = run.output_TD if output is None else output
        if not target.requires_grad:
            return None
        self.shard.key.micro_batch = run.micro_batch
        torch.autograd.backward(target, gradient.to(self.device))
        self.trainable.collect(run.micro_batch)
        return None if run.input_TD is None else run.input_TD.grad

    def peak(self) -> dict[str, int]:
        """Bytes of tensors this role held at most: weights, adapter with optimiser, activations for the backward."""
        frozen = {p.untyped_storage().data_ptr(): p.nbytes for p in self.shard.parameters() if not p.requires_grad}
        state = sum(tensor.nbytes for tensor in self.trainable.state().values())
        return {
            "weights": sum(frozen.values()),
            "adapter and optimiser": state,
            "activations of a micro-batch": self._activations,
        }

    def _mode(self, train: bool) -> None:
        if self.shard.training != train:
            self.shard.train(train)

    def _counting(self, graph: bool, positions: int) -> AbstractContextManager[object]:
        """Count what the graph of the largest micro-batch so far keeps for the backward."""
        if not graph or positions <= self._largest:
            return nullcontext()
        self._largest, self._activations = positions, 0
        weights = {p.untyped_storage().data_ptr() for p in self.shard.parameters()}
        seen: set[int] = set()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self._activations += storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
