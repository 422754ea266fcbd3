"""Who serves a pool: addresses as people write them, what the servers say of themselves, and who is down."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from torchcache.addresses import UNIX, host_port, is_loopback, parse_host_port, parse_unix
from torchcache.errors import ConfigurationError, ServerUnavailable
from torchcache.lanes.access import Access
from torchcache.lanes.base import Lane
from torchcache.placement import Placement
from torchcache.pool.control import ControlClient
from torchcache.pool.health import Health

DEFAULT_PORT: Final = 7440


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One server's control door. `weight` is what it is announced with, 0.0 if that isn't told.

    Of a Unix socket `host` is the path, and `port` 0.
    """

    host: str
    port: int
    weight: float = 0.0

    @property
    def address(self) -> str:
        """`host:port`: how users, messages and statistics name the server."""
        return host_port(self.host, self.port)


class MemberSource(Protocol):
    """Where a pool's servers come from. Pickles; holds nothing open."""

    @property
    def description(self) -> str:
        """How messages name the pool: its address, or the embedded pool's folder."""

    @property
    def access(self) -> Access:
        """What opens its servers' doors."""

    @property
    def embedded(self) -> bool:
        """Whether the pool lives only as long as somebody on this machine uses it."""

    @property
    def holds_s(self) -> float | None:
        """For how long what `resolve` said is taken to hold; None: as long as all of them can be reached."""

    def resolve(self, *, deadline: float) -> Sequence[Endpoint]:
        """The servers now. Called again when one could not be reached; may start what is missing.

        `deadline` is a time.monotonic() value.
        """


@dataclass(frozen=True, kw_only=True)
class StaticMembers:
    """The servers an address lists. Raises ConfigurationError if the token would travel to one in the clear."""

    endpoints: tuple[Endpoint, ...]
    access: Access = field(default_factory=Access)
    embedded: bool = False
    holds_s: float | None = None

    def __post_init__(self) -> None:
        for endpoint in self.endpoints:
            require_tls(endpoint, self.access)

    @property
    def description(self) -> str:
        return ",".join(e.address for e in self.endpoints)

    def resolve(self, *, deadline: float) -> Sequence[Endpoint]:
        """Always the same; see `MemberSource.resolve`."""
        return self.endpoints


@dataclass(frozen=True, slots=True)
class UnderStoreName:
    """An under-store as a server names it; `root` ends with a slash, and a URI is root + key."""

    name: str
    root: str


@dataclass(frozen=True)
class Member:
    """One server that answered."""

    server_id: str
    control: ControlClient
    lane: Lane
    lane_reason: str  # why it isn't the local one, if that was wanted
    under_stores: tuple[UnderStoreName, ...]
    weight: float = 0.0  # how much of the pool it takes, beside the others; 0: it doesn't say

    @property
    def address(self) -> str:
        return self.control.address

    def close(self) -> None:
        """Closes this process's connections to it."""
        self.lane.close()  # it may have something to tell by the other
        self.control.close()


@dataclass(frozen=True)
class Members:
    """The servers of a pool as last seen. `missing` are addresses that did not answer."""

    by_id: dict[str, Member]
    missing: tuple[str, ...] = ()
    seen_at: float = field(default_factory=time.monotonic)
    placement: Placement = field(init=False, compare=False)
    """Which of them owns what."""

    def __post_init__(self) -> None:
        weights = {id_: member.weight for id_, member in self.by_id.items()}
        object.__setattr__(self, "placement", Placement(self.by_id, weights))

    def known(self, server_id: str) -> Member:
        """The server of this id. Raises ServerUnavailable if none has it."""
        member = self.by_id.get(server_id)
        if member is None:
            raise ServerUnavailable(f"the server {server_id} isn't among those of the pool that answer")
        return member

    @property
    def count(self) -> int:
        """How many servers the pool has, those that don't answer included."""
        known = {member.address for member in self.by_id.values()}
        return len(known | set(self.missing))


class Ordering:
    """Rendezvous order with the servers that are out moved to the end. Thread-safe."""

    def __init__(self, health: Health) -> None:
        self._health = health

    @staticmethod
    def owner(key: bytes, members: Members) -> str:
        """The server that owns `key`, out or not."""
        return members.placement.owner(key)

    def order(self, key: bytes, members: Members) -> list[str]:
        """Server ids to ask for `key`, best first."""
        order = members.placement.order(key)
        if not self._health.anyone_out or len(order) < 2:
            return order
        return sorted(order, key=self._health.is_out)  # stable

    def nearest_first(self, key: bytes, members: Members) -> list[str]:
        """As `order`, but those on this machine before the others: of what several may hold, as of a save."""
        order = self.order(key, members)
        far = {server: members.by_id[server].lane.name != "local" for server in order}
        if len(set(far.values())) < 2:
            return order
        return sorted(order, key=lambda server: (self._health.is_out(server), far[server]))


def parse_address(text: str) -> tuple[Endpoint, ...]:
    """The servers of "host:7440,host:7440"; the port may be left out, an IPv6 address stands in brackets.

    One on this machine may be "unix:///path.sock". Raises ConfigurationError.
    """
    items = [item.strip() for item in text.split(",")]
    if any("://" in item and not item.startswith(UNIX) for item in items):
        raise ConfigurationError(
            f"{text!r} is no pool address: write host:7440,host:7440, or unix:///path.sock, or etcd://host:2379/name, "
            "or dns://name:7440"
        )
    endpoints = tuple(
        Endpoint(host=parse_unix(item, within=text), port=0)
        if item.startswith(UNIX)
        else parse_endpoint(item, text)
        for item in items
    )
    if len(set(endpoints)) != len(endpoints):
        raise ConfigurationError(f"{text!r} names a server twice")
    return endpoints


def parse_endpoint(item: str, text: str) -> Endpoint:
    """The server "host:7440", of the pool address `text`. Raises ConfigurationError."""
    host, port = parse_host_port(item, DEFAULT_PORT, within=text)
    return Endpoint(host=host, port=port)


def require_tls(endpoint: Endpoint, access: Access) -> None:
    """Raises ConfigurationError if the token would travel to the server in the clear."""
    if access.tls is None and not is_loopback(endpoint.host):
        raise ConfigurationError(
            f"refusing to talk to {endpoint.address} without TLS: the token would travel in the clear. Pass "
            "tls=, the PEM file of the authority that signed the servers' certificates, or name it in "
            "TORCHCACHE_TLS_CA"
        )
