"""Pools whose servers come and go: found in etcd or by DNS, looked for again while the pool is used."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - else getaddrinfo would in a thread, where a fork may catch it halfway
import hashlib
import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from torchcache import environment
from torchcache.addresses import refuse_user
from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.lanes.access import Access
from torchcache.plain_files import read_plain
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

PATIENCE_S: Final = 1.0
"""How long a look-up is waited for where it is known which servers there were last."""

MOST_LOOK_UPS: Final = 16
"""Of one pool in a process, that are under way or hang."""

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
        registry = Registry(self.registry)
        return _resolve(self, lambda: self._look(registry, deadline), deadline)

    def _look(self, registry: Registry, deadline: float) -> list[Endpoint]:
        try:
            found = []
            for server in registry.servers(deadline=deadline):
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
        return _resolve(self, self._look, deadline)

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
    refuse_user(address)
    if address.startswith("etcd://"):
        return EtcdMembers(registry=RegistryAddress.parse(address), access=access)
    if address.startswith(_DNS):
        endpoint = parse_endpoint(address.removeprefix(_DNS), address)
        require_tls(endpoint, access)
        return DnsMembers(name=endpoint.host, port=endpoint.port, given=access)
    return StaticMembers(endpoints=parse_address(address), access=access)


def _resolve(source: MemberSource, look: Callable[[], list[Endpoint]], deadline: float) -> Sequence[Endpoint]:
    remembered = _remembered(source.description)
    last = _recall(remembered)
    left_s = deadline - time.monotonic()
    looking = _LookUp(source.description, look, remembered)
    try:
        # Half of the time is for those who are then asked.
        found = looking.result(min(PATIENCE_S, left_s / 2) if last else left_s)
    except ServerUnavailable as error:
        if not last:
            raise
        _log.warning("%s; the servers that were there last are used: %d", error.message, len(last))
        found = last
    if not found:
        raise ServerUnavailable(f"no server has joined the pool {source.description}")
    for endpoint in found:
        require_tls(endpoint, source.access)
    return found


class _LookUp:
    """A look-up in a thread of its own: neither getaddrinfo nor an answer that trickles in ends by a deadline.

    One that nobody waits for any more goes on, and what it finds is remembered for the next. Forks don't wait for it: a
    child looks up for itself.
    """

    def __init__(self, pool: str, look: Callable[[], list[Endpoint]], remembered: Path) -> None:
        self._pool = pool
        self._look = look
        self._remembered = remembered
        self._found: Future[list[Endpoint]] = Future()
        name = f"torchcache-look-up {pool}"
        hanging = sum(thread.name == name for thread in threading.enumerate())
        if hanging < MOST_LOOK_UPS:
            threading.Thread(target=self._work, name=name, daemon=True).start()
        else:
            self._found.set_exception(ServerUnavailable(f"{hanging} look-ups of {pool} hang"))

    def _work(self) -> None:
        try:
            found = self._look()
            if found:
                _remember(self._remembered, found)
            self._found.set_result(found)
        except BaseException as error:  # noqa: BLE001 - it is who waits that is to see it
            self._found.set_exception(error)

    def result(self, timeout_s: float) -> list[Endpoint]:
        """What is found. Raises ServerUnavailable if that isn't within the time."""
        try:
            return self._found.result(max(0.0, timeout_s))
        except TimeoutError:
            raise ServerUnavailable(
                f"{self._pool} can't be looked up: no answer within {timeout_s:.1f} s"
            ) from None


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
        found: Any = json.loads(read_plain(path))
        return [Endpoint(host=str(host), port=int(port)) for host, port in found]
    except (OSError, ValueError, TypeError):
        return []
