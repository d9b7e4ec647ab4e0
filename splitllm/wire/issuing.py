"""A private certificate authority: one certificate a role, one folder a machine.

`DIR/ca.pem` and `DIR/ca.key` are the authority; `DIR/NAME/` is all that the machine of a role needs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from splitllm.errors import CertificateError
from splitllm.wire.certificates import (
    AUTHORITY,
    CERTIFICATE,
    FILES,
    KEY,
    NEW_AUTHORITY,
    check_dates,
    check_role_name,
    is_issued_by,
    parse_certificate,
)
from splitllm.wire.signing import Authority, certificate_pem, key_pem, new_key, sign_authority, sign_role

AUTHORITY_KEY = "ca.key"
AUTHORITY_DAYS = 3650
MOST_DAYS = 36500
_UNFINISHED = ".issuing"


def issue(
    directory: Path, names: Sequence[str], *, days: int = 365, renew: bool = False, now: datetime | None = None
) -> list[str]:
    """Make the authority if there is none, and a folder for every role that has none.

    A certificate ends with its authority, if that is sooner. A folder appears whole or not at all.

    Args:
        directory: made if need be; `ca.key` in it stays at home.
        names: of roles.
        days: until a new certificate expires; the authority lasts 10 years, or as long as that if that is longer.
        renew: replace the key and certificate of roles that have them.
        now: aware; the present time unless given.

    Returns:
        The names issued, in the order given.

    Raises:
        CertificateError: a name is no role's or comes twice, `days` is out of range, the authority is broken or
            expired, or what lies in a role's place is not this authority's.
        OSError: the folder cannot be written.
    """
    _check_request(names, days)
    now = now or datetime.now(UTC)
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        authority = _authority(directory, now, max(days, AUTHORITY_DAYS))
        for name in names:
            _check_place(directory / name, authority.certificate, renew)
        wanted = [name for name in names if renew or not (directory / name).exists()]
        for name in wanted:
            _issue_one(directory, name, authority, now, days)
    return wanted


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Let nobody else issue here meanwhile, and remove what one who was stopped left."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for unfinished in directory.glob(f".*{_UNFINISHED}"):
            shutil.rmtree(unfinished)
        yield
    finally:
        os.close(descriptor)


def _check_request(names: Sequence[str], days: int) -> None:
    for name in names:
        check_role_name(name)
    folded = [name.lower() for name in names]
    for name in names:
        if folded.count(name.lower()) > 1:  # TLS compares names without case
            raise CertificateError(f"{name} is named twice (upper and lower case are one in TLS): rename a role")
    if not 1 <= days <= MOST_DAYS:
        raise CertificateError(f"days is {days}: give 1 to {MOST_DAYS}")


def _authority(directory: Path, now: datetime, days: int) -> Authority:
    key_path, path = directory / AUTHORITY_KEY, directory / AUTHORITY
    if path.exists() and not key_path.exists():
        raise CertificateError(f"{key_path} is missing beside {AUTHORITY}: issue where it is, or {NEW_AUTHORITY}")
    if not key_path.exists():
        _write(key_path, key_pem(new_key()), 0o600)
    key = _load_key(key_path)
    if not path.exists():  # the key alone was left by a run that was stopped: its certificates stay good
        _write(path, certificate_pem(sign_authority(key, now, now + timedelta(days))), 0o644)
    certificate = parse_certificate(path, path.read_bytes(), NEW_AUTHORITY)
    if certificate.public_key() != key.public_key():
        raise CertificateError(f"{key_path} does not belong to {AUTHORITY} beside it: {NEW_AUTHORITY}")
    check_dates(path, certificate, now, NEW_AUTHORITY)
    return Authority(certificate, key)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{path} holds no elliptic-curve key in PEM without password: {NEW_AUTHORITY}")
    return key


def _check_place(folder: Path, authority: x509.Certificate, renew: bool) -> None:
    """What lies where a role's folder belongs must be one; unless it is renewed, also one of this authority."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir() or {path.name for path in folder.iterdir()} - set(FILES):
        raise CertificateError(f"{folder} is no folder of splitllm certs: move it away")
    if renew:
        return
    again = f"run splitllm certs {folder.parent} RECIPE --renew {folder.name}"
    for file in FILES:
        if not (folder / file).is_file():
            raise CertificateError(f"{folder / file} is missing: {again}")
    path = folder / CERTIFICATE
    if not is_issued_by(parse_certificate(path, path.read_bytes(), again), authority):
        raise CertificateError(f"{path} is not signed by {folder.parent / AUTHORITY}: {again}")


def _issue_one(directory: Path, name: str, authority: Authority, now: datetime, days: int) -> None:
    key = new_key()
    end = min(now + timedelta(days), authority.certificate.not_valid_after_utc)
    certificate = sign_role(name, key, authority, now, end)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=_UNFINISHED, dir=directory))  # for this user alone
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir(mode=0o700)
        _write(new / AUTHORITY, certificate_pem(authority.certificate), 0o644)
        _write(new / CERTIFICATE, certificate_pem(certificate), 0o644)
        _write(new / KEY, key_pem(key), 0o600)
        if (directory / name).exists():
            os.replace(directory / name, old)
        os.replace(new, directory / name)
    finally:
        shutil.rmtree(temporary)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file whole or not at all, with these rights from its first byte."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
