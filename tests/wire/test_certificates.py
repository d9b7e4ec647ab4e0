"""Certificates are issued once, refused at home for every fault, and tell gRPC's ends who the other is."""

from __future__ import annotations

import asyncio
import logging
import shutil
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from splitllm.errors import CertificateError
from splitllm.wire.certificates import FILES, Credentials, load_credentials, peer_name
from splitllm.wire.issuing import issue
from splitllm.wire.signing import new_key

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
NAMES = ["cloud", "edge-0", "client-1", "client-2"]


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders nobody changes."""
    directory = tmp_path_factory.mktemp("issued")
    issue(directory, NAMES, now=NOW - 5 * DAY)
    return directory


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same names from another authority."""
    directory = tmp_path_factory.mktemp("foreign")
    issue(directory, NAMES)
    return directory


@pytest.fixture
def copied(issued: Path, tmp_path: Path) -> Path:
    """Folders a test may spoil."""
    shutil.copytree(issued, tmp_path / "tls")
    return tmp_path / "tls"


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


# Issuing


def test_a_folder_a_role_and_keys_are_for_their_owner_alone(issued: Path) -> None:
    roles = {f"{name}/{file}" for name in NAMES for file in FILES}
    assert set(content(issued)) == roles | {"ca.pem", "ca.key"}
    assert {path.name for path in issued.iterdir()} == {"ca.pem", "ca.key", *NAMES}  # and nothing unfinished
    assert mode(issued / "ca.key") == 0o600
    for name in NAMES:
        assert mode(issued / name) == 0o700 and mode(issued / name / "key.pem") == 0o600
        assert (issued / name / "ca.pem").read_bytes() == (issued / "ca.pem").read_bytes()


def test_a_certificate_serves_both_ends_and_signs_nothing(issued: Path) -> None:
    role, authority = certificate(issued / "edge-0" / "cert.pem"), certificate(issued / "ca.pem")
    assert role.subject.rfc4514_string() == "CN=edge-0"
    found = {type(entry.value).__name__: entry for entry in role.extensions}
    assert found["SubjectAlternativeName"].value.get_values_for_type(x509.DNSName) == ["edge-0"]
    assert [usage._name for usage in found["ExtendedKeyUsage"].value] == ["serverAuth", "clientAuth"]
    assert found["BasicConstraints"].critical and not found["BasicConstraints"].value.ca
    assert found["KeyUsage"].critical and not found["KeyUsage"].value.key_cert_sign
    limits = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert limits.critical and limits.value == x509.BasicConstraints(ca=True, path_length=0)
    signer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert found["AuthorityKeyIdentifier"].value.key_identifier == signer.digest


def test_dates_leave_room_for_a_slow_clock_and_end_with_the_authority(tmp_path: Path) -> None:
    issue(tmp_path, ["a", "b"], days=30, now=NOW)
    issue(tmp_path, ["late"], days=365, now=NOW + 3640 * DAY)
    role, authority = certificate(tmp_path / "a" / "cert.pem"), certificate(tmp_path / "ca.pem")
    assert NOW - role.not_valid_before_utc >= timedelta(minutes=5)
    assert role.not_valid_after_utc == (NOW + 30 * DAY).replace(microsecond=0)
    assert authority.not_valid_after_utc == (NOW + 3650 * DAY).replace(microsecond=0)
    assert certificate(tmp_path / "late" / "cert.pem").not_valid_after_utc == authority.not_valid_after_utc
    assert load_credentials(tmp_path, "a", NOW).expires == role.not_valid_after_utc


def test_an_authority_lasts_as_long_as_what_it_signs(tmp_path: Path) -> None:
    issue(tmp_path, ["a"], days=5000, now=NOW)
    assert certificate(tmp_path / "ca.pem").not_valid_after_utc == (NOW + 5000 * DAY).replace(microsecond=0)


def test_issued_roles_are_left_alone_and_new_ones_added(copied: Path) -> None:
    before = content(copied)
    assert issue(copied, [*NAMES, "client-3"]) == ["client-3"]
    after = content(copied)
    assert {path: after[path] for path in before} == before
    assert load_credentials(copied, "client-3").authority == load_credentials(copied, "cloud").authority


def test_renewal_replaces_key_and_certificate_of_the_named_alone(copied: Path) -> None:
    before = content(copied)
    assert issue(copied, ["client-1"], renew=True, days=500) == ["client-1"]
    after = content(copied)
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {"client-1/cert.pem", "client-1/key.pem"} and set(after) == set(before)
    assert load_credentials(copied, "client-1").expires > NOW + 499 * DAY


