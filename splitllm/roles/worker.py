"""What every role does with micro-batches: forward through its shard, later backward, and count what it held.

Several micro-batches may run together, each entering at its own cut layer; one alone is the same code.

Shape suffixes: B rows, S padded length, T real tokens of one micro-batch, D hidden width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from splitllm.engines.places import is_spread, places_of
from splitllm.model.common import Common
from splitllm.model.frozen import FROZEN, Frozen
from splitllm.model.joined import Joined, Rows
from splitllm.model.padding import beside, pad, unpad
from splitllm.model.randomness import MicroBatchId
from splitllm.model.shard import Shard
from splitllm.model.trainable import Tensors, Trainable

TENANT = "tenant/"
"""Before the number of a client and the names of what is its own."""
ROUNDS = "rounds/"
"""Before the names of what a role keeps of rounds."""
Autocast = Callable[[], AbstractContextManager[object]]


class Stateful(Protocol):
    """What is kept and restored as tensors."""

    def state(self) -> Tensors:
        """All of it."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as a `state()` tells."""
        ...


@dataclass(frozen=True)
class Ask:
    """One micro-batch that is to run through a shard.

    Attributes:
        rows: whose, how long, and where they enter.
        inputs: token ids [B, S] for a shard that embeds, else activations [T, D].
        position_ids_BS: of packed rows.
        train: dropout on and, if anything needs it, a graph for the backward.
        input_gradient: whether the sender wants the gradient of `inputs`.
    """

    rows: Rows
    inputs: torch.Tensor
    position_ids_BS: torch.Tensor | None = None
    train: bool = True
    input_gradient: bool = False


@dataclass
class Pass:
    """One micro-batch in one shard, between its forward and its backward.

    Attributes:
        micro_batch: which.
        input_TD: what came over the cut, a leaf; None for the client, whose input are tokens.
        output_TD: what goes on, still attached to the graph.
        joined: those that it ran with; they share one graph.
    """

    micro_batch: MicroBatchId
    input_TD: torch.Tensor | None
    output_TD: torch.Tensor
    joined: Joined


class Ranks(Protocol):
    """The other processes of a server that takes several: each computes a share of every batch."""

    def forward(self, asks: Sequence[Ask], leaves: Sequence[torch.Tensor], *, graph: bool) -> list[torch.Tensor]:
        """What `Worker.through` computes, shared out; while `graph`, the outputs lead back to the leaves."""
        ...


