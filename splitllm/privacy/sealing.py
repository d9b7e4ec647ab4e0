"""What two members say to each other through a server that must not read it: X25519, HKDF, ChaCha20-Poly1305."""

from __future__ import annotations

import hashlib
import json
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from splitllm.errors import PeerError

PUBLIC_BYTES = 32
COMMITMENT_BYTES = 32
_NONCE_BYTES = 12
SEAL_BYTES = _NONCE_BYTES + 16
"""By how much a sealed text is longer."""


def public_of(private: bytes) -> bytes:
    """The public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, peer: str) -> bytes:
    """The secret that the two holders of these keys have in common.

    Raises:
        PeerError: the public key of `peer` is one with which there is no secret.
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise PeerError(f"{peer}: its public key is not a sound X25519 key; leave it out") from error


def derive(secret: bytes, *context: str) -> bytes:
    """A key of 32 bytes for one purpose."""
    return HKDF(SHA256(), 32, salt=None, info=_text(context)).derive(secret)


def commit(secret: bytes, *context: str) -> bytes:
    """What fixes a random secret of 32 bytes without telling it."""
    return hashlib.sha256(_text(("commitment", *context)) + secret).digest()


def seal(key: bytes, text: bytes, *context: str) -> bytes:
    """The text, readable and changeable only with the key, and only in this context."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, _text(context))


def unseal(key: bytes, sealed: bytes, *context: str) -> bytes | None:
    """What `seal` was given; None: not by this key, not in this context, or changed since."""
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _text(context))
    except (InvalidTag, ValueError):
        return None


def _text(context: tuple[str, ...]) -> bytes:
    """Different contexts have different texts."""
    return json.dumps(["splitllm", *context]).encode()