def test_roles_issued_before_a_lost_authority_certificate_stay_good(copied: Path) -> None:
    (copied / "ca.pem").unlink()  # as after a stop between key and certificate
    assert issue(copied, [*NAMES, "client-3"]) == ["client-3"]
    old, new = copied / "cloud", copied / "client-3"
    shutil.copy(new / "ca.pem", old / "ca.pem")
    assert load_credentials(old, "cloud")


def test_what_a_stopped_run_left_is_removed(copied: Path) -> None:
    (copied / ".client-1.x.issuing" / "new").mkdir(parents=True)
    (copied / ".client-1.x.issuing" / "new" / "key.pem").write_text("secret")
    assert issue(copied, NAMES) == []
    assert not list(copied.glob(".*"))


def test_two_who_issue_at_once_agree_on_one_authority(tmp_path: Path) -> None:
    results: list[list[str]] = []
    threads = [threading.Thread(target=lambda: results.append(issue(tmp_path, NAMES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, results)) == [0, 0, 0, len(NAMES)]
    assert len({load_credentials(tmp_path, name).authority for name in NAMES}) == 1


NO_NAMES = ["", ".", "..", "../cloud", "a/b", "/etc", "1st", "-x", "a.b", "a b", "a\n", "a\0", "ä", "*", "x" * 64]


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_are_no_roles_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(CertificateError, match="is no role's name"):
        issue(tmp_path / "tls", ["cloud", name])
    with pytest.raises(CertificateError, match="is no role's name"):
        load_credentials(tmp_path, name)
    assert not list(tmp_path.iterdir())


def _file_in_place(directory: Path) -> None:
    (directory / "new").write_text("mine")


def _link_in_place(directory: Path) -> None:
    (directory / "new").symlink_to(directory / "cloud")


def _strange_file(directory: Path) -> None:
    (directory / "cloud" / "notes.txt").write_text("mine")


UNISSUABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a key of another": (lambda at: shutil.copy(at / "cloud" / "key.pem", at / "ca.key"), "does not belong to ca.pem"),
    "no key": (lambda at: (at / "ca.key").unlink(), "ca.key is missing beside ca.pem"),
    "no key in the file": (lambda at: (at / "ca.key").write_text("x"), "ca.key holds no elliptic-curve key"),
    "no certificate": (lambda at: (at / "ca.pem").write_text("x"), "ca.pem holds no certificate in PEM"),
    "half a role": (lambda at: (at / "cloud" / "key.pem").unlink(), r"key.pem is missing: .* --renew cloud"),
    "a file": (_file_in_place, "new is no folder of splitllm certs: move it away"),
    "a link": (_link_in_place, "new is no folder of splitllm certs: move it away"),
    "a file beside": (_strange_file, "cloud is no folder of splitllm certs: move it away"),
}


@pytest.mark.parametrize("fault", UNISSUABLE)
def test_a_broken_folder_is_named_and_left_as_it_is(copied: Path, fault: str) -> None:
    spoil, complaint = UNISSUABLE[fault]
    spoil(copied)
    before = content(copied)
    with pytest.raises(CertificateError, match=complaint) as caught:
        issue(copied, [*NAMES, "new"])
    assert "\n" not in str(caught.value) and content(copied) == before


def test_roles_of_another_authority_are_refused_until_renewed(copied: Path, foreign: Path) -> None:
    shutil.rmtree(copied / "cloud")
    shutil.copytree(foreign / "cloud", copied / "cloud")
    with pytest.raises(CertificateError, match=r"cloud/cert.pem is not signed by .*ca.pem: .* --renew cloud"):
        issue(copied, NAMES)
    assert issue(copied, ["cloud"], renew=True) == ["cloud"]
    assert issue(copied, NAMES) == []


def test_an_expired_authority_signs_nothing(copied: Path) -> None:
    with pytest.raises(CertificateError, match=r"ca.pem expired on .*: move the folder away"):
        issue(copied, ["client-1"], renew=True, now=NOW + 3651 * DAY)


@pytest.mark.parametrize("names", [["a", "a"], ["edge-0", "Edge-0"]])
def test_names_that_tls_cannot_tell_apart_are_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(CertificateError, match="named twice"):
        issue(tmp_path, names)


@pytest.mark.parametrize("days", [0, -1, 36501, 10**9])
def test_days_out_of_range_are_refused(tmp_path: Path, days: int) -> None:
    with pytest.raises(CertificateError, match=f"days is {days}: give 1 to 36500"):
        issue(tmp_path, ["a"], days=days)


# Loading


def test_the_whole_folder_and_the_role_s_own_are_read_alike(issued: Path) -> None:
    assert load_credentials(issued, "cloud") == load_credentials(issued / "cloud", "cloud")


def test_credentials_do_not_print_their_key(issued: Path) -> None:
    credentials = load_credentials(issued, "cloud")
    assert "PRIVATE" in credentials.key.decode() and "PRIVATE" not in repr(credentials)


def _swap(file: str) -> Callable[[Path, Path], object]:
    return lambda at, foreign: shutil.copy(foreign / "client-2" / file, at / "client-2" / file)


def _encrypt(at: Path, _: Path) -> None:
    pem = new_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (at / "client-2" / "key.pem").write_bytes(pem)


def _other_folder(at: Path, _: Path) -> None:
    shutil.rmtree(at / "client-2")
    shutil.copytree(at / "client-1", at / "client-2")


def _folder_for_key(at: Path, _: Path) -> None:
    (at / "client-2" / "key.pem").unlink()
    (at / "client-2" / "key.pem").mkdir()


def _no_authority(at: Path, _: Path) -> None:
    shutil.copy(at / "client-1" / "cert.pem", at / "client-2" / "ca.pem")


AGAIN = "run splitllm certs DIR RECIPE --renew client-2"
FAULTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no folder": (
        lambda at, _: shutil.rmtree(at / "client-2"),
        "has no folder client-2: run splitllm certs DIR RECIPE",
    ),
    "no authority": (lambda at, _: (at / "client-2" / "ca.pem").unlink(), f"ca.pem is missing: {AGAIN}"),
    "no certificate": (lambda at, _: (at / "client-2" / "cert.pem").unlink(), f"cert.pem is missing: {AGAIN}"),
    "no key": (lambda at, _: (at / "client-2" / "key.pem").unlink(), f"key.pem is missing: {AGAIN}"),
    "a folder": (_folder_for_key, r"key.pem cannot be read \(Is a directory\)"),
    "empty authority": (
        lambda at, _: (at / "client-2" / "ca.pem").write_text(""),
        "ca.pem holds no certificate in PEM",
    ),
    "no PEM": (
        lambda at, _: (at / "client-2" / "cert.pem").write_bytes(b"\xff\0"),
        "cert.pem holds no certificate in PEM",
    ),
    "no PEM key": (lambda at, _: (at / "client-2" / "key.pem").write_text("x"), "key.pem holds no private key in PEM"),
    "encrypted": (_encrypt, "key.pem is encrypted"),
    "other role": (_other_folder, f"cert.pem is that of client-1, not client-2: {AGAIN}"),
    "other authority": (_swap("ca.pem"), f"cert.pem is not signed by ca.pem beside it: {AGAIN}"),
    "no authority's": (_no_authority, f"ca.pem is no authority's certificate, or damaged: {AGAIN}"),
    "other certificate": (_swap("cert.pem"), f"cert.pem is not signed by ca.pem beside it: {AGAIN}"),
    "other key": (_swap("key.pem"), f"key.pem does not belong to cert.pem beside it: {AGAIN}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_own_line(copied: Path, foreign: Path, fault: str) -> None:
    spoil, complaint = FAULTS[fault]
    spoil(copied, foreign)
    with pytest.raises(CertificateError, match=complaint) as caught:
        load_credentials(copied, "client-2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        (NOW + 366 * DAY, r"cert.pem expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC: .* --renew client-2"),
        (NOW + 3651 * DAY, "ca.pem expired on .* move the folder away"),
        (NOW - 6 * DAY, "ca.pem is valid from .* set the clock"),
    ],
)
def test_certificates_out_of_date_are_refused(issued: Path, now: datetime, complaint: str) -> None:
    with pytest.raises(CertificateError, match=complaint):
        load_credentials(issued, "client-2", now)


