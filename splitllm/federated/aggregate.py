"""From the adapters of several clients to one: a function a rule, over the adapters of one weight.

With W_i = W + s_i B_i A_i at client i, and weights p_i that add up to 1, what is wanted is W + sum p_i s_i B_i A_i. A
rule is exact if its outcome is that. The outcome is what each client goes on training, and what is added to the frozen
weight beside it, as factors: a base that tenants share, or that is quantised, stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from splitllm.errors import AverageError
from splitllm.federated.factors import LowRank, norm, padded, stacked, truncated


@dataclass(frozen=True)
class Average:
    """The outcome of a rule for one weight.

    Attributes:
        adapters: of each client, to go on from; None: it starts anew.
        frozen: what is added to the frozen weight from now on; None: nothing.
    """

    adapters: tuple[LowRank, ...] | None
    frozen: LowRank | None = None

    def of(self, client: int) -> LowRank:
        """All that one client's weight has beside the base."""
        parts = [part for part in (self.adapters and self.adapters[client], self.frozen) if part]
        return parts[0] if len(parts) == 1 else stacked(parts, [1.0] * len(parts))


Rule = Callable[[Sequence[LowRank], Sequence[float]], Average]


def fedavg(adapters: Sequence[LowRank], weights: Sequence[float]) -> Average:
    """The means of A and of B. Not exact: the mean of products is not the product of means.

    Raises:
        AverageError: ranks or scales differ.
    """
    _need_alike(adapters, "fedavg")
    return Average((_mean(adapters, weights),) * len(adapters))


def fedex(adapters: Sequence[LowRank], weights: Sequence[float]) -> Average:
    """The means of A and of B, and frozen beside them what that lacks: sum p_i (B_i - B)(A_i - A).

    FedEx-LoRA adds it to W (arXiv 2410.09432); its rank is less than that of all clients together.

    Raises:
        AverageError: ranks or scales differ.
    """
    _need_alike(adapters, "fedex")
    mean = _mean(adapters, weights)
    lacking = [LowRank(each.a_RD - mean.a_RD, each.b_OR - mean.b_OR, each.scale) for each in adapters]
    residual = stacked(lacking, weights)
    rank = min((len(adapters) - 1) * mean.rank, *residual.a_RD.shape[1:], residual.b_OR.shape[0])
    return Average((mean,) * len(adapters), truncated(residual, rank) if rank else None)


def flora(adapters: Sequence[LowRank], weights: Sequence[float]) -> Average:
    """A and B one after another, frozen; clients start anew. Ranks may differ (FLoRA, arXiv 2409.05976)."""
    return Average(None, stacked(adapters, weights))


def ffa(adapters: Sequence[LowRank], weights: Sequence[float]) -> Average:
    """The mean of B, where all have the same A, which did not train (FFA-LoRA, arXiv 2403.12313).

    Raises:
        AverageError: their A differ.
    """
    _need_alike(adapters, "ffa")
    if not _equal([each.a_RD for each in adapters]):
        raise AverageError("ffa needs the same A everywhere, which did not train; use fedex or flora")
    return Average((_mean(adapters, weights),) * len(adapters))


def rolora(adapters: Sequence[LowRank], weights: Sequence[float]) -> Average:
    """The mean of that of A and B which trained in this round, where the other is the same everywhere.

    RoLoRA trains them by turns (arXiv 2502.01755).

    Raises:
        AverageError: both differ.
    """
    _need_alike(adapters, "rolora")
    if not _equal([each.a_RD for each in adapters]) and not _equal([each.b_OR for each in adapters]):
        raise AverageError(
            "rolora needs the same A or the same B everywhere, as one of them trains; use fedex or flora"
        )
    return Average((_mean(adapters, weights),) * len(adapters))


def flexlora(adapters: Sequence[LowRank], weights: Sequence[float]) -> Average:
    """Of the exact sum, for each client the best of its rank, by SVD (FlexLoRA, arXiv 2402.11505)."""
    whole = stacked(adapters, weights)
    return Average(tuple(truncated(whole, each.rank, each.scale) for each in adapters))


