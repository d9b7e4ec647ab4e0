"""A rank that cannot compute its share: nothing of that batch is in the next, and nobody waits for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitllm.errors import RankError
from splitllm.roles.worker import Worker
from tests.ranks.together import ONE, forward, together
from tests.roles.test_worker import worker_of

pytestmark = pytest.mark.system


def fails_once(worker: Worker) -> None:
    """As where there is no memory for its first batch."""
    through = worker.through

    def once(*args: Any, **kwargs: Any) -> Any:
        worker.through = through  # type: ignore[method-assign]
        raise RuntimeError("no memory")

    worker.through = once  # type: ignore[method-assign]


def fails_in_a_backward(worker: Worker) -> None:
    """In its first, half of which is done by then."""
    lowest = next(parameter for name, parameter in worker.trainable.parameters.items() if ".2.self_attn.q" in name)

    def once(_gradient: torch.Tensor) -> None:
        hook.remove()
        raise RuntimeError("no memory")

    hook = lowest.register_hook(once)


def two_batches(worker: Worker) -> list[Any]:
    """What is said of the first, which fails, and how far the second is off."""
    said = ""
    try:
        run = forward(worker, 1)
        worker.backward([run], [torch.ones_like(run.output_TD)])
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    worker.trainable.expect([ONE])
    found = step(worker)
    alone = worker_of()
    return [said, max(float((a - b).abs().max()) for a, b in zip(found, step(alone), strict=True))]


def step(worker: Worker) -> list[torch.Tensor]:
    """Output and gradients of a batch."""
    run = forward(worker, 2)
    below = worker.backward([run], [torch.ones_like(run.output_TD)])[0]
    assert below is not None
    return [run.output_TD.detach(), below, *worker.trainable.gradients().values()]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fails", [fails_once, fails_in_a_backward])
def test_the_next_batch_has_nothing_of_one_that_failed(fails: Any, rank: int, tmp_path: Path) -> None:
    (said, off), *held = together(tmp_path, two_batches, rank, fails)
    assert said == ("RuntimeError: no memory" if rank == 0 else f"RuntimeError: rank {rank}: RuntimeError: no memory")
    assert off < 1e-12
    assert held == [0, 0]


def batch(worker: Worker) -> None:
    """Asked for again, as by whoever looks for the one to blame, it says the same."""
    said = []
    for _ in range(2):
        with pytest.raises(RankError) as caught:
            forward(worker, 1)
        said.append(str(caught.value))
    assert said[0] == said[1]
    raise caught.value


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_lost_the_others_step_ends_all(rank: int, tmp_path: Path) -> None:
    said = together(tmp_path, batch, rank, fails_once, in_step=True)
    why = "could not compute its share (RuntimeError: no memory), and all stop"
    assert said[rank].startswith(f"RankError: edge: rank {rank} of 3 {why}")
    gone = f"RankError: edge: rank {rank} of 3 is gone, and the others stop"
    assert said[0 if rank else 1].startswith(gone)
