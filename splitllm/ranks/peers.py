"""What the ranks of one server say to each other: a line of JSON and plain tensors, over gloo, never pickled.

Who waits here does not spin: gloo waits for a socket. A peer that is gone is noticed at once, by its closed connection.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from splitllm.errors import RankError

PATIENCE = timedelta(days=365)  # a rank waits for the next batch as long as clients do not send one
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16)}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.int64, torch.int32, torch.uint8)}


class Peers:
    """The ranks of this server, seen from one of them; all of them make one at the same time.

    Args:
        who: the server's name, for what is said of a rank that is gone.

    Attributes:
        rank, size: of this process.
    """

    def __init__(self, who: str) -> None:
        self.rank, self.size, self._who = dist.get_rank(), dist.get_world_size(), who
        self._group, self._sending = dist.new_group(backend="gloo", timeout=PATIENCE), threading.Lock()

    def send(self, to: int, values: Mapping[str, Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        """Say something to another rank.

        Args:
            to: its number.
            values: what JSON can hold.
            tensors: of any shape.

        Raises:
            RankError: it is gone.
        """
        shapes = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
        line = json.dumps({"values": values, "tensors": shapes}).encode()
        with self._sending:  # another thread may say something, too
            self._send(to, torch.tensor([len(line)]))
            self._send(to, torch.frombuffer(bytearray(line), dtype=torch.uint8))
            for tensor in tensors:
                if tensor.numel():
                    self._send(to, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))

    def receive(self, of: int) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Wait for what another rank says: values and tensors, on the CPU.

        Raises:
            RankError: it is gone.
        """
        length = int(self._receive(of, torch.zeros(1, dtype=torch.int64)))
        line = json.loads(bytes(self._receive(of, torch.empty(length, dtype=torch.uint8)).numpy()))
        return line["values"], [self._tensor(of, DTYPES[name], shape) for name, shape in line["tensors"]]

    def _tensor(self, of: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            self._receive(of, tensor.view(-1).view(torch.uint8))
        return tensor

    def _send(self, to: int, flat: torch.Tensor) -> None:
        try:
            dist.send(flat, to, group=self._group)
        except RuntimeError as error:
            raise self._gone(to) from error

    def _receive(self, of: int, flat: torch.Tensor) -> torch.Tensor:
        try:
            dist.recv(flat, of, group=self._group)
        except RuntimeError as error:
            raise self._gone(of) from error
        return flat

    def _gone(self, rank: int) -> RankError:
        return RankError(
            f"{self._who}: rank {rank} of {self.size} is gone, and the others stop; see its log, and start them again "
            "with the same command to go on where the run is"
        )