def hetlora(adapters: Sequence[LowRank], weights: Sequence[float]) -> Average:
    """The means of A and of B with zeros up to the largest rank; each client keeps its own (HetLoRA, arXiv 2401.06432).

    Not exact. Without pruning and without weights by sparsity.
    """
    rank = max(each.rank for each in adapters)
    scaled = [LowRank(each.a_RD, each.b_OR * each.scale) for each in adapters]
    mean = _mean([padded(each, rank) for each in scaled], weights)
    return Average(tuple(LowRank(mean.a_RD[: e.rank], mean.b_OR[:, : e.rank] / e.scale, e.scale) for e in adapters))


def trimmed_mean(adapters: Sequence[LowRank], weights: Sequence[float], trim: float = 0.1) -> Average:
    """Of each number of A and B the mean without the largest and smallest; weights do not count. Not exact.

    Coordinate-wise trimmed mean (Yin et al., arXiv 1803.01498).

    Args:
        adapters: of the clients.
        weights: only their count matters.
        trim: share of the clients that is left out at each end, rounded up, as long as one is left.

    Raises:
        AverageError: ranks or scales differ.
    """
    _need_alike(adapters, "trimmed_mean")
    return _each(adapters, lambda values_K: trimmed(values_K, trim))


def median(adapters: Sequence[LowRank], weights: Sequence[float]) -> Average:
    """Of each number of A and B the median; weights do not count. Not exact (arXiv 1803.01498).

    Raises:
        AverageError: ranks or scales differ.
    """
    _need_alike(adapters, "median")
    return _each(adapters, middle)


def trimmed(values_K: torch.Tensor, trim: float) -> torch.Tensor:
    """The mean over the first dim without the ends."""
    count = values_K.shape[0]
    left_out = min(math.ceil(trim * count), (count - 1) // 2)
    kept = values_K.double().sort(0).values[left_out : count - left_out]
    return kept.mean(0).to(values_K.dtype)


def middle(values_K: torch.Tensor) -> torch.Tensor:
    """The median over the first dim; of an even count the mean of the two in the middle."""
    count = values_K.shape[0]
    ordered = values_K.double().sort(0).values
    return ((ordered[(count - 1) // 2] + ordered[count // 2]) / 2).to(values_K.dtype)


RULES: dict[str, Rule] = {
    "fedavg": fedavg,
    "fedex": fedex,
    "flora": flora,
    "ffa": ffa,
    "rolora": rolora,
    "flexlora": flexlora,
    "hetlora": hetlora,
    "trimmed_mean": trimmed_mean,
    "median": median,
}


def error_of(average: Average, adapters: Sequence[LowRank], weights: Sequence[float], client: int = 0) -> float:
    """How far a client's outcome is from the exact sum: Frobenius norms, as a share of that sum's."""
    exact = stacked(adapters, weights)
    size = norm(exact)
    return norm(stacked([exact, average.of(client)], [1.0, -1.0])) / size if size else 0.0


def _each(adapters: Sequence[LowRank], of_all: Callable[[torch.Tensor], torch.Tensor]) -> Average:
    a_RD = of_all(torch.stack([each.a_RD for each in adapters]))
    b_OR = of_all(torch.stack([each.b_OR for each in adapters]))
    return Average((LowRank(a_RD, b_OR, adapters[0].scale),) * len(adapters))


def _mean(adapters: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    a_RD = weighted([each.a_RD for each in adapters], weights)
    return LowRank(a_RD, weighted([each.b_OR for each in adapters], weights), adapters[0].scale)


def weighted(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted mean, summed in fp64, in the widest dtype of them; of equal ones it is that tensor, to the bit."""
    if _equal(tensors):
        return tensors[0].clone()
    total = sum(weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True))
    assert isinstance(total, torch.Tensor)
    return total.to(reduce(torch.promote_types, (tensor.dtype for tensor in tensors)))


def _equal(tensors: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(tensors[0], other) for other in tensors[1:])


def _need_alike(adapters: Sequence[LowRank], rule: str) -> None:
    ranks, scales = sorted({each.rank for each in adapters}), sorted({each.scale for each in adapters})
    if len(ranks) > 1:
        raise AverageError(f"{rule} needs one rank, and there are {ranks}; use flora, flexlora or hetlora")
    if len(scales) > 1:
        raise AverageError(f"{rule} needs one scale (alpha over rank), and there are {scales}; use flora or flexlora")
