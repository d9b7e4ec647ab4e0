"""One tokenised row: its tokens, and which of them are learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """A row of S tokens.

    Attributes:
        ids: token ids, int32, shape S, S >= 1.
        targets: bool, shape S; `targets[i]` means that token i is predicted from those before it. False at every start.
        starts: the index at which each document of a packed row begins; (0,) for an ordinary row.
    """

    ids: Ids
    targets: Mask
    starts: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        assert self.ids.ndim == 1
        assert self.ids.size >= 1
        assert self.ids.shape == self.targets.shape
        assert self.starts[0] == 0
        assert all(not self.targets[start] for start in self.starts)

    def __len__(self) -> int:
        return int(self.ids.size)

    @property
    def labels(self) -> int:
        """How many tokens are predicted."""
        return int(np.count_nonzero(self.targets))
