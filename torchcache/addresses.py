"""Hosts and ports as text, and which of them stay within this machine."""

from __future__ import annotations

import ipaddress

from torchcache.errors import ConfigurationError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. Decided by the text: no name but localhost is looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_port(host: str, port: int) -> str:
    """ "host:port", with brackets around an IPv6 address."""
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
