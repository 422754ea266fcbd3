"""Pools whose servers come and go: found in etcd or by DNS, looked for again while the pool is used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from torchcache import environment
from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.lanes.access import Access
from torchcache.lanes.connections import connections
from torchcache.pool.members import (
    Endpoint,
    MemberSource,
    StaticMembers,
    parse_address,
    parse_endpoint,
    require_tls,
)
from torchcache.registry import Registry, RegistryAddress

_log = logging.getLogger(__name__)

ETCD_HOLDS_S: Final = 5.0
DNS_HOLDS_S: Final = 30.0
"""How long what was found is taken to hold: a server that joined is used at the latest after that."""

_DNS: Final = "dns://"


@dataclass(frozen=True, kw_only=True)
class EtcdMembers:
    """The servers that have announced themselves in etcd (`torchcache serve --join`)."""

    registry: RegistryAddress
    access: Access = field(default_factory=Access)
    embedded: bool = False
    holds_s: float | None = ETCD_HOLDS_S

    @property
    def description(self) -> str:
        return str(self.registry)

    def resolve(self, *, deadline: float) -> Sequence[Endpoint]:
        """See `MemberSource.resolve`. While etcd doesn't answer, the servers that this user last saw there."""
        return _resolve(self, self._look)

    def _look(self) -> list[Endpoint]:
        registry = Registry(self.registry)
        try:
            found = []
            for server in registry.servers():
                try:
                    endpoint = parse_endpoint(server.address, self.description)
                    found.append(replace(endpoint, weight=server.weight))
                except ConfigurationError as error:
                    _log.warning("an entry of %s is left out: %s", self.description, error)
            return found
        finally:
            registry.close()


@dataclass(frozen=True, kw_only=True)
class DnsMembers:
    """The servers behind one name, each of its addresses at the same port. Over TLS they bear that name."""

    name: str
    port: int
    given: Access = field(default_factory=Access)
    embedded: bool = False
    holds_s: float | None = DNS_HOLDS_S

    @property
    def description(self) -> str:
        return f"{_DNS}{self.name}:{self.port}"

    @property
    def access(self) -> Access:
        """As given; a certificate is checked for the pool's name, since addresses change."""
        tls = self.given.tls
        if tls is None or tls.server_name is not None:
            return self.given
        return replace(self.given, tls=replace(tls, server_name=self.name))

    def resolve(self, *, deadline: float) -> Sequence[Endpoint]:
        """See `MemberSource.resolve`. While the name isn't known, the addresses that it had last."""
        return _resolve(self, self._look)

    def _look(self) -> list[Endpoint]:
        try:
            found = socket.getaddrinfo(self.name, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ServerUnavailable(f"{self.name} can't be looked up: {error}") from error
        hosts = sorted({str(address[0]) for *_, address in found})
        return [Endpoint(host=host, port=self.port) for host in hosts]


def member_source(address: str, access: Access) -> MemberSource:
    """What finds the servers of a pool.

    "host:7440,host:7440", "unix:///path.sock", "etcd://host:2379/name" or "dns://name:7440".

    Raises ConfigurationError.
    """
    if address.startswith("etcd://"):
        return EtcdMembers(registry=RegistryAddress.parse(address), access=access)
    if address.startswith(_DNS):
        endpoint = parse_endpoint(address.removeprefix(_DNS), address)
        require_tls(endpoint, access)
        return DnsMembers(name=endpoint.host, port=endpoint.port, given=access)
    return StaticMembers(endpoints=parse_address(address), access=access)


def _resolve(source: MemberSource, look: Callable[[], list[Endpoint]]) -> Sequence[Endpoint]:
    remembered = _remembered(source.description)
    try:
        with connections.call():  # no fork in between: a child would inherit the resolver's locks
            found = look()
    except ServerUnavailable as error:
        found = _recall(remembered)
        if not found:
            raise
        _log.warning("%s; the servers that were there last are used: %d", error.message, len(found))
    else:
        if not found:
            raise ServerUnavailable(f"no server has joined the pool {source.description}")
        _remember(remembered, found)
    for endpoint in found:
        require_tls(endpoint, source.access)
    return found


def _remembered(pool: str) -> Path:
    """Where this user keeps what was last found, for this process and those that start while nobody answers."""
    return environment.home() / "pools" / f"{hashlib.sha256(pool.encode()).hexdigest()[:32]}.json"


def _remember(path: Path, endpoints: Sequence[Endpoint]) -> None:
    places = [[endpoint.host, endpoint.port] for endpoint in endpoints]
    if [[endpoint.host, endpoint.port] for endpoint in _recall(path)] == places:
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump(places, file)
        Path(name).replace(path)
    except OSError as error:
        _log.info("what servers there are can't be remembered in %s: %s", path, error)


def _recall(path: Path) -> list[Endpoint]:
    try:
        found: Any = json.loads(path.read_text())
        return [Endpoint(host=str(host), port=int(port)) for host, port in found]
    except (OSError, ValueError, TypeError):
        return []
