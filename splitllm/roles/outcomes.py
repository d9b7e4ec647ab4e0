"""What comes of a round: as the server that averages sees it, and as it comes down, looked at before it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from splitllm.errors import PeerError
from splitllm.federated.rounds import ADAPTER, FROZEN, STEP, A, Arithmetic, B, Combined, Tensors
from splitllm.roles.together import answered
from splitllm.wire.message import Message


@dataclass(frozen=True)
class Outcome:
    """Of an average.

    Attributes:
        combined: None where nothing came that could be averaged.
        rejected: who was left out -> why.
        updates: that were averaged.
        void: why it does not count; None: it does.
        epsilon: that all rounds of this server so far have cost, where there is noise.
    """

    combined: Combined | None
    rejected: Mapping[str, str]
    updates: int
    void: str | None = None
    epsilon: float | None = None


def largest(parts: Iterable[Mapping[str, torch.Tensor]]) -> Tensors:
    """All tensors; of one that several hold the largest."""
    whole: Tensors = {}
    for part in parts:
        for name, tensor in part.items():
            if name not in whole or tensor.numel() > whole[name].numel():
                whole[name] = tensor
    return whole


def outcome_in(reply: Message, sent: Mapping[str, torch.Tensor], arithmetic: Arithmetic) -> Tensors:
    """The value in the answer to a round: of all that was sent, of shapes that fit, and finite.

    Raises:
        PeerError: it is not.
    """
    return usable(reply.tensors, sent, arithmetic, reply.sender)


def usable(
    answer: Mapping[str, torch.Tensor], sent: Mapping[str, torch.Tensor], arithmetic: Arithmetic, sender: str
) -> Tensors:
    """An outcome, if it is of all that was sent, of shapes that fit, and finite.

    Raises:
        PeerError: it is not.
    """
    value = dict(answer)
    for name in {**_adapters(sent), **value}:
        if name not in value and FROZEN + name.removeprefix(ADAPTER) in value:
            continue
        found, like = value.get(name), _like(name, sent)
        if found is None or not found.is_floating_point() or not bool(torch.isfinite(found).all()):
            raise PeerError(f"{sender} answered round with nothing of use as {name}")
        if like is None or not fits(name, found.shape, like, any_rank=arithmetic.any_rank):
            raise PeerError(f"{sender} answered round with {list(found.shape)} as {name}")
    return value


def fits(key: str, found: torch.Size, like: torch.Size, *, any_rank: bool) -> bool:
    """Whether a tensor of a value can be of this shape.

    Args:
        key: its name there.
        found: its shape.
        like: of the adapter tensor that it is about.
        any_rank: whether holders may differ in rank.
    """
    place, _, name = key.partition("/")
    if f"{place}/" == STEP:
        return found == torch.Size()
    if name.endswith((A, B)) and (f"{place}/" == FROZEN or (any_rank and f"{place}/" == ADAPTER)):
        wide = 1 if name.endswith(A) else 0
        most = max(like)  # of rank: no product of these widths has more
        return len(found) == 2 and found[wide] == like[wide] and found[1 - wide] <= most
    return found == like


def is_void(reply: Message) -> bool:
    """Whether a round does not count, so that everybody goes on with what it has.

    Raises:
        PeerError: the answer does not say.
    """
    void: bool = answered(reply, "void", lambda value: isinstance(value, bool))
    return void


def _adapters(sent: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor for name, tensor in sent.items() if name.startswith(ADAPTER)}


def _like(key: str, sent: Mapping[str, torch.Tensor]) -> torch.Size | None:
    """The shape of what was sent of the adapter tensor that a tensor of an outcome is about."""
    name = key.partition("/")[2]
    found = sent.get(ADAPTER + name, sent.get(FROZEN + name))
    return None if found is None else found.shape
