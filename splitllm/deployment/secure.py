"""Which addresses a role may use without TLS: those of its own machine."""

from __future__ import annotations

import ipaddress

from splitllm.errors import RecipeError
from splitllm.recipe import host_and_port
from splitllm.wire.certificates import Credentials


def check_secure(address: str, credentials: Credentials | None, *, insecure: bool) -> None:
    """Plain TCP stays on this machine unless the user says otherwise.

    Args:
        address: HOST:PORT to dial or to listen on.
        credentials: for mutual TLS, or None.
        insecure: allow plain TCP beyond this machine.

    Raises:
        RecipeError: it would not, or the address is none.
    """
    known = f"{address.removesuffix(':0')}:1" if address.endswith(":0") else address  # port 0 is any free one
    try:
        host, _ = host_and_port(known)
    except ValueError as error:
        raise RecipeError([f"--listen: {error}; give --listen 0.0.0.0:7100, say"]) from error
    if credentials is None and not insecure and not _is_here(host):
        remedy = "make some with splitllm certs, or give --insecure"
        raise RecipeError([f"wire.certificates: missing, but {address} is beyond this machine; {remedy}"])


def _is_here(host: str) -> bool:
    """Whether a host is this machine, whatever a name service says."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
