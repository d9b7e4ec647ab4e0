"""Many clients in one process without torch: they replay recorded requests, each over a connection of its own.

    python tests/soak/load.py CONFIG.json

Shares no code with splitllm but what `docs/wire.md` says. Every client says hello, joins, and takes part in step after
step: open, forward, backward, close, with what was recorded of it and the numbers that are due. After some time all
stop before the same step; then one line of JSON says what was sent and answered, and the connections stay until the
end of standard input.
"""

from __future__ import annotations

import asyncio
import json
import math
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

HEADER = struct.Struct("<4sBBHQIIQ")
HELLO, WELCOME, REQUEST, REPLY, ERROR = 1, 2, 3, 4, 5
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 1 << 20),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
STEP_KINDS = ("open", "forward", "backward", "close")
TOLD_EVERY = 5.0


def opened(frame: bytes) -> tuple[int, int, dict[str, Any], bytes]:
    """Type, number, JSON and payload of an envelope of one frame."""
    _, _, kind, _, number, _, size, payload = HEADER.unpack_from(frame)
    start = -(-(HEADER.size + size) // 64) * 64
    assert len(frame) == start + payload, "a reply of more than one frame"
    return kind, number, json.loads(frame[HEADER.size : HEADER.size + size]), frame[start:]


def framed(kind: int, number: int, said: dict[str, Any], payload: bytes = b"") -> bytes:
    text = json.dumps(said).encode()
    zeros = bytes(-(HEADER.size + len(text)) % 64)
    return HEADER.pack(b"SPLT", 1, kind, 0, number, 0, len(text), len(payload)) + text + zeros + payload


class Rejoin(Exception):
    """The generation is over."""


@dataclass
class Load:
    """What all clients share.

    Attributes:
        stop_at: the step that nobody opens any more, once that is decided.
        sent, answered: requests, by kind.
        traffic: client -> bytes up and down since the handshake.
        steps: client -> steps closed.
        lost: whatever should not have happened.
    """

    config: dict[str, Any]
    deadline: float = math.inf
    furthest: int = -1
    stop_at: int | None = None
    sent: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    traffic: dict[str, list[int]] = field(default_factory=dict)
    steps: Counter[str] = field(default_factory=Counter)
    joins: Counter[str] = field(default_factory=Counter)

    def may_open(self, step: int) -> bool:
        """Whether a step is run; all are told the same."""
        if self.stop_at is None and time.monotonic() > self.deadline:
            self.stop_at = self.furthest + 1
        if self.stop_at is not None and step >= self.stop_at:
            return False
        self.furthest = max(self.furthest, step)
        return True

    def told(self) -> dict[str, Any]:
        return {
            "steps": dict(self.steps),
            "sent": dict(self.sent),
            "answered": dict(self.answered),
            "joins": dict(self.joins),
            "traffic": self.traffic,
            "modules": "torch" in sys.modules,
        }


class Client:
    """One of them.

    Args:
        load: what it shares with the others.
        name: of this client.
    """

    def __init__(self, load: Load, name: str) -> None:
        self._load, self.name, self._index, self._alike = load, name, int(name.rpartition("-")[2]), "client"
        folder = Path(load.config["recorded"]) / name
        self._recorded = {path.stem: path.read_bytes() for path in folder.glob("*.bin")}
        self._number, self._received, self._generation = 0, list[int](), 0
        self._kept: list[list[Any]] = [[0, "new"]]
        self._traffic = load.traffic.setdefault(name, [0, 0])
        self._told = [0, 0]

    async def attend(self) -> None:
        """Connect, and take part until the load is over."""
        await self._connect()
        while True:
            try:
                return await self._take_part()
            except Rejoin:
                continue

    async def _connect(self) -> None:
        certificates = Path(self._load.config["certificates"]) / self.name
        ca, key, own = ((certificates / f"{file}.pem").read_bytes() for file in ("ca", "key", "cert"))
        options = [*OPTIONS, ("grpc.ssl_target_name_override", self._load.config["server"])]
        credentials = grpc.ssl_channel_credentials(ca, key, own)
        self._channel = grpc.aio.secure_channel(self._load.config["address"], credentials, options=options)
        self._call = self._channel.stream_stream("/splitllm.Wire/Exchange")(wait_for_ready=True)
        hello = {**self._load.config["hello"], "name": self.name, "protocol": 1, "incarnation": f"load-{self.name}"}
        await self._call.write(framed(HELLO, 0, {"values": hello, "tensors": []}))
        kind, _, said, _ = opened(await self._call.read())
        assert kind == WELCOME and said["values"]["batch_size"] == self._load.config["batch_size"], said

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()

    async def _take_part(self) -> None:
        begun = await self._ask("join", self._place(0), header={"standings": {self.name: [self._alike, self._kept]}})
        self._generation, step = int(begun["generation"]), int(begun["step"])
        self._load.joins[self.name] += 1
        assert self.name not in begun["lacking"] and self.name not in begun["donors"].values(), begun
        self._kept = [kept for kept in self._kept if kept[0] <= step]
        if begun["lacking"]:
            await self._ask("share", self._place(0), header={})
        if step == 0 and not begun["evaluated"]:
            await self._evaluate()
        while self._load.may_open(step):
            await self._step(step)
            step += 1
            self._kept = [[step, str(self._generation)], self._kept[0]]
            self._load.steps[self.name] += 1

    def _place(self, step: int) -> tuple[int, int, int]:
        return step, self._index, 0

    async def _evaluate(self) -> None:
        for index in range(sum(name.startswith("evaluation-") for name in self._recorded)):
            await self._ask(f"evaluation-{index}", (-1, self._index, index))
        await self._ask("evaluated", self._place(0))
        self._told = list(self._traffic)

    async def _step(self, step: int) -> None:
        for kind in STEP_KINDS:
            header = {}
            if kind == "close":
                crossed = [now - before for now, before in zip(self._traffic, self._told, strict=True)]
                self._told, header = list(self._traffic), {"bytes": {self.name: crossed}}
            await self._ask(f"{kind}-{step % 2}", self._place(step), **({"add": header} if header else {}))

    async def _ask(
        self,
        name: str,
        micro_batch: tuple[int, int, int],
        header: dict[str, Any] | None = None,
        add: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Send a request, recorded or made of a header alone; the header of its reply."""
        payload = b""
        if header is not None:
            said: dict[str, Any] = {"values": {"kind": name, "header": header}, "tensors": []}
        else:
            _, _, said, payload = opened(self._recorded[name])
        self._number += 1
        values = said["values"]
        values.update(micro_batch=micro_batch, generation=self._generation, received=self._received)
        values["header"].update(add or {})
        self._received = []
        frame = framed(REQUEST, self._number, said, payload)
        self._traffic[0] += len(frame)
        self._load.sent[values["kind"]] += 1
        await self._call.write(frame)
        return await self._answer(values["kind"])

    async def _answer(self, kind: str) -> dict[str, Any]:
        frame = await self._call.read()
        assert isinstance(frame, bytes), f"{self.name}: {await self._call.code()} {await self._call.details()}"
        self._traffic[1] += len(frame)
        type_, number, said, _ = opened(frame)
        assert number == self._number, f"{self.name}: an answer to {number} instead of {self._number}"
        self._received.append(number)
        if type_ == ERROR and said["values"]["error"] == "rejoin":
            raise Rejoin(said["values"]["text"])
        assert type_ == REPLY, said
        self._load.answered[kind] += 1
        found: dict[str, Any] = said["values"]["header"]
        return found


async def run(config: dict[str, Any]) -> None:
    load = Load(config)
    clients = [Client(load, name) for name in config["clients"]]
    attending = asyncio.gather(*(client.attend() for client in clients))
    while load.furthest < 0 and not attending.done():
        await asyncio.sleep(0.05)
    load.deadline = time.monotonic() + config["seconds"]
    while not attending.done():
        sys.stdout.write(json.dumps({"step": load.furthest}) + "\n")
        sys.stdout.flush()
        await asyncio.wait({attending}, timeout=TOLD_EVERY)
    await attending
    sys.stdout.write(json.dumps(load.told()) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    for client in clients:
        await client.close()


if __name__ == "__main__":
    asyncio.run(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
