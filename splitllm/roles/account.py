"""What each tenant of a server has cost: tokens, bytes, and seconds of the server's device. Plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """The rows of one micro-batch in a batch.

    Attributes:
        client: its number.
        lengths: real tokens of each row.
        blocks: how many of the server's blocks they ran through.
    """

    client: int
    lengths: Sequence[int]
    blocks: int


class Account:
    """Counts by tenant and, over all, the batches that ran.

    A batch is as wide as its longest row. Its time is shared out by positions, a micro-batch's rows x the longest of
    them, times the blocks that they ran through: nobody pays for how long the rows of others are.

    Attributes:
        tokens: client -> real tokens that it sent, those of evaluations included; one counts once, with its forward.
        up, down: client -> bytes of tensors, as coded, without frames.
        seconds: client -> of the device.
        waits: client -> seconds that its micro-batches waited for the device: those of all, and the longest.
        batches: that ran; a gradient's is one, too.
        micro_batches: in all batches.
        positions, padding: of all batches; and how many of them held no token.
        last: micro-batches, and share of padding, of the last batch.
        longest: seconds of the batch that took longest.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.up: dict[int, int] = {}
        self.down: dict[int, int] = {}
        self.seconds: dict[int, float] = {}
        self.waits: dict[int, tuple[float, float]] = {}
        self.batches = self.micro_batches = self.positions = self.padding = 0
        self.last, self.longest = (0, 0.0), 0.0

    def asked(self, client: int, tokens: int, nbytes: int) -> None:
        """A request came, of so many real tokens (0 unless it is a forward) and bytes."""
        self.tokens[client] = self.tokens.get(client, 0) + tokens
        self.up[client] = self.up.get(client, 0) + nbytes

    def answered(self, client: int, nbytes: int) -> None:
        """An answer of so many bytes goes down."""
        self.down[client] = self.down.get(client, 0) + nbytes

    def waited(self, client: int, seconds: float) -> None:
        """The device begins with a micro-batch that came so long ago."""
        total, longest = self.waits.get(client, (0.0, 0.0))
        self.waits[client] = total + seconds, max(longest, seconds)

    def ran(self, parts: Sequence[Part], seconds: float) -> None:
        """The device was busy with a batch for so long. Called on the thread that computes, one batch after another."""
        if not parts:
            return
        weights = [len(part.lengths) * max(part.lengths) * max(1, part.blocks) for part in parts]
        for part, weight in zip(parts, weights, strict=True):
            self.seconds[part.client] = self.seconds.get(part.client, 0.0) + seconds * weight / sum(weights)
        rows = sum(len(part.lengths) for part in parts)
        positions = rows * max(max(part.lengths) for part in parts)
        padding = positions - sum(sum(part.lengths) for part in parts)
        self.batches += 1
        self.micro_batches += len(parts)
        self.positions += positions
        self.padding += padding
        self.last, self.longest = (len(parts), padding / positions), max(self.longest, seconds)
