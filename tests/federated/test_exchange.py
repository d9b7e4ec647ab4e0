"""The edge's local address for rounds that another engine runs: over real sockets, from a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from splitllm.errors import AverageError, PeerError
from splitllm.federated.exchange import Exchange
from splitllm.federated.parcels import LENGTHS, Parcel, end, give, lengths, parsed, place, take
from splitllm.federated.pooling import Rules, unviewed
from splitllm.federated.rounds import Arithmetic
from tests.processes import free_port

RULES = Rules(Arithmetic("fedavg"))
VALUE = {"adapter/a": torch.arange(6.0).reshape(2, 3), "adapter/b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
PATIENCE = 5.0


@asynccontextmanager
async def exchange_at(address: str) -> AsyncIterator[Exchange]:
    async with Exchange(address, RULES) as exchange:
        yield exchange


async def aside(call: Callable[..., Any], *words: Any) -> Any:
    return await asyncio.to_thread(call, *words)


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"unix:{tmp_path}/edge.sock" if request.param == "unix" else f"127.0.0.1:{free_port()}"


async def one_round(address: str, step: int = 4) -> dict[str, torch.Tensor]:
    """What an edge gets for its value, from an engine that gives it twice of everything."""
    async with exchange_at(address) as exchange:
        awaited = asyncio.create_task(exchange.average(step, 3.0, VALUE))
        taken = await aside(take, address, PATIENCE)
        bfloat16 = taken.values["bfloat16"]
        doubled = {n: 2 * t for n, t in unviewed(load(taken.tensors), bfloat16).items()}
        blob = save({n: t.view(torch.uint16) if n in bfloat16 else t for n, t in doubled.items()})
        await aside(give, address, step, bfloat16, blob, PATIENCE)
        return await awaited


def test_values_go_up_and_outcomes_come_down_in_every_dtype(address: str) -> None:
    outcome = asyncio.run(one_round(address))
    assert outcome.keys() == VALUE.keys()
    for name, tensor in VALUE.items():
        assert outcome[name].dtype == tensor.dtype and torch.equal(outcome[name], 2 * tensor)


def test_a_round_that_is_not_due_is_waited_for_and_then_taken_as_often_as_it_is_asked_for(address: str) -> None:
    async def main() -> None:
        async with exchange_at(address) as exchange:
            early = asyncio.create_task(aside(take, address, PATIENCE))
            await asyncio.sleep(0.2)
            assert not early.done()
            awaited = asyncio.create_task(exchange.average(7, 3.0, VALUE))
            first, again = await early, await aside(take, address, PATIENCE)
            assert first == again and first.values == {
                "step": 7,
                "weight": 3.0,
                "last": False,
                "rules": RULES.text(),
                "bfloat16": ["adapter/b"],
            }
            assert not awaited.done()
            awaited.cancel()

    asyncio.run(main())


def test_an_outcome_that_comes_again_changes_nothing(address: str) -> None:
    async def main() -> None:
        async with exchange_at(address) as exchange:
            for step in (1, 2):
                awaited = asyncio.create_task(exchange.average(step, 1.0, {"adapter/a": torch.full((1,), float(step))}))
                blob = (await aside(take, address, PATIENCE)).tensors
                for given in range(1, step + 1):
                    await aside(give, address, given, [], blob, PATIENCE)
                assert (await awaited)["adapter/a"].item() == step

    asyncio.run(main())


def test_a_round_that_is_held_again_takes_its_outcome_again(address: str) -> None:
    """Its step was not committed: the edge went back, and an outcome comes while it is on its way there again."""

    async def main() -> None:
        async with exchange_at(address) as exchange:
            cancelled = asyncio.create_task(exchange.average(3, 1.0, VALUE))
            taken = await aside(take, address, PATIENCE)
            outcome = (3, taken.values["bfloat16"], taken.tensors, PATIENCE)
            cancelled.cancel()
            giving = asyncio.create_task(aside(give, address, *outcome))
            await asyncio.sleep(0.2)
            assert not giving.done()
            for _ in range(2):
                again = asyncio.create_task(exchange.average(3, 1.0, VALUE))
                assert (await giving) is None and torch.equal((await again)["adapter/a"], VALUE["adapter/a"])
                giving = asyncio.create_task(_taken_and_given(address, outcome))

            assert torch.equal((await exchange.average(3, 1.0, VALUE))["adapter/a"], VALUE["adapter/a"])
            await giving

    asyncio.run(main())


async def _taken_and_given(address: str, outcome: tuple[Any, ...]) -> None:
    assert (await aside(take, address, PATIENCE)).values["step"] == 3
    await aside(give, address, *outcome)


def test_an_edge_that_is_through_says_so_to_who_waits_and_who_asks(address: str) -> None:
    async def main() -> None:
        async with exchange_at(address) as exchange:
            waiting = asyncio.create_task(aside(take, address, PATIENCE))
            await asyncio.sleep(0.1)
            exchange.finish()
            assert [(await waiting).values, (await aside(take, address, PATIENCE)).values] == [{"over": True}] * 2

    asyncio.run(main())


@pytest.mark.parametrize(
    ("step", "bfloat16", "blob", "said"),
    [
        (5, [], save({"adapter/a": torch.ones(1)}), "an outcome of step 5, and the round of step 4 is due"),
        (None, [], save({"adapter/a": torch.ones(1)}), "step is None; expected a number"),
        (4, [], b"no safetensors", "cannot be read"),
        (4, [], save({"adapter/a": torch.tensor([float("nan")])}), "nothing of use as adapter/a"),
        (4, [], save({"adapter/a": torch.ones(1, dtype=torch.int64)}), "nothing of use as adapter/a"),
        (4, ["adapter/a"], save({"adapter/a": torch.ones(1)}), "bfloat16 names 'adapter/a'"),
        (4, 5, save({"adapter/a": torch.ones(1)}), "bfloat16 is 5"),
    ],
)
def test_what_is_no_outcome_is_refused_and_the_edge_still_waits(
    tmp_path: Path, step: Any, bfloat16: Any, blob: bytes, said: str
) -> None:
    async def main() -> None:
        address = f"unix:{tmp_path}/edge.sock"
        async with exchange_at(address) as exchange:
            awaited = asyncio.create_task(exchange.average(4, 1.0, VALUE))
            await aside(take, address, PATIENCE)
            with pytest.raises(PeerError, match=said):
                await aside(give, address, step, bfloat16, blob, PATIENCE)
            assert not awaited.done()
            awaited.cancel()

    asyncio.run(main())


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\n\r\n", LENGTHS.pack(1 << 30, 0), LENGTHS.pack(2, 0) + b"[]", LENGTHS.pack(4, 9)]
)
def test_what_is_no_frame_ends_that_connection_alone(tmp_path: Path, sent: bytes) -> None:
    async def main() -> None:
        address = f"unix:{tmp_path}/edge.sock"
        async with exchange_at(address) as exchange:
            reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
            writer.write(sent)
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
            writer.close()
            exchange.finish()
            assert (await aside(take, address, PATIENCE)).values == {"over": True}

    asyncio.run(main())


def test_an_edge_hears_that_its_rounds_cannot_go_on(address: str) -> None:
    async def main() -> None:
        async with exchange_at(address) as exchange:
            awaited = asyncio.create_task(exchange.average(4, 1.0, VALUE))
            await aside(take, address, PATIENCE)
            await aside(end, address, "edge-0, edge-1 have different rules", PATIENCE)
            with pytest.raises(AverageError, match="cannot go on: edge-0, edge-1 have different rules"):
                await awaited

    asyncio.run(main())


def test_a_start_that_the_engine_knows_already_is_told_once(tmp_path: Path) -> None:
    """A site that was restarted before its first round is committed gets that round's outcome for its start."""

    async def main() -> None:
        address = f"unix:{tmp_path}/edge.sock"
        async with exchange_at(address) as exchange:
            start = asyncio.create_task(exchange.average(0, 1.0, VALUE))
            taken = await aside(take, address, PATIENCE)
            giving = asyncio.create_task(aside(give, address, 4, taken.values["bfloat16"], taken.tensors, PATIENCE))
            assert torch.equal((await start)["adapter/a"], VALUE["adapter/a"])
            assert torch.equal((await exchange.average(4, 1.0, VALUE))["adapter/b"], VALUE["adapter/b"])
            await giving

    asyncio.run(main())