def test_a_key_that_others_can_read_is_used_with_a_warning(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_credentials(copied, "cloud")
    assert not caplog.records
    key = copied / "cloud" / "key.pem"
    key.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        load_credentials(copied, "cloud")
    complaint = f"{key} can be read by other users (mode 644): chmod 600 {key}"
    assert [record.getMessage() for record in caplog.records] == [complaint]


@given(file=st.sampled_from(FILES), at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_a_spoilt_byte_is_a_complaint_or_harmless(issued: Path, file: str, at: float, byte: int, cut: bool) -> None:
    spoilt = issued.with_name("spoilt")
    shutil.rmtree(spoilt, ignore_errors=True)
    shutil.copytree(issued / "cloud", spoilt)
    whole = bytearray((spoilt / file).read_bytes())
    place = int(at * len(whole))
    whole[place:] = bytes([byte]) + (b"" if cut else whole[place + 1 :])
    (spoilt / file).write_bytes(whole)
    with suppress(CertificateError):  # and nothing else
        assert load_credentials(spoilt, "cloud").name == "cloud"


@pytest.mark.parametrize("common", [[], [b"cloud", b"client-1"], [b"../x"], [b"\xff"], [b""], [b"a\n"]])
def test_a_peer_without_exactly_one_role_s_name_has_none(common: list[bytes]) -> None:
    assert peer_name({"x509_common_name": common}) is None


# With real gRPC


def credentials_of(folder: Path) -> Credentials:
    """Read without any check, as a peer that does not care would."""
    authority, own, key = ((folder / file).read_bytes() for file in FILES)
    return Credentials(folder.name, authority, own, key, NOW)


def channel_credentials(own: Credentials) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)


async def who(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    return str(peer_name(context.auth_context())).encode()


async def start(own: Credentials) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server()
    methods = {"who": grpc.unary_unary_rpc_method_handler(who)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
    shown = grpc.ssl_server_credentials([(own.key, own.certificate)], own.authority, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", shown)
    await server.start()
    return server, port


async def ask(port: int, own: grpc.ChannelCredentials | None, expected: str) -> str:
    address, options = f"127.0.0.1:{port}", [("grpc.ssl_target_name_override", expected)]
    async with grpc.aio.secure_channel(address, own, options) if own else grpc.aio.insecure_channel(address) as channel:
        return bytes(await channel.unary_unary("/test/who")(b"", timeout=10)).decode()


def answer(server: Credentials, client: Any, expected: str) -> str:
    """What a server says the client's name is."""

    async def run() -> str:
        running, port = await start(server)
        try:
            return await ask(port, client, expected)
        finally:
            await running.stop(0)

    return asyncio.run(run())


def refusal(server: Credentials, client: Any, expected: str) -> tuple[str, float]:
    """Details and seconds of a call that must fail as unavailable."""
    begin = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        answer(server, client, expected)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(caught.value.details()), time.monotonic() - begin


@pytest.fixture(scope="module")
def expired(issued: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two roles of the good authority whose time is over."""
    directory = tmp_path_factory.mktemp("expired")
    shutil.copytree(issued, directory, dirs_exist_ok=True)
    issue(directory, ["cloud", "client-1"], renew=True, days=1, now=NOW - 2 * DAY)
    return directory


def test_each_end_knows_the_other_by_name(issued: Path) -> None:
    cloud = load_credentials(issued, "cloud")
    for name in ("client-1", "edge-0"):
        assert answer(cloud, channel_credentials(load_credentials(issued, name)), "cloud") == name


@pytest.mark.parametrize("name", ["Edge_A-0", "edge_", "UPPER-1", "x" * 63])
def test_every_role_s_name_works_as_a_tls_name(tmp_path: Path, name: str) -> None:
    issue(tmp_path, [name])
    own = load_credentials(tmp_path, name)
    assert answer(own, channel_credentials(own), name) == name


def test_a_renewed_role_is_taken_by_those_that_were_not(copied: Path) -> None:
    cloud = load_credentials(copied, "cloud")
    issue(copied, ["client-1"], renew=True)
    assert answer(cloud, channel_credentials(load_credentials(copied, "client-1")), "cloud") == "client-1"


REFUSED_BY_SERVER = "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:"


def test_a_server_refuses_strangers_at_once_without_saying_why(issued: Path, foreign: Path, expired: Path) -> None:
    cloud, stranger = credentials_of(issued / "cloud"), credentials_of(foreign / "client-1")
    clients = [
        grpc.ssl_channel_credentials(cloud.authority),
        channel_credentials(replace(stranger, authority=cloud.authority)),
        channel_credentials(credentials_of(expired / "client-1")),
        None,  # no TLS at all
    ]
    for client in clients:
        details, seconds = refusal(cloud, client, "cloud")
        assert details.startswith(REFUSED_BY_SERVER) and seconds < 5


def test_a_client_refuses_the_wrong_server_and_says_why(issued: Path, foreign: Path, expired: Path) -> None:
    own = channel_credentials(load_credentials(issued, "client-1"))
    cases = [
        (foreign / "cloud", "cloud", "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate"),
        (expired / "cloud", "cloud", "CERTIFICATE_VERIFY_FAILED: certificate has expired"),
        (issued / "cloud", "edge-0", "Hostname Verification Check failed"),
        (issued / "client-2", "cloud", "Hostname Verification Check failed"),
    ]
    for folder, expected, reason in cases:
        details, seconds = refusal(credentials_of(folder), own, expected)
        assert reason in details and seconds < 5


def test_nobody_there_reads_differently_from_a_refusal(issued: Path) -> None:
    async def run() -> str:
        server, port = await start(load_credentials(issued, "cloud"))
        await server.stop(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(port, channel_credentials(load_credentials(issued, "client-1")), "cloud")
        return str(caught.value.details())

    assert "Failed to connect to remote host: Connection refused" in asyncio.run(run())
