"""Low-rank products, added and made smaller without ever being multiplied out.

Shape suffixes: D width in, O width out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one weight: scale x B A.

    Attributes:
        a_RD: A, on the side of the input.
        b_OR: B.
        scale: alpha / r, for rsLoRA alpha / sqrt(r).
    """

    a_RD: torch.Tensor
    b_OR: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a_RD.shape[0]

    def product(self) -> torch.Tensor:
        """Multiplied out, [O, D]."""
        return self.scale * self.b_OR @ self.a_RD


def stacked(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The weighted sum of products, exactly: A and B one after another. Its rank is the sum of theirs, its scale 1."""
    rows = [weight * part.scale * part.a_RD for part, weight in zip(parts, weights, strict=True)]
    return LowRank(torch.cat(rows), torch.cat([part.b_OR for part in parts], 1))


def norm(part: LowRank) -> float:
    """The Frobenius norm of the product."""
    _, core_RR, _ = _core(part)
    return float(torch.linalg.matrix_norm(core_RR))


def truncated(part: LowRank, rank: int, scale: float = 1.0) -> LowRank:
    """The best product of at most this rank (Eckart and Young, 1936): B = U S / scale, A = V^T.

    Args:
        part: any.
        rank: of the result; where the product has less, the rest is 0.
        scale: of the result.
    """
    left_OR, core_RR, right_DR = _core(part)
    u_RR, s_R, vh_RR = torch.linalg.svd(core_RR)
    kept = min(rank, s_R.shape[0])
    b_OR = left_OR @ (u_RR[:, :kept] * s_R[:kept]) / scale
    a_RD = vh_RR[:kept] @ right_DR.T
    return padded(LowRank(a_RD.to(part.a_RD.dtype), b_OR.to(part.b_OR.dtype), scale), rank)


def padded(part: LowRank, rank: int) -> LowRank:
    """The same product with rows and columns of zeros, up to a rank."""
    missing = rank - part.rank
    return LowRank(F.pad(part.a_RD, (0, 0, 0, missing)), F.pad(part.b_OR, (0, missing)), part.scale)


def _core(part: LowRank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The product as L C R^T, in fp64, with orthonormal columns in L [O, .] and R [D, .] and a small C."""
    left_OR, upper_RR = torch.linalg.qr(part.scale * part.b_OR.double())
    right_DR, lower_RR = torch.linalg.qr(part.a_RD.double().T)
    return left_OR, upper_RR @ lower_RR.T, right_DR
