"""Hosts and ports as text, and which of them stay within this machine. A Unix socket is a host that is a path."""

from __future__ import annotations

import ipaddress
import os.path
import re
from typing import Final

from torchcache.errors import ConfigurationError

UNIX: Final = "unix://"
_PATH: Final = re.compile(r"/[A-Za-z0-9._+=/-]*[A-Za-z0-9._+=-]")
"""Of a socket. What else a name may hold would mean something in addresses, or to gRPC."""

_SCHEME: Final = re.compile(r"(?:[A-Za-z0-9+.-]+://)?")

MOST_PATH_BYTES: Final = 102
"""The kernel takes 107; the socket for data has a longer name."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. Decided by the text: no name but localhost is looked up."""
    if host == "localhost" or is_unix(host):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_unix(host: str) -> bool:
    """Whether `host` is the path of a Unix socket."""
    return host.startswith("/")


def refuse_user(address: str) -> None:
    """Raises ConfigurationError for an address with "user:password@" in it, which it doesn't show."""
    found = _SCHEME.match(address)
    scheme = found.group() if found else ""
    user, at, host = address.removeprefix(scheme).rpartition("@")
    if not at or (user.startswith("/") and ":" not in user):  # that is a path, and no socket's
        return
    raise ConfigurationError(
        f"the address '{scheme}[hidden]@{host}' has a user or a password in it, which no server of a pool is asked "
        "with: write hosts and ports alone"
    )


def parse_unix(item: str, *, within: str) -> str:
    """The path in "unix:///path". Raises ConfigurationError, which shows `within`, what the user wrote."""
    path = item.removeprefix(UNIX)
    if not _PATH.fullmatch(path) or os.path.normpath(path) != path or path.startswith("//"):
        raise ConfigurationError(
            f"{item!r} in the address {within!r} is no socket: write unix:///folder/name.sock, a whole path of "
            "letters, digits and . _ + = -"
        )
    if len(path) > MOST_PATH_BYTES:
        raise ConfigurationError(
            f"the path of the socket {path} has {len(path)} characters: {MOST_PATH_BYTES} are the most that the kernel "
            "leaves room for; take a shorter one"
        )
    return path


def host_port(host: str, port: int) -> str:
    """ "host:port", with brackets around an IPv6 address; "unix:///path" of a Unix socket."""
    if is_unix(host):
        return UNIX + host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_host_port(item: str, default_port: int, *, within: str) -> tuple[str, int]:
    """Host and port of "host:port"; the port may be left out, an IPv6 address stands in brackets.

    Raises ConfigurationError, which shows `within`, what the user wrote.
    """
    host, colon, port = item.rpartition(":") if not item.endswith("]") else (item, "", "")
    if not colon:
        host, port = item, str(default_port)
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    valid = host and bracketed == (":" in host) and not any(c.isspace() or c in "/@[]," for c in host)
    if not valid or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigurationError(
            f"{item!r} in the address {within!r} is no server: write host:{default_port} or [::1]:{default_port}"
        )
    return host, int(port)
