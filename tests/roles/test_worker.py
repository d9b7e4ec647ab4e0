"""One micro-batch in one shard: graphs only where they are needed, and an honest count of what is held."""

from __future__ import annotations

import pytest
import torch

from splitllm import Shard
from splitllm.model.joined import Rows
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import adapter_parameters, add_lora, matched_modules
from splitllm.model.randomness import MicroBatchId
from splitllm.model.trainable import Trainable
from splitllm.recipe import LoraRecipe, OptimizerRecipe
from splitllm.roles.worker import Ask, Worker
from tests.families import CONFIGS, checkpoint_folder

FIRST, LENGTHS = MicroBatchId(0, 0, 0), (5, 3)


def worker_of(start: int = 2, stop: int = 4, *, lora: bool = True, checkpointing: bool = False) -> Worker:
    shard = Shard.cut(Checkpoint(checkpoint_folder("llama")), start, stop)
    if lora:
        add_lora(shard, LoraRecipe(rank=4, alpha=8), matched_modules(CONFIGS["llama"](), None), 0)
    if checkpointing:
        shard.checkpoint_activations()
    worker = Worker(shard, Trainable(adapter_parameters(shard), OptimizerRecipe()), torch.device("cpu"))
    worker.trainable.expect([FIRST])
    return worker


def hidden_TD() -> torch.Tensor:
    return torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("lora", "train", "wanted", "graph"),
    [
        (True, True, True, True),
        (True, True, False, True),
        (False, True, True, True),
        (False, True, False, False),
        (True, False, False, False),
        (True, False, True, False),
    ],
)
def test_a_graph_is_built_only_where_something_needs_it(lora: bool, train: bool, wanted: bool, graph: bool) -> None:
    worker = worker_of(lora=lora)
    run = worker.forward([Ask(Rows(FIRST, LENGTHS), hidden_TD(), train=train, input_gradient=wanted)])[0]
    assert run.output_TD.shape == (8, 32) and run.output_TD.requires_grad == graph
    below = worker.backward([run], [torch.ones_like(run.output_TD)])[0]
    assert (below is not None) == (graph and wanted)
    assert bool(worker.trainable.gradients() if graph and lora else {}) == (graph and lora)
    assert (worker.peak()["activations of a batch"] > 0) == graph


def test_the_gradient_does_not_reach_beyond_the_cut() -> None:
    worker, sent = worker_of(), hidden_TD().requires_grad_()
    run = worker.forward([Ask(Rows(FIRST, LENGTHS), sent, train=True, input_gradient=True)])[0]
    below = worker.backward([run], [torch.ones_like(run.output_TD)])[0]
    assert below is not None and below.shape == sent.shape and sent.grad is None


def test_a_row_gives_the_same_alone_and_beside_a_longer_one() -> None:
    worker, hidden = worker_of(), hidden_TD()
    both = worker.forward([Ask(Rows(FIRST, LENGTHS), hidden, train=False, input_gradient=False)])[0].output_TD
    alone = worker.forward([Ask(Rows(FIRST, (3,)), hidden[5:], train=False, input_gradient=False)])[0].output_TD
    torch.testing.assert_close(both[5:], alone, rtol=1e-12, atol=1e-12)


def test_weights_and_adapter_are_counted_to_the_byte() -> None:
    worker = worker_of()
    frozen = sum(p.nbytes for p in worker.shard.parameters() if not p.requires_grad)
    adapter = sum(p.nbytes for p in adapter_parameters(worker.shard).values())
    assert worker.peak() == {"weights": frozen, "adapter and optimiser": adapter, "activations of a batch": 0}
    zeros = {name: torch.zeros_like(p) for name, p in worker.trainable.parameters.items()}
    worker.trainable.apply(zeros, 1.0, 1.0)
    steps = 4 * len(zeros)
    assert worker.peak()["adapter and optimiser"] == 3 * adapter + steps


def test_activations_are_those_of_the_largest_micro_batch_and_fewer_when_recomputed() -> None:
    sizes = []
    for checkpointing in (False, True):
        worker = worker_of(checkpointing=checkpointing)
        for rows in (1, 2, 1):
            worker.forward(
                [Ask(Rows(FIRST, tuple([4] * rows)), hidden_TD()[: 4 * rows], train=True, input_gradient=True)]
            )[0]
            sizes.append(worker.peak()["activations of a batch"])
    one, two, still, *recomputed = sizes
    assert one < two == still < 2.2 * one
    assert max(recomputed) < two / 2


def test_what_half_a_backward_left_does_not_count_with_the_next() -> None:
    found = []
    for fails in (False, True):
        worker = worker_of()
        ask = Ask(Rows(FIRST, LENGTHS), hidden_TD(), input_gradient=True)
        lowest = next(p for name, p in worker.trainable.parameters.items() if ".2.self_attn.q" in name)
        hook = lowest.register_hook(_no_memory)
        if fails:
            run = worker.forward([ask])[0]
            with pytest.raises(RuntimeError, match="no memory"):
                worker.backward([run], [torch.ones_like(run.output_TD)])
        hook.remove()
        run = worker.forward([ask])[0]
        worker.backward([run], [torch.ones_like(run.output_TD)])
        found.append(worker.trainable.gradients())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _no_memory(_gradient: torch.Tensor) -> None:
    raise RuntimeError("no memory")
