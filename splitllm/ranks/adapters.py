"""The adapters of a server as they travel between its ranks: rank 0 has them, the others compute with copies."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from splitllm.engines.optimizer import SpreadAdamW
from splitllm.roles.worker import Worker

TOGETHER = "together"


def by_key(worker: Worker) -> dict[str, list[nn.Parameter]]:
    """Parameters by whom they serve: all clients, or one; in the same order on every rank."""
    found = {TOGETHER: list(worker.trainable.parameters.values())}
    for kind, held in (("own", worker.own), ("lent", worker.lent)):
        found |= {f"{kind}/{client}": list(held[client].parameters.values()) for client in sorted(held)}
    return {key: parameters for key, parameters in found.items() if parameters}


def spread(worker: Worker) -> dict[str, SpreadAdamW]:
    """The optimisers whose state all ranks hold together, by whom they serve."""
    found = {TOGETHER: worker.trainable.optimizer}
    found |= {f"own/{client}": worker.own[client].optimizer for client in sorted(worker.own)}
    return {key: optimizer for key, optimizer in found.items() if isinstance(optimizer, SpreadAdamW)}


def used(adapters: Mapping[str, list[nn.Parameter]], clients: Collection[int]) -> list[str]:
    """Which of them the micro-batches of these clients use, in their order; of no clients none."""
    wanted = {TOGETHER, *(f"{kind}/{client}" for kind in ("own", "lent") for client in clients)} if clients else ()
    return [key for key in adapters if key in wanted]


def values(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Their values as one row of bytes, on the CPU."""
    return _bytes([parameter.detach() for parameter in parameters])


def gradients(parameters: list[nn.Parameter]) -> torch.Tensor:
    """What a backward left on them, as one row of bytes; zeros where it left nothing."""
    return _bytes([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


def put_values(parameters: list[nn.Parameter], row: torch.Tensor) -> None:
    """Set them."""
    for parameter, value in zip(parameters, _split(parameters, row), strict=True):
        parameter.data.copy_(value)


def add_gradients(parameters: list[nn.Parameter], row: torch.Tensor) -> None:
    """Add to what a backward left on them; what does not train gets none."""
    for parameter, gradient in zip(parameters, _split(parameters, row), strict=True):
        if parameter.requires_grad:
            found = gradient.to(parameter.device)
            parameter.grad = found if parameter.grad is None else parameter.grad.add_(found)


def _bytes(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.cpu().contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def _split(parameters: list[nn.Parameter], row: torch.Tensor) -> list[torch.Tensor]:
    pieces = torch.split(row, [parameter.nbytes for parameter in parameters])
    return [piece.clone().view(p.dtype).view(p.shape) for p, piece in zip(parameters, pieces, strict=True)]