def test_an_address_that_is_in_use_is_not_taken_over(address: str) -> None:
    async def main() -> None:
        async with exchange_at(address):
            with pytest.raises(OSError, match=r"use|listens"):
                async with exchange_at(address):
                    pass

    asyncio.run(main())


def test_an_unknown_call_is_refused(tmp_path: Path) -> None:
    async def main() -> bytes:
        address = f"unix:{tmp_path}/edge.sock"
        async with exchange_at(address):
            reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
            writer.write(Parcel({"call": "drop"}).packed())
            answer = await reader.read()
            writer.close()
            return answer

    answer = asyncio.run(main())
    text, _ = lengths(answer[: LENGTHS.size])
    said = parsed(answer[LENGTHS.size :][:text], b"").values
    assert said == {"error": "call 'drop' is unknown; the calls are take, give and end"}


def test_an_edge_that_goes_away_is_waited_for(tmp_path: Path) -> None:
    """Its process is killed while its value is awaited, and another one starts."""
    address = f"unix:{tmp_path}/edge.sock"
    with socket.socket(socket.AF_UNIX) as first:
        first.bind(address.removeprefix("unix:"))
        first.listen()
        found: list[Parcel] = []
        taking = threading.Thread(target=lambda: found.append(take(address, PATIENCE)))
        taking.start()
        first.accept()[0].close()

    async def main() -> None:
        async with exchange_at(address) as exchange:
            awaited = asyncio.create_task(exchange.average(9, 1.0, VALUE))
            await aside(taking.join)
            awaited.cancel()

    asyncio.run(main())
    assert found[0].values["step"] == 9


