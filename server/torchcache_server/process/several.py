"""`--servers N`: from one configuration to those of N servers on this machine. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torchcache.addresses import UNIX, host_port, is_unix, parse_unix
from torchcache.errors import ConfigurationError

from .config import ServerConfig

PORTS_EACH = 2
"""Control, and data behind it."""


def split(config: ServerConfig) -> list[ServerConfig]:
    """The configurations of `config.servers` servers that share the machine.

    Each has a store of its own, in the folder server-<i> of the given one, an even share of capacity and scrub rate,
    and its own ports, counted up from those given, or its own socket: the given path with a dot and its number.
    Raises ConfigurationError if there are no ports to count up from.
    """
    count = config.servers
    on_sockets = is_unix(config.host)
    if not config.port and not on_sockets:
        raise ConfigurationError(
            "several servers need a port in --listen: a client must find each again when it was started again"
        )
    last = config.port + PORTS_EACH * count - 1
    if last > 65535 or (config.metrics_port is not None and config.metrics_port + count - 1 > 65535):
        raise ConfigurationError(f"{count} servers need {PORTS_EACH * count} ports from {config.port} on")
    return [
        replace(
            config,
            servers=1,
            host=_socket(config.host, i) if on_sockets else config.host,
            port=0 if on_sockets else config.port + PORTS_EACH * i,
            store=config.store / folder(i),
            capacity_bytes=config.capacity_bytes // count,
            max_pending_bytes=config.max_pending_bytes and max(1, config.max_pending_bytes // count),
            scrub_bytes_s=-(-config.scrub_bytes_s // count),
            # 0 takes a free port, for each server another.
            metrics_port=config.metrics_port + i if config.metrics_port else config.metrics_port,
        )
        for i in range(count)
    ]


def _socket(path: str, number: int) -> str:
    return parse_unix(f"{UNIX}{path}.{number}", within=UNIX + path)


def folder(number: int) -> str:
    """The name of a server's folder in the common one."""
    return f"server-{number}"


def left_out(store: Path, count: int) -> list[Path]:
    """Stores in the common folder that none of `count` servers has: there were more, or only one."""
    found = [path.parent for path in store.glob("server-*/store.json")]
    found += [store] if (store / "store.json").exists() else []
    return sorted(path for path in found if path not in {store / folder(i) for i in range(count)})


def arguments(config: ServerConfig) -> Iterator[str]:
    """The command line of one server that is not embedded."""
    yield from ("--listen", host_port(config.host, config.port))
    yield from ("--store", str(config.store), "--capacity", str(config.capacity_bytes))
    for name, uri in config.under_stores:
        yield from ("--under-store", f"{name}={uri}")
    yield from ("--token-file", str(config.token_file), "--drain-s", str(config.drain_s))
    yield from ("--lease-s", str(config.lease_s), "--weight", str(config.weight))
    if config.max_pending_bytes is not None:
        yield from ("--max-pending", str(config.max_pending_bytes))
    yield from ("--scrub-rate", str(config.scrub_bytes_s))
    yield from ("--log-format", config.log_format, "--log-level", config.log_level)
    if config.tls is not None:
        yield from ("--tls-cert", str(config.tls.certificate), "--tls-key", str(config.tls.key))
        if config.tls.client_ca is not None:
            yield from ("--tls-client-ca", str(config.tls.client_ca))
    if config.metrics_port is not None:
        yield from ("--metrics-port", str(config.metrics_port), "--metrics-host", config.metrics_host)
        if config.metrics_insecure:
            yield "--metrics-insecure"
    if config.min_free_bytes is not None:
        yield from ("--min-free", str(config.min_free_bytes))
    if config.join is not None:
        yield from ("--join", str(config.join), "--advertise", config.reached_at)
    if config.pool is not None:
        yield from ("--pool", config.pool)
