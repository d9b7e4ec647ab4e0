"""Ranks of one server as processes of this machine, without the server: what rank 0 says comes back."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from splitllm.model.joined import Rows
from splitllm.model.randomness import MicroBatchId
from splitllm.ranks.follower import Follower
from splitllm.ranks.leader import Leader, end
from splitllm.ranks.peers import Peers
from splitllm.roles.worker import Ask, Pass, Worker
from tests.roles.test_worker import worker_of

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.roles.test_worker", "transformers.models.llama.modeling_llama"])
Lead = Callable[[Worker], Any]
Spoil = Callable[[Worker], None]
ONE = MicroBatchId(0, 0, 0)
LENGTHS = (4, 4, 4)


def ask(seed: int) -> Ask:
    """Three rows, one a rank."""
    inputs = torch.randn(12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Ask(Rows(ONE, LENGTHS, 2), inputs, input_gradient=True)


def forward(worker: Worker, seed: int) -> Pass:
    return worker.forward([ask(seed)])[0]


def together(folder: Path, lead: Lead, spoiled: int, spoil: Spoil, *, in_step: bool = False) -> list[Any]:
    """Run three ranks.

    Args:
        folder: empty.
        lead: what rank 0 does; returns what JSON can hold.
        spoiled: a rank.
        spoil: what is done to its worker first.
        in_step: as of `Leader`.

    Returns:
        What rank 0 found, and of the others how many graphs they held last; text is an error.
    """
    ranks = [
        FORKS.Process(target=_rank, args=(rank, str(folder), lead, spoil if rank == spoiled else None, in_step))
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0, "a rank hangs, or found what is in its log"
    return [json.loads((folder / f"said-{rank}").read_text()) for rank in range(3)]


def _rank(rank: int, folder: str, lead: Lead, spoil: Spoil | None, in_step: bool) -> None:
    torch.set_num_threads(1)
    worker = worker_of()
    if spoil is not None:
        spoil(worker)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 3), rank=rank, world_size=3)
    peers = Peers("edge")
    try:
        said = _led(worker, peers, lead, in_step) if rank == 0 else _followed(worker, peers, in_step)
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    Path(folder, f"said-{rank}").write_text(json.dumps(said))


def _led(worker: Worker, peers: Peers, lead: Lead, in_step: bool) -> Any:
    worker.ranks = Leader(worker, peers, whole=False, in_step=in_step)
    found = lead(worker)
    end(peers)
    return found


def _followed(worker: Worker, peers: Peers, in_step: bool) -> int:
    follower = Follower(worker, peers, in_step=in_step)
    follower.follow()
    return len(follower._held)
