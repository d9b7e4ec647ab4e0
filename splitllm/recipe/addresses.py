"""Where a server is reached, `HOST:PORT`; and where a process of the same machine is, `unix:PATH` or a port there."""

from __future__ import annotations

import ipaddress
import re

_ADDRESS = re.compile(r"(?P<host>[^\[\]:\s]+|\[[^\[\]\s]+\]):(?P<port>[1-9][0-9]{0,4})")
LOCAL = ("127.0.0.1", "::1", "localhost")
UNIX, LONGEST_PATH = "unix:", 107
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")


def host_and_port(address: str) -> tuple[str, int]:
    """Take an address apart.

    Args:
        address: `HOST:PORT`, the host a name, an IPv4 address or an IPv6 address in brackets.

    Returns:
        The host (an IPv6 address without its brackets) and the port, 1 to 65535.

    Raises:
        ValueError: it is no such address.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or int(found["port"]) > 65535 or not _is_host(found["host"]):
        raise ValueError(f"{address!r} is not HOST:PORT")
    return found["host"].strip("[]"), int(found["port"])


def place_here(address: str) -> str | tuple[str, int]:
    """Where on this machine an address is.

    Args:
        address: `unix:PATH` or `127.0.0.1:PORT`.

    Returns:
        The path of a Unix socket, or host and port.

    Raises:
        ValueError: it is neither.
    """
    if address.startswith(UNIX):
        path = address.removeprefix(UNIX)
        if not 1 <= len(path.encode()) <= LONGEST_PATH or "\0" in path:
            raise ValueError(f"{path!r} is no path of 1 to {LONGEST_PATH} bytes")
        return path
    host, port = host_and_port(address)
    if host not in LOCAL:
        raise ValueError(f"{host} is not this machine")
    return host, port


def _is_host(host: str) -> bool:
    try:
        if host.startswith("["):
            ipaddress.IPv6Address(host[1:-1])
        elif host.rpartition(".")[2].isdecimal():
            ipaddress.IPv4Address(host)
        else:
            return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in host.split("."))
    except ValueError:
        return False
    return True
