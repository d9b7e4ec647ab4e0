"""Bytes that are neither TLS nor HTTP/2, or are them until they are not; and a TLS connection to say them over."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from splitllm.wire.certificates import Credentials

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HTTP2_KINDS = tuple(range(11))


def tcp_noise(rng: Random) -> bytes:
    """Nothing, anything, half a TLS handshake, plain HTTP/2 or HTTP/1."""
    hello = bytes.fromhex("1603010200010001fc0303") + rng.randbytes(400)
    return rng.choice(
        (b"", rng.randbytes(rng.choice((1, 100, 70_000))), hello, hello[:9], PREFACE, b"GET / HTTP/1.1\r\n\r\n")
    )


def http2_noise(rng: Random) -> bytes:
    """The preface, and frames of any kind, length and flags after it."""
    found = rng.choice((PREFACE, PREFACE, PREFACE[:10], b""))
    for _ in range(rng.choice((1, 5, 50))):
        said, real = rng.choice((0, 5, 8, 100, 16_384, 16_777_215)), rng.choice((0, 5, 8, 100))
        head = said.to_bytes(3, "big") + bytes([rng.choice(HTTP2_KINDS), rng.randrange(256)])
        found += head + rng.choice((0, 0, 1, 3, 2**31 - 1)).to_bytes(4, "big") + rng.randbytes(real)
    return found


@contextmanager
def _as_files(credentials: Credentials) -> Iterator[list[str]]:
    """Files in memory: `ssl` reads certificate and key from paths only."""
    descriptors = []
    for content in (credentials.certificate, credentials.key):
        descriptor = os.memfd_create("credentials")
        os.write(descriptor, content)
        descriptors.append(descriptor)
    try:
        yield [f"/proc/self/fd/{descriptor}" for descriptor in descriptors]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def tls(credentials: Credentials) -> ssl.SSLContext:
    """To speak as this role, HTTP/2 inside."""
    context = ssl.create_default_context(cadata=credentials.authority.decode())
    with _as_files(credentials) as (certificate, key):
        context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    return context
