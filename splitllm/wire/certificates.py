"""A role's credentials for mutual TLS: read from its folder, and checked before anything is dialled.

`NAME/` holds `ca.pem`, `cert.pem` and `key.pem`; the name in the certificate is the role's identity.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from splitllm.errors import CertificateError

logger = logging.getLogger(__name__)

AUTHORITY, CERTIFICATE, KEY = FILES = ("ca.pem", "cert.pem", "key.pem")
NEW_AUTHORITY = "move the folder away, issue all again (splitllm certs DIR RECIPE) and copy every role's folder"
_ROLE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")  # 63: the longest DNS label; a common name may have 64


@dataclass(frozen=True)
class Credentials:
    """What gRPC needs to prove who a role is, and to check its peers; PEM.

    Attributes:
        name: of the role, as in the certificate.
        authority: the certificate that peers' certificates must be signed by.
        certificate: the role's own.
        key: its private key.
        expires: the first moment at which certificate or authority is no longer valid, UTC.
    """

    name: str
    authority: bytes
    certificate: bytes
    key: bytes
    expires: datetime

    def __repr__(self) -> str:
        return f"Credentials(name={self.name!r}, expires={self.expires:%Y-%m-%d})"  # a key does not go into logs


def check_role_name(name: str) -> None:
    """Refuse what is no role's name, and with it every way out of the folder.

    Raises:
        CertificateError: it is none.
    """
    if not _ROLE_NAME.fullmatch(name):
        raise CertificateError(
            f"{name!r} is no role's name: a letter, then letters, digits, - and _, at most 63 characters"
        )


def load_credentials(directory: Path, name: str, now: datetime | None = None) -> Credentials:
    """Read a role's folder and check all that can be checked without a peer.

    A key that others can read is used, with a warning.

    Args:
        directory: what `issue` wrote, or the one folder of this role that was copied from it.
        name: of the role.
        now: aware; the present time unless given.

    Raises:
        CertificateError: something is missing, unreadable, of another name, of another authority, or out of date.
    """
    check_role_name(name)
    folder = _folder_of(directory, name)
    content = {file: _read(folder / file, name) for file in FILES}
    authority = parse_certificate(folder / AUTHORITY, content[AUTHORITY], _again(name))
    certificate = parse_certificate(folder / CERTIFICATE, content[CERTIFICATE], _again(name))
    key = _parse_key(folder / KEY, content[KEY], name)
    if not is_issued_by(authority, authority):
        raise CertificateError(f"{folder / AUTHORITY} is no authority's certificate, or damaged: {_again(name)}")
    if not is_issued_by(certificate, authority):
        raise CertificateError(f"{folder / CERTIFICATE} is not signed by {AUTHORITY} beside it: {_again(name)}")
    _check_identity(folder / CERTIFICATE, certificate, name)
    if key.public_key() != certificate.public_key():
        raise CertificateError(f"{folder / KEY} does not belong to {CERTIFICATE} beside it: {_again(name)}")
    now = now or datetime.now(UTC)
    check_dates(folder / AUTHORITY, authority, now, NEW_AUTHORITY)
    check_dates(folder / CERTIFICATE, certificate, now, _again(name))
    _warn_if_open(folder / KEY)
    expires = min(authority.not_valid_after_utc, certificate.not_valid_after_utc)
    return Credentials(name, content[AUTHORITY], content[CERTIFICATE], content[KEY], expires)


def peer_name(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """The name in a peer's certificate, or None if it showed none or one that is no role's.

    Args:
        auth_context: of `grpc.aio.ServicerContext.auth_context()`; TLS has verified the certificate by then.
    """
    names = list(auth_context.get("x509_common_name", ()))
    name = names[0].decode("utf-8", "replace") if len(names) == 1 else ""
    return name if _ROLE_NAME.fullmatch(name) else None


def _again(name: str) -> str:
    return f"run splitllm certs DIR RECIPE --renew {name} where ca.key is, and copy DIR/{name} here"


def parse_certificate(path: Path, content: bytes, remedy: str) -> x509.Certificate:
    """Parse the first certificate of a PEM file; `path` and `remedy` are for the complaint.

    Raises:
        CertificateError: there is none.
    """
    try:
        return x509.load_pem_x509_certificate(content)
    except (ValueError, x509.InvalidVersion):
        raise CertificateError(f"{path} holds no certificate in PEM: {remedy}") from None


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority's key signed the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def check_dates(path: Path, certificate: x509.Certificate, now: datetime, remedy: str) -> None:
    """Refuse a certificate before and after its time.

    Raises:
        CertificateError: it is not valid now.
    """
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise CertificateError(f"{path} expired on {end:%Y-%m-%d %H:%M} UTC: {remedy}")
    if now < start:
        here = now.astimezone(UTC)
        raise CertificateError(
            f"{path} is valid from {start:%Y-%m-%d %H:%M} UTC, and here it is {here:%Y-%m-%d %H:%M} UTC: set the clock"
        )


def _folder_of(directory: Path, name: str) -> Path:
    if (directory / name).is_dir():
        return directory / name
    if (directory / CERTIFICATE).is_file():
        return directory
    raise CertificateError(
        f"{directory} has no folder {name}: run splitllm certs DIR RECIPE, and copy DIR/{name} to {directory / name}"
    )


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(f"{path} is missing: {_again(name)}") from None
    except OSError as error:
        raise CertificateError(f"{path} cannot be read ({error.strerror}): make it readable for this user") from None


def _parse_key(path: Path, content: bytes, name: str) -> Any:
    try:
        return load_pem_private_key(content, password=None)
    except TypeError:
        raise CertificateError(f"{path} is encrypted, and nobody is there to ask: {_again(name)}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"{path} holds no private key in PEM: {_again(name)}") from None


def _check_identity(path: Path, certificate: x509.Certificate, name: str) -> None:
    """Both names must be the role's: servers read the common name, clients compare the alternative name."""
    common = [str(entry.value) for entry in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if common != [name]:
        raise CertificateError(f"{path} is that of {', '.join(common) or 'nobody'}, not {name}: {_again(name)}")
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = alternative.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError):
        names = []
    if name not in names:
        raise CertificateError(f"{path} has no DNS name {name}, so no client would trust it: {_again(name)}")


def _warn_if_open(path: Path) -> None:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        logger.warning("%s can be read by other users (mode %03o): chmod 600 %s", path, mode, path)
