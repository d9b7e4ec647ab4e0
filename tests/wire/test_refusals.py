"""Whoever must not come in is told why, over real gRPC, and nobody else notices."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate

from splitllm.errors import CertificateError
from splitllm.wire.certificates import Credentials, load_credentials
from splitllm.wire.frames import Envelope, FrameType, to_frames
from splitllm.wire.issuing import issue
from splitllm.wire.message import Message
from splitllm.wire.remote import CALLS_A_NAME, METHOD, Dialer
from splitllm.wire.signing import Authority, certificate_pem, key_pem, new_key, sign_role
from splitllm.wire.stream import Disconnected, Refused
from splitllm.wire.uplink import RemoteLink
from tests.processes import free_port
from tests.wire.serving import HELLO, Served, dialer, linked, raises, relayed, run, served, until

LAST_YEAR = datetime.now(UTC) - timedelta(days=400)
ASK = Message("forward", "client-1", (0, 0, 0), {"healthy": True})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("certs")
    issue(found / "ours", ["cloud", "edge", "client-0", "client-1"])
    issue(found / "theirs", ["cloud", "client-0"])
    issue(found / "mixed", ["client-0"], days=30, now=LAST_YEAR)
    issue(found / "mixed", ["cloud", "client-1"])
    return found


@pytest.fixture(scope="module")
def certificates(directory: Path) -> Mapping[str, Credentials]:
    ours = {name: load_credentials(directory / "ours", name) for name in ("cloud", "edge", "client-0", "client-1")}
    return {**ours, "foreign cloud": load_credentials(directory / "theirs", "cloud")} | {
        "foreign client": load_credentials(directory / "theirs", "client-0")
    }


def expired(directory: Path, name: str) -> Credentials:
    """What a role would use whose clock is wrong: its own check is passed."""
    folder = directory / "expired"
    if not (folder / name).exists():
        issue(folder, [name], days=30, now=LAST_YEAR)
    return load_credentials(folder, name, now=LAST_YEAR + timedelta(days=1))


@asynccontextmanager
async def beside_a_healthy_client(
    caplog: pytest.LogCaptureFixture,
    credentials: Credentials | None = None,
    own: Credentials | None = None,
    *,
    logged: int = 1,
    **options: Any,
) -> AsyncIterator[Served]:
    """A server with a child that goes on asking while another is refused."""
    caplog.set_level(logging.INFO, "splitllm")
    async with served(credentials=credentials, **options) as server, linked(server.port, "client-1", own) as link:
        over = asyncio.Event()

        async def go_on() -> int:
            count = 0
            while not over.is_set():
                assert (await link.request(ASK)).header == {"healthy": True}
                count += 1
                await asyncio.sleep(0.005)
            return count

        going = asyncio.create_task(go_on())
        await link.welcome()
        yield server
        over.set()
        assert await going > 0 and (await link.request(ASK)).header == {"healthy": True}
        assert [event for event in server.events if event[1] == "client-1"] == [("back", "client-1")]
        warned = [record for record in caplog.records if record.name.startswith("splitllm")]
        assert len([record for record in warned if record.levelno >= logging.WARNING]) == logged, warned


async def turned_away(link: RemoteLink) -> tuple[str, str]:
    """Reason and text with which a link ends; all that waits ends with it."""
    asked = asyncio.create_task(link.request(ASK))
    text = await raises(link.failed, Refused)
    assert await raises(asked, Refused) == text
    with pytest.raises(Refused) as refused:
        link.failed.result()
    return refused.value.reason, text


@pytest.mark.parametrize(
    ("hello", "reason", "text"),
    [
        ({"protocol": 2}, "mismatch", "protocol 2 is not that of this server, 1"),
        ({"protocol": "a\u2028\x00b"}, "mismatch", "protocol a??b is not that of this server, 1"),
        ({"name": "client-9"}, "mismatch", "client-9 does not belong to cloud"),
        ({"recipe": "other"}, "mismatch", "client-0 has another recipe"),
        ({"model": None}, "mismatch", "client-0 has another model"),
        ({"incarnation": 7}, "invalid", "client-0: the hello names no incarnation"),
    ],
)
def test_a_hello_that_does_not_fit(
    caplog: pytest.LogCaptureFixture, hello: Mapping[str, Any], reason: str, text: str
) -> None:
    async def test() -> None:
        async with beside_a_healthy_client(caplog) as server, linked(server.port) as link:
            link._hello.update(hello)
            assert await turned_away(link) == (reason, text)
            assert server.sessions.refused == {reason: 1}

    run(test)


async def _read_all(stream: Any) -> None:
    while await stream.read() is not None:
        pass


async def said(port: int, *frames: bytes) -> str:
    """What a peer is told that sends such frames."""
    sloppy = dialer(port)
    sloppy._options = [option for option in sloppy._options if option[0] != "grpc.max_send_message_length"]
    async with sloppy.dial() as stream:
        reading = asyncio.create_task(_read_all(stream))
        with pytest.raises(Refused) as refused:  # noqa: PT012
            for frame in frames:
                await stream.write(frame)
            await reading
        await asyncio.wait({reading})
        assert str(reading.exception()) == str(refused.value)
    return f"{refused.value.reason}: {refused.value}"


REQUEST = to_frames(Envelope(FrameType.REQUEST, 1, {"kind": "forward"}))[0]
WHOLE_HELLO = to_frames(Envelope(FrameType.HELLO, 0, {**HELLO, "protocol": 1, "incarnation": "x"}))[0]


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([b"GET / HTTP/1.1"], "invalid: frame: found 14 bytes; expected a header of 32"),
        ([b"\0" * 64], "invalid: frame: found magic"),
        ([b""], "invalid: frame: found 0 bytes"),
        ([REQUEST], "invalid: a connection begins with a hello"),
        ([WHOLE_HELLO, b"x" * 40], "invalid: frame: found magic"),
        ([WHOLE_HELLO, REQUEST], "invalid: client-0: request 1 has micro_batch None"),
        ([WHOLE_HELLO, WHOLE_HELLO], "invalid: client-0 sent hello where only requests and a goodbye are due"),
        ([b"x" * (2**20 + 1)], "invalid: cloud at 127.0.0.1:"),
        ([WHOLE_HELLO, b"x" * (2**20 + 1)], "invalid: cloud at 127.0.0.1:"),
        ([WHOLE_HELLO, b"x" * 40, *[b"x" * 2**20] * 30], "invalid: frame: found magic"),
    ],
)
def test_garbage(caplog: pytest.LogCaptureFixture, frames: list[bytes], text: str) -> None:
    before_python = len(frames[-1]) > 2**20 and len(frames) > 1

    async def test() -> None:
        async with beside_a_healthy_client(caplog, logged=0 if before_python else 1) as server:
            assert (await said(server.port, *frames)).startswith(text)

    run(test)


def test_silence_instead_of_a_hello(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with beside_a_healthy_client(caplog, hello_seconds=0.2) as server:  # noqa: SIM117
            async with dialer(server.port).dial() as stream:
                assert await raises(stream.read(), Refused) == "no hello within 0.2 seconds"

    run(test)


def test_calls_of_one_certificate_leave_the_others_their_places(
    caplog: pytest.LogCaptureFixture, certificates: Mapping[str, Credentials]
) -> None:
    async def test() -> None:
        async with beside_a_healthy_client(caplog, certificates["cloud"], certificates["client-1"], logged=2) as server:
            async with AsyncExitStack() as stack:
                dial = dialer(server.port, certificates["client-0"]).dial
                silent = [await stack.enter_async_context(dial()) for _ in range(CALLS_A_NAME)]
                await until(lambda: server.listener._calls["client-0", METHOD] == CALLS_A_NAME)
                for _ in range(3):
                    async with dial() as stream:
                        text = "2 calls of client-0 are open already; end one of them, or try again"
                        assert (await raises(stream.read(), Disconnected)).endswith(text)
                async with linked(server.port, "edge", certificates["edge"]) as link:
                    link._hello["name"] = "client-2"
                    assert (await turned_away(link))[0] == "identity", "another is heard"
                await silent[0].write(WHOLE_HELLO)
                assert await silent[0].read() is not None, "and so is one of the silent, if it speaks"
            await until(lambda: server.listener._calls.total() == 1)

    run(test)


def test_a_second_process_of_one_name_is_held_then_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with beside_a_healthy_client(caplog, logged=2) as server:
            states: list[str] = []
            async with linked(server.port, "client-1", patience=0.2, states=states) as second:
                reason, text = await turned_away(second)
            assert reason == "taken" and text.startswith("another process is connected as client-1")
            assert states == [text] and server.sessions.refused["taken"] >= 2
            caplog.records[:] = [r for r in caplog.records if r.levelno < logging.WARNING] + [
                r for r in caplog.records if r.levelno >= logging.WARNING
            ][:2]

    run(test)


def test_the_same_name_is_let_in_once_the_first_is_gone() -> None:
    async def test() -> None:
        async with served() as server, relayed(server.port) as relay, linked(relay.listen[1]) as first:
            await first.welcome()
            async with linked(server.port) as second:
                await asyncio.sleep(0.3)
                assert server.sessions.refused["taken"] >= 1
                relay.refuse(1.0)  # as if it had been killed
                assert (await second.welcome())["batch_size"] == 7
            assert server.events == [("back", "client-0"), ("away", "client-0"), ("back", "client-0")]

    run(test)


def test_a_certificate_of_another_name(
    caplog: pytest.LogCaptureFixture, certificates: Mapping[str, Credentials]
) -> None:
    async def test() -> None:
        async with beside_a_healthy_client(caplog, certificates["cloud"], certificates["client-1"]) as server:
            async with linked(server.port, "client-0", certificates["edge"]) as link:
                reason, text = await turned_away(link)
            assert reason == "identity"
            assert text == "the certificate is that of edge, but the process says that it is client-0"

    run(test)


def test_a_server_of_another_name_or_authority(
    caplog: pytest.LogCaptureFixture, certificates: Mapping[str, Credentials], directory: Path
) -> None:
    cases: list[tuple[Credentials, str]] = [
        (certificates["edge"], "its certificate is that of another role; check wire.addresses"),
        (certificates["foreign cloud"], "its certificate is not of the CA that this role trusts"),
    ]

    async def test() -> None:
        for credentials, expected in cases:
            async with (
                served(credentials=credentials) as server,
                linked(server.port, credentials=certificates["client-0"]) as link,
            ):
                reason, text = await turned_away(link)
            assert reason == "identity" and text.startswith(f"cloud at 127.0.0.1:{server.port}: {expected}")

    run(test)


def test_a_server_whose_certificate_has_expired(directory: Path) -> None:
    async def test() -> None:
        late = expired(directory, "cloud")
        issue(directory / "expired", ["client-0"], days=30, now=LAST_YEAR)
        theirs = load_credentials(directory / "expired", "client-0", now=LAST_YEAR + timedelta(days=1))
        async with served(credentials=late) as server, linked(server.port, credentials=theirs) as link:
            reason, text = await turned_away(link)
        assert reason == "identity" and "its certificate has expired; renew it there with splitllm certs" in text

    run(test)


def test_an_expired_certificate_of_ones_own_is_found_before_dialling(directory: Path) -> None:
    expired(directory, "cloud")
    with pytest.raises(CertificateError, match=r"cert\.pem expired on .* UTC: run splitllm certs"):
        load_credentials(directory / "expired", "cloud")


HINT = "does not accept the certificate of this role: it must be of the same CA and not expired"


def test_a_client_that_the_server_does_not_trust(
    caplog: pytest.LogCaptureFixture, certificates: Mapping[str, Credentials]
) -> None:
    """TLS 1.3 tells a client only that the connection closed; so the link goes on trying, and says what it may be."""
    foreign, ours = certificates["foreign client"], certificates["client-0"]
    stranger = Credentials("client-0", ours.authority, foreign.certificate, foreign.key, ours.expires)

    async def test() -> None:
        async with beside_a_healthy_client(caplog, certificates["cloud"], certificates["client-1"], logged=0) as server:
            states: list[str] = []
            async with linked(server.port, credentials=stranger, states=states):
                await until(lambda: any(HINT in state for state in states))
            assert ("back", "client-0") not in server.events and "connected" not in states

    run(test)


def test_a_client_whose_certificate_has_expired(caplog: pytest.LogCaptureFixture, directory: Path) -> None:
    """One whose clock is wrong, or it would not have dialled; it is told what TLS lets it know."""
    mixed = directory / "mixed"
    late = load_credentials(mixed, "client-0", now=LAST_YEAR + timedelta(days=1))

    async def test() -> None:
        own = load_credentials(mixed, "client-1")
        async with beside_a_healthy_client(caplog, load_credentials(mixed, "cloud"), own, logged=0) as server:
            states: list[str] = []
            async with linked(server.port, credentials=late, states=states):
                await until(lambda: any(HINT in state for state in states))
            assert ("back", "client-0") not in server.events and "connected" not in states

    run(test)


def test_a_certificate_that_names_no_role(
    caplog: pytest.LogCaptureFixture, certificates: Mapping[str, Credentials], directory: Path
) -> None:
    ours, key, now = directory / "ours", new_key(), datetime.now(UTC)
    authority_key = load_pem_private_key((ours / "ca.key").read_bytes(), None)
    assert isinstance(authority_key, EllipticCurvePrivateKey)
    authority = Authority(load_pem_x509_certificate((ours / "ca.pem").read_bytes()), authority_key)
    certificate = certificate_pem(sign_role("no.role", key, authority, now, now + timedelta(days=1)))
    nameless = replace(certificates["client-0"], certificate=certificate, key=key_pem(key))

    async def test() -> None:
        async with beside_a_healthy_client(caplog, certificates["cloud"], certificates["client-1"]) as server:
            async with linked(server.port, credentials=nameless) as link:
                found = await turned_away(link)
            assert found == ("identity", "the certificate names no role; issue it with splitllm certs")
            assert server.sessions.refused == {"identity": 1}

    run(test)


def test_no_certificate_at_all(caplog: pytest.LogCaptureFixture, certificates: Mapping[str, Credentials]) -> None:
    async def test() -> None:
        async with beside_a_healthy_client(caplog, certificates["cloud"], certificates["client-1"], logged=0) as server:
            states: list[str] = []
            async with linked(server.port, states=states):
                await until(lambda: len(states) > 0)
            assert ("back", "client-0") not in server.events and "connected" not in states
            assert "cloud at 127.0.0.1" in states[0]

    run(test)


def test_tls_towards_a_server_without_it(
    caplog: pytest.LogCaptureFixture, certificates: Mapping[str, Credentials]
) -> None:
    async def test() -> None:
        async with beside_a_healthy_client(caplog, logged=0) as server:  # noqa: SIM117
            async with linked(server.port, credentials=certificates["client-0"]) as link:
                reason, text = await turned_away(link)
        assert reason == "identity" and "it speaks no TLS; give it wire.certificates" in text

    run(test)


def test_a_server_of_something_else() -> None:
    async def test() -> None:
        import grpc

        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with linked(port) as link:
            assert await turned_away(link) == ("mismatch", f"127.0.0.1:{port} is no splitllm server")
        await server.stop(0)

    run(test)


def test_nobody_listening_is_no_refusal() -> None:
    async def test() -> None:
        async with Dialer(f"127.0.0.1:{free_port()}", "cloud", None, 10.0).dial() as stream:
            assert "Connection refused" in await raises(stream.read(), Disconnected)

    run(test)


@pytest.mark.parametrize("kind", ["check", "answer", "defect"])
def test_a_request_that_breaks_the_protocol(caplog: pytest.LogCaptureFixture, kind: str) -> None:
    from splitllm.errors import PeerError

    def check(message: Message) -> None:
        if kind == "check" and message.sender == "client-0":
            raise PeerError("client-0 sent nonsense " + "ü" * 5000)

    async def answer(message: Message) -> Message:
        if message.sender == "client-0" and kind == "answer":
            raise PeerError("client-0 sent nonsense " + "ü" * 5000)
        if message.sender == "client-0":
            raise ZeroDivisionError
        return Message("forward", "cloud", (0, 0, 0), message.header)

    async def test() -> None:
        logged = 2 if kind == "defect" else 1
        async with beside_a_healthy_client(caplog, answer=answer, check=check, logged=logged) as server:
            async with linked(server.port) as link:
                reason, text = await turned_away(link)
            if kind == "defect":
                assert reason == "internal"
                assert text == "forward of client-0 failed with ZeroDivisionError; see the server's log"
            else:
                assert reason == "invalid" and text.startswith("client-0 sent nonsense ü") and len(text) == 600

    run(test, expected=("splitllm.wire.sessions",))
