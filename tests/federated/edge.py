"""A stand-in for an edge's process: it trains in plain numbers, and another engine holds its rounds.

python -m tests.federated.edge ADDRESS NAME ROUNDS RESULT RULE
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from splitllm.federated.averager import Averager, Limits
from splitllm.federated.exchange import Exchange
from splitllm.federated.pooling import Rules
from splitllm.federated.rounds import Arithmetic, Tensors, Update

WEIGHTS = {"edge-0": 3.0, "edge-1": 1.0}
RULES = Rules(Arithmetic("fedavg", scale=2.0))
EVERY = 5  # steps


def start(name: str) -> Tensors:
    """What an edge holds at first: block 0 in bfloat16, and one of them block 1, too."""
    drawn = torch.Generator().manual_seed(sorted(WEIGHTS).index(name))
    blocks = {0: torch.bfloat16, 1: torch.float32} if name == "edge-0" else {0: torch.bfloat16}
    value: Tensors = {}
    for block, dtype in blocks.items():
        for matrix, shape in (("A", (4, 8)), ("B", (6, 4))):
            value[f"adapter/h.{block}.c.lora_{matrix}.weight"] = torch.randn(shape, generator=drawn).to(dtype)
    return value


def trained(name: str, value: Tensors, step: int) -> Tensors:
    """What an edge has after some more steps."""
    rate = 1 + 0.01 * step / WEIGHTS[name]
    return {key: (tensor * rate + 0.01).to(tensor.dtype) for key, tensor in value.items()}


def undisturbed(rounds: int) -> dict[str, Tensors]:
    """What all edges end with where the engine is ours, in one process."""
    held, averager = {name: start(name) for name in WEIGHTS}, Averager(RULES.arithmetic, Limits(), None, {})
    for step in range(EVERY, rounds * EVERY + 1, EVERY):
        held = {name: trained(name, value, step) for name, value in held.items()}
        combined, _ = averager.combine([Update(name, WEIGHTS[name], value) for name, value in held.items()])
        held = {name: {key: combined.value[key] for key in value} for name, value in held.items()}
    return held


async def main(address: str, name: str, rounds: int, result: Path, rule: str) -> None:
    """The whole life of an edge."""
    value = start(name)
    async with Exchange(address, replace(RULES, arithmetic=replace(RULES.arithmetic, rule=rule))) as exchange:
        for step in range(EVERY, rounds * EVERY + 1, EVERY):
            learned, last = trained(name, value, step), step == rounds * EVERY
            value = await exchange.average(step, WEIGHTS[name], learned, last=last)
        save_file(value, result)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5]))
