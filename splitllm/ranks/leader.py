"""Rank 0: has the clients, the adapters and their optimisers, and shares every batch out.

All ranks compute the same batches in the same order, each its rows, and go backward through the same blocks, whoever
wants gradients of what: where weights are sharded, they are gathered from all. Before a forward the others get the
adapters that have changed; after a backward their gradients are added, in the order of the ranks.

Shape suffixes: T real tokens of a micro-batch or a part, D hidden width.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from splitllm.model.joined import Joined
from splitllm.ranks import adapters
from splitllm.ranks.peers import Peers
from splitllm.ranks.pieces import companion, described, go_backward, piece, put_together, tensors_of, tokens
from splitllm.ranks.shares import Part, share_out
from splitllm.roles.worker import Ask, Worker

T = TypeVar("T")


def begin(peers: Peers, shard: tuple[int, int] | None) -> None:
    """Let the other ranks load.

    Args:
        peers: all ranks.
        shard: first block that this server holds, and one past the last; None: those of the recipe.

    Raises:
        RankError: a rank is gone.
    """
    for rank in range(1, peers.size):
        peers.send(rank, {"order": "begin", "shard": shard})


def end(peers: Peers) -> None:
    """Let the other ranks go.

    Raises:
        RankError: one is gone already.
    """
    for rank in range(1, peers.size):
        peers.send(rank, {"order": "end"})


@dataclass(eq=False)
class Run:
    """A forward that all ranks share, until its backward.

    Attributes:
        number: by which the others know it.
        asks: of the whole batch.
        shares: the parts of every rank.
        own: this rank's asks, with inputs that are leaves.
        outputs: of those, attached to their graph.
    """

    number: int
    asks: Sequence[Ask]
    shares: list[list[Part]]
    own: list[Ask]
    outputs: list[torch.Tensor]


class Leader:
    """Shares the batches of a worker with the other ranks; what `roles.worker.Ranks` says.

    Args:
        worker: of this rank.
        peers: all ranks.
        whole: micro-batches that train are not cut, since dropout is drawn for all rows of one.
        in_step: whether weights are spread over the ranks, so that one that fails has lost the others' step.
    """

    def __init__(self, worker: Worker, peers: Peers, *, whole: bool, in_step: bool = False) -> None:
        self._worker, self._peers, self._whole, self._in_step = worker, peers, whole, in_step
        self._others = range(1, peers.size)
        self._adapters = adapters.by_key(worker)
        self._sent: dict[str, torch.Tensor] = {}
        self._numbers, self._forgotten = itertools.count(), list[int]()
        self._anchor = torch.zeros((), requires_grad=True)
        for key, optimizer in adapters.spread(worker).items():
            optimizer.tell = partial(self._tell, key)

    def forward(self, asks: Sequence[Ask], leaves: Sequence[torch.Tensor], *, graph: bool) -> list[torch.Tensor]:
        """Run a batch on all ranks.

        Args:
            asks: by entry, lowest first.
            leaves: their inputs [T, D].
            graph: whether a backward will follow; then the outputs lead back to the leaves.

        Raises:
            RankError: a rank is gone, or could not compute what all compute in step.
            RuntimeError: a rank could not compute its share.
        """
        whole_ones = self._whole and asks[0].train
        shares = share_out([ask.rows.lengths for ask in asks], self._peers.size, whole=whole_ones)
        number = next(self._numbers)
        self._order_forward(number, asks, shares, graph=graph)
        own = [piece(asks[part.ask], part, leaves[part.ask].detach()) for part in shares[0]]
        inputs = [each.inputs.requires_grad_(graph) for each in own]
        try:
            outputs, heard = self._together(lambda: self._worker.through(own, inputs, graph=graph))
        except BaseException:
            self._forgotten.append(number)  # whoever has computed its share holds a graph
            raise
        here = [output.detach() for output in outputs]
        whole = put_together(asks, self._by_part(shares, [here, *heard]))
        if not graph:
            return whole
        run = Run(number, asks, shares, own, outputs)
        weakref.finalize(run, self._forgotten.append, number)
        return list(_Shared.apply(self, run, whole, self._anchor, *leaves))  # type: ignore[no-untyped-call]

    def backward(self, run: Run, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Go backward on all ranks; the gradient [T, D] of each input that wants one.

        Raises:
            RankError: a rank is gone, or could not compute what all compute in step.
            RuntimeError: a rank could not compute its share.
        """
        parts = [[gradients[p.ask][tokens(run.asks[p.ask], p)] for p in share] for share in run.shares]
        for rank in self._others:
            self._peers.send(rank, {"order": "backward", "run": run.number}, parts[rank])
        self._worker.shard.key.begin(Joined(tuple(each.rows for each in run.own)))
        _, answers = self._together(lambda: go_backward(run.outputs, parts[0]))
        heard = list(map(iter, answers))
        found = [[each.inputs.grad for each in run.own if each.input_gradient]]
        wanted = [[part for part in share if run.asks[part.ask].input_gradient] for share in run.shares]
        found += [list(itertools.islice(told, len(parts))) for told, parts in zip(heard, wanted[1:], strict=True)]
        for told, share in zip(heard, run.shares[1:], strict=True):
            self._add_gradients(told, {run.asks[part.ask].rows.micro_batch.client for part in share})
        return self._inputs(run, wanted, found)

    @contextmanager
    def _tell(self, key: str, action: str, number: float, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """What the other ranks do with their part of an optimiser's state, while this one does; they do not answer."""
        for rank in self._others:
            self._peers.send(rank, {"order": "optimize", "key": key, "action": action, "number": number}, tensors)
        try:
            yield
        except RuntimeError as error:
            raise self._peers.failed(error) from error

    def _order_forward(self, number: int, asks: Sequence[Ask], shares: list[list[Part]], *, graph: bool) -> None:
        changed = self._changed({ask.rows.micro_batch.client for ask in asks})
        values: dict[str, Any] = {"order": "forward", "run": number, "graph": graph, "adapters": list(changed)}
        values["forget"] = [self._forgotten.pop() for _ in range(len(self._forgotten))]
        for rank in self._others:
            own = [piece(asks[part.ask], part, asks[part.ask].inputs) for part in shares[rank]]
            beside = not own or own[0].rows.entry > asks[0].rows.entry
            sent = [companion(asks), *own] if beside else own
            tensors = [*changed.values(), *(tensor for ask in sent for tensor in tensors_of(ask))]
            self._peers.send(rank, {**values, "asks": [described(ask) for ask in sent], "companion": beside}, tensors)

    def _changed(self, clients: set[int]) -> dict[str, torch.Tensor]:
        """Adapters of these clients that the other ranks do not have as they are now."""
        now = {key: adapters.values(self._adapters[key]) for key in adapters.used(self._adapters, clients)}
        changed = {k: row for k, row in now.items() if k not in self._sent or not torch.equal(row, self._sent[k])}
        self._sent |= changed
        return changed

    def _together(self, share: Callable[[], T]) -> tuple[T, list[list[torch.Tensor]]]:
        """What this rank computes, and what each of the others does.

        All are heard before anything is raised: else the next order would be answered by what is left of this one.
        """
        try:
            mine = share()
        except BaseException as error:
            if self._in_step:  # the others wait for this rank, and end when it does
                raise self._peers.failed(error) from error
            self._hear()
            raise
        heard = self._hear()
        for rank, (problem, _) in zip(self._others, heard, strict=True):
            if problem is not None:
                raise RuntimeError(f"rank {rank}: {problem}")
        return mine, [tensors for _, tensors in heard]

    def _hear(self) -> list[tuple[str | None, list[torch.Tensor]]]:
        """Of each of the others what went wrong, if anything did, and what it has computed."""
        answers = [self._peers.receive(rank) for rank in self._others]
        return [(values["error"], tensors) for values, tensors in answers]

    def _add_gradients(self, told: Iterator[torch.Tensor], clients: set[int]) -> None:
        for key in adapters.used(self._adapters, clients):
            adapters.add_gradients(self._adapters[key], next(told))

    def _by_part(
        self, shares: list[list[Part]], tensors: Sequence[Sequence[torch.Tensor]]
    ) -> Iterator[tuple[Part, torch.Tensor]]:
        for share, found in zip(shares, tensors, strict=True):
            for part, tensor in zip(share, found, strict=True):
                yield part, tensor.to(self._worker.device)

    def _inputs(self, run: Run, wanted: list[list[Part]], found: Sequence[Sequence[Any]]) -> list[torch.Tensor | None]:
        whole = iter(put_together(run.asks, self._by_part(wanted, found)))
        return [next(whole) if ask.input_gradient else None for ask in run.asks]


class _Shared(torch.autograd.Function):
    """A node of the graph whose backward runs on all ranks."""

    @staticmethod
    def forward(
        ctx: Any, leader: Leader, run: Run, outputs: list[torch.Tensor], _anchor: torch.Tensor, *_leaves: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.leader, ctx.run = leader, run
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        run, ctx.run = ctx.run, None
        return (None, None, None, None, *ctx.leader.backward(run, gradients))