@dataclass
class Worker:
    """A shard with its trainable parts, computing on one device.

    Attributes:
        shard: the blocks.
        trainable: the adapter and optimiser that all micro-batches share.
        device: where it computes.
        autocast: the run's mixed precision.
        own: client -> adapter and optimiser that only its micro-batches use.
        lent: client -> its copy of `common`; of the worker of a lane that copy is `trainable`.
        common: what clients train together at their own pace; None where they step together.
        frozen: what rounds have added to the frozen weights; None where they add nothing.
        kept: what of rounds is kept with this role's state; None where it averages nothing.
        ranks: with whom it shares its batches; None: with nobody.
    """

    shard: Shard
    trainable: Trainable
    device: torch.device
    autocast: Autocast = nullcontext
    own: Mapping[int, Trainable] = field(default_factory=dict)
    lent: Mapping[int, Trainable] = field(default_factory=dict)
    common: Common | None = None
    frozen: Frozen | None = None
    kept: Stateful | None = None
    ranks: Ranks | None = None
    _activations: int = 0
    _largest: int = 0

    def lane(self, client: int) -> Worker:
        """As the lane of one client sees it: with its own adapter, and its copy of what is common, alone."""
        return replace(self, trainable=self.lent.get(client, self.trainable), own={client: self.own[client]}, lent={})

    def forward(self, asks: Sequence[Ask]) -> list[Pass]:
        """Run the shard on micro-batches that are all for training, or all not, in one batch.

        Args:
            asks: by entry, lowest first.
        """
        joined, train = Joined(tuple(ask.rows for ask in asks)), asks[0].train
        assert all(ask.train == train for ask in asks)
        graph = train and any(ask.input_gradient or self._trains(ask.rows.micro_batch.client) for ask in asks)
        if self.shard.embeddings is not None:
            (ask,) = asks
            with self._computing(joined, train=train, graph=graph):
                return [self._embedded(ask, joined)]
        leaves = [ask.inputs.to(self.device).detach().requires_grad_(ask.input_gradient and graph) for ask in asks]
        compute = self.through if self.ranks is None else self.ranks.forward
        outputs = compute(asks, leaves, graph=graph)
        micro_batches = [member.micro_batch for member in joined.members]
        return [Pass(*each, joined) for each in zip(micro_batches, leaves, outputs, strict=True)]

    def through(self, asks: Sequence[Ask], leaves: Sequence[torch.Tensor], *, graph: bool) -> list[torch.Tensor]:
        """Run the blocks here.

        Args:
            asks: by entry, lowest first.
            leaves: their inputs [T, D], where this role computes.
            graph: whether a backward will follow.

        Returns:
            The output [T, D] of each.
        """
        joined = Joined(tuple(ask.rows for ask in asks))
        with self._computing(joined, train=asks[0].train, graph=graph):
            return self._joined(asks, leaves, joined)

    def backward(
        self,
        runs: Sequence[Pass],
        gradients: Sequence[torch.Tensor],
        *,
        outputs: Sequence[torch.Tensor] | None = None,
    ) -> list[torch.Tensor | None]:
        """Run the shard's backward and put the adapters' gradients in their places in the sums.

        Args:
            runs: forwards that ran together, all of them or some.
            gradients: of `outputs`.
            outputs: what the gradients are of, by default each run's `output_TD`.

        Returns:
            The gradient of each input [T, D], or None where nobody asked for it.
        """
        targets = [run.output_TD for run in runs] if outputs is None else list(outputs)
        if not targets[0].requires_grad:
            return [None] * len(runs)
        self.shard.key.begin(runs[0].joined)
        try:
            torch.autograd.backward(targets, [gradient.to(self.device) for gradient in gradients])
        except BaseException:
            self._forget(runs)  # what half a backward has left would count with the next
            raise
        self._collect(runs[0].joined, [run.micro_batch for run in runs])
        return [None if run.input_TD is None else run.input_TD.grad for run in runs]

    def release(self, runs: Sequence[Pass]) -> None:
        """Free the graph of forwards that ran together and get no gradient, as a backward does."""
        targets = [run.output_TD for run in runs if run.output_TD.requires_grad]
        if targets:
            self.shard.key.begin(runs[0].joined)
            torch.autograd.backward(targets, [torch.zeros_like(target) for target in targets])
        self._forget(runs)

    def expect(self, micro_batches: Sequence[MicroBatchId]) -> None:
        """Open a step: these micro-batches will come."""
        if self.common is not None:
            self.common.lend(self.trainable)
        self.trainable.expect(micro_batches)
        for client, trainable in self.own.items():
            trainable.expect([each for each in micro_batches if each.client == client])

    def state(self) -> Tensors:
        """Adapters and optimisers: what `Trainable.state` tells, of a client's own behind `tenant/CLIENT/`.

        What is common has a state of its own.
        """
        tensors = self.trainable.state() if self.common is None else {}
        if self.frozen is not None:
            tensors |= self.frozen.state()
        if self.kept is not None:
            tensors |= {ROUNDS + key: tensor for key, tensor in self.kept.state().items()}
        for client, trainable in self.own.items():
            tensors.update({f"{TENANT}{client}/{key}": tensor for key, tensor in trainable.state().items()})
        return tensors

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set adapters and optimisers from a `state()`; of others that it holds nothing is taken."""
        if self.frozen is not None:
            self.frozen.load(tensors)
        if self.kept is not None:
            self.kept.load({key.removeprefix(ROUNDS): t for key, t in tensors.items() if key.startswith(ROUNDS)})
        if self.common is None:
            apart = (TENANT, ROUNDS, FROZEN)
            self.trainable.load({key: tensor for key, tensor in tensors.items() if not key.startswith(apart)})
        else:
            self.common.lend(self.trainable)
        for client, trainable in self.own.items():
            prefix = f"{TENANT}{client}/"
            trainable.load({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})

    def peak(self) -> dict[str, int]:
        """Bytes of tensors this role held at most: weights, adapters with optimisers, activations for the backward."""
        weights = places_of(p for p in self.shard.parameters() if not p.requires_grad)
        state = sum(each.nbytes() for each in (self.trainable, *self.own.values()))
        return {
            "weights": weights.device + weights.host,
            **({"weights in files": weights.files} if weights.files else {}),
            "adapter and optimiser": state + (0 if self.common is None else self.common.nbytes()),
            "activations of a batch": self._activations,
        }

    @contextmanager
    def _computing(self, joined: Joined, *, train: bool, graph: bool) -> Iterator[None]:
        """A forward: mode, dropout, precision, and whether a graph is built."""
        self._mode(train)
        self.shard.key.begin(joined)
        positions = sum(len(member.lengths) * max(member.lengths) for member in joined.members)
        with torch.set_grad_enabled(graph), self.autocast(), self._counting(graph, positions):
            yield

    def _trains(self, client: int) -> bool:
        return any(each.parameters for each in (self.trainable, *self._of(client)))

    def _of(self, client: int) -> list[Trainable]:
        """What trains on the micro-batches of this client alone."""
        return [held[client] for held in (self.own, self.lent) if client in held]

    def _embedded(self, ask: Ask, joined: Joined) -> Pass:
        """The bottom of the model, whose input are tokens."""
        positions = None if ask.position_ids_BS is None else ask.position_ids_BS.to(self.device)
        hidden_BSD = self.shard.blocks(self.shard.embed(ask.inputs.to(self.device)), positions)
        return Pass(ask.rows.micro_batch, None, unpad(hidden_BSD, ask.rows.lengths), joined)

    def _joined(self, asks: Sequence[Ask], leaves: Sequence[torch.Tensor], joined: Joined) -> list[torch.Tensor]:
        """Every micro-batch joins the batch at its cut layer; all leave it at the end of the shard."""
        packed = any(ask.position_ids_BS is not None for ask in asks)
        coming, hidden_BSD, positions_BS = iter(zip(asks, leaves, strict=True)), None, None
        for start, stop, newcomers in joined.stretches(self.shard.start, self.shard.stop):
            for ask, leaf_TD in itertools.islice(coming, len(newcomers)):
                hidden_BSD = beside(hidden_BSD, pad(leaf_TD, ask.rows.lengths))
                positions_BS = beside(positions_BS, _positions(ask).to(self.device)) if packed else None
            assert hidden_BSD is not None
            hidden_BSD = self.shard.blocks(hidden_BSD, positions_BS, start, stop)
        assert hidden_BSD is not None
        parts = torch.split(hidden_BSD, [len(member.lengths) for member in joined.members])
        lengths = [member.lengths for member in joined.members]
        return [unpad(part[:, : max(own)], own) for part, own in zip(parts, lengths, strict=True)]

    def _collect(self, joined: Joined, micro_batches: Sequence[MicroBatchId]) -> None:
        """Of a member that gets no gradient here what the graph says is 0, and is forgotten."""
        self.trainable.collect(micro_batches)
        for client in {member.micro_batch.client for member in joined.members}:
            of_client = [each for each in micro_batches if each.client == client]
            for trainable in self._of(client):
                if of_client:
                    trainable.collect(of_client)
                else:
                    trainable.forget()

    def _forget(self, runs: Sequence[Pass]) -> None:
        clients = {member.micro_batch.client for run in runs for member in run.joined.members}
        for trainable in (self.trainable, *(each for client in clients for each in self._of(client))):
            trainable.forget()

    def _mode(self, train: bool) -> None:
        if self.shard.training != train:
            self.shard.train(train)

    def _counting(self, graph: bool, positions: int) -> AbstractContextManager[object]:
        """Count what the graph of the largest batch so far keeps for the backward."""
        if not graph or positions <= self._largest:
            return nullcontext()
        self._largest, self._activations = positions, 0
        adapters = [*self.own.values(), *self.lent.values()]
        held = [*self.shard.parameters(), *(p for each in adapters for p in each.parameters.values())]
        own = [parameter for parameter in held if not is_spread(parameter)]
        seen = {parameter.untyped_storage().data_ptr() for parameter in own}  # some views name no base

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage, weight = tensor.untyped_storage(), tensor if tensor._base is None else tensor._base
            if not isinstance(weight, nn.Parameter) and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self._activations += storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)


def _positions(ask: Ask) -> torch.Tensor:
    """Its position ids, also where no row of it is packed, since other micro-batches of the batch have some."""
    rows = ask.rows.lengths
    return torch.arange(max(rows)).expand(len(rows), -1) if ask.position_ids_BS is None else ask.position_ids_BS