def test_no_edge_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"no edge at unix:.*/edge.sock .*; start it, or correct the address"):
        take(f"unix:{tmp_path}/edge.sock", 0.0)


@pytest.mark.parametrize("address", ["10.0.0.1:80", "example.org:80", "127.0.0.1", "127.0.0.1:x", ""])
def test_adapters_in_the_clear_stay_on_the_machine(address: str) -> None:
    with pytest.raises(PeerError, match=r"use unix:PATH or 127.0.0.1:PORT"):
        place(address)


def test_a_unix_socket_is_its_owners_alone(tmp_path: Path) -> None:
    async def main() -> int:
        async with exchange_at(f"unix:{tmp_path}/edge.sock"):
            return stat.S_IMODE((tmp_path / "edge.sock").stat().st_mode)

    assert asyncio.run(main()) == 0o600


def test_two_that_are_opened_at_once_leave_what_the_process_writes_as_it_was(tmp_path: Path) -> None:
    async def main() -> None:
        both = [Exchange(f"unix:{tmp_path}/{name}.sock", RULES) for name in ("a", "b")]
        await asyncio.gather(*(each.__aenter__() for each in both))
        await asyncio.gather(*(each.__aexit__() for each in both))

    (tmp_path / "before").mkdir()
    asyncio.run(main())
    (tmp_path / "after").mkdir()
    assert (tmp_path / "after").stat().st_mode == (tmp_path / "before").stat().st_mode


def test_a_client_of_every_round_loads_no_torch() -> None:
    code = "import sys, splitllm.federated.parcels, splitllm.federated.calling; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
