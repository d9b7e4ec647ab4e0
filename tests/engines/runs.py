"""Short runs by an engine and plain; and, as a program under torchrun, the same on every rank."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from splitllm.engines.places import Places, places_of
from splitllm.model.loading import Checkpoint
from splitllm.model.lora import matched_modules
from splitllm.recipe import Recipe
from splitllm.roles.assembly import Roles
from splitllm.roles.ledger import Ledger
from tests.families import TARGETS, checkpoint_folder, corpus, recipe, roles_of
from tests.test_exactness import one_step
from tests.test_quantization import with_every_b_moved

ENGINES: dict[str, dict[str, Any]] = {
    "zero": {"zero": {"stage": 3}},
    "zero cpu": {"zero": {"stage": 3, "offload_param": "cpu"}},
    "fsdp": {"fsdp": True},
}
SPREADING: dict[str, dict[str, Any]] = {
    "zero 1": {"zero": {"stage": 1}},
    "zero 2 cpu": {"zero": {"stage": 2, "offload_optimizer": "cpu"}},
}
SHARED: dict[str, Any] = {"train": {"in_flight": 2}, "server": {}}
"""Two micro-batches of each client between forward and backward."""
RECOMPUTED: dict[str, Any] = {"train": {"activation_checkpointing": True, "in_flight": 2}, "server": {}}
TENANTS: dict[str, Any] = {
    "split": {"tiers": {"client": 3, "edge": 1, "cloud": 1}, "client_cuts": {"client-1": 3}},
    "lora": {"adapters": "per_client", "dropout": 0.2},
    "server": {"batching": "synchronous"},
    "train": {"accumulate": 1},
}
"""Adapters of their own, from different cuts: servers run only some of their blocks for some of a batch."""
OFF = 0.02
"""Of what the ledger says: parts of tensors are rounded up."""
MODES = {"shared": SHARED, "recomputed": RECOMPUTED, "tenants": TENANTS}


def with_engine(family: str, engine: str | None, mode: str = "shared", dtype: str = "float32") -> Recipe:
    """Three tiers, whose servers hold their weights by an engine; None: plainly."""
    changes = {**MODES[mode]}
    changes["server"] = {**changes["server"], **({**ENGINES, **SPREADING}[engine] if engine else {})}
    return recipe(family, [2, 4], "client", dtype=dtype, **changes)


def run(wanted: Recipe) -> tuple[list[float], dict[str, torch.Tensor], Roles]:
    """Losses of two steps with an evaluation in between, what trains, and the roles."""
    roles = roles_of(wanted, corpus(wanted.split.tiers["client"]))
    with_every_b_moved(roles)
    losses = [one_step(roles, 0)]
    losses.append(asyncio.run(_evaluated(roles)))
    losses.append(one_step(roles, 1))
    return losses, roles.state(), roles


async def _evaluated(roles: Roles) -> float:
    return sum([report.loss for report in await asyncio.gather(*(client.evaluate() for client in roles.clients))])


def differences(plain: tuple[Any, ...], other: tuple[Any, ...]) -> list[str]:
    """What of two runs is not equal bit for bit."""
    found = [] if plain[0] == other[0] else [f"losses {plain[0]} {other[0]}"]
    assert plain[1].keys() == other[1].keys()
    return found + [name for name, tensor in plain[1].items() if not torch.equal(tensor, other[1][name])]


def places_at_the_top(roles: Roles) -> Places:
    """Where the frozen matrices of the cloud's blocks lie."""
    blocks = roles.workers["cloud"]["cloud"].shard.own_blocks()
    return places_of(p for block in blocks for p in block.parameters() if p.dim() > 1 and not p.requires_grad)


def mistold(wanted: Recipe, family: str, roles: Roles, ranks: int) -> list[str]:
    """Servers of which a rank does not hold what the ledger says: weights, adapters and optimisers."""
    asked = wanted.model_copy(update={"server": wanted.server.model_copy(update={"processes": ranks})})
    config = Checkpoint(wanted.model.base).config
    ledger, found = Ledger(asked, config, matched_modules(config, TARGETS.get(family)), 0), []
    for name, worker in (roles.workers["edge"] | roles.workers["cloud"]).items():
        parts, peak = ledger.of(name), worker.peak()
        told = parts.weights + parts.offloaded + parts.adapters + parts.optimizer
        held = peak["weights"] + peak["adapter and optimiser"]
        found += [f"{name}: {told} told, {held} held"] if abs(told / held - 1) > OFF else []
    return found


def main(folder: str, *cases: str) -> None:
    """Run each case `ENGINE/FAMILY/MODE` by its engine on all ranks, and plain; all must be equal, and as is told."""
    torch.set_num_threads(1)
    for case in cases:
        checkpoint_folder(case.split("/")[1])  # transformers writes nothing on other ranks once these have joined
    dist.init_process_group("gloo")
    for case in cases:
        engine, family, mode = case.split("/")
        other = run(with_engine(family, engine, mode))
        held = places_at_the_top(other[2])
        dist.barrier()
        plain = run(with_engine(family, None, mode))
        whole = places_at_the_top(plain[2])
        lines = differences(plain, other) + mistold(
            with_engine(family, engine, mode), family, other[2], dist.get_world_size()
        )
        if engine in ENGINES and held.device + held.host > 0.6 * whole.device:
            lines.append(f"{held} of {whole}")
        (Path(folder) / f"{case.replace('/', '-')}-{dist.get_rank()}").write_text("\n".join(lines) or "equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
