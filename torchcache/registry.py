"""The registry of a pool in etcd: which servers have announced themselves under its name.

A server's entry hangs on a lease that it renews, so that one which dies is gone when the lease ends. etcd is asked
through its HTTP gateway, by a maintained client (the extra `torchcache[etcd]`).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from torchcache import environment
from torchcache.addresses import host_port, parse_host_port, refuse_user
from torchcache.errors import ConfigurationError, ServerUnavailable

if TYPE_CHECKING:
    from etcd3gw.client import Etcd3Client
    from etcd3gw.lease import Lease

DEFAULT_PORT: Final = 2379
TIMEOUT_S: Final = 2.0
"""How long one host of etcd may take to answer, or to go on with its answer."""

MAX_ENTRY_BYTES: Final = 4096
MAX_SERVERS: Final = 10_000
MOST_WEIGHT: Final = 1e30

_SCHEME: Final = "etcd://"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class RegistryAddress:
    """The hosts of an etcd, and the name of a pool in it."""

    hosts: tuple[tuple[str, int], ...]
    name: str

    def __str__(self) -> str:
        return f"{_SCHEME}{','.join(host_port(*host) for host in self.hosts)}/{self.name}"

    @property
    def prefix(self) -> str:
        """What the keys of the pool's servers begin with."""
        return f"/torchcache/pools/{self.name}/servers/"

    @staticmethod
    def parse(text: str) -> RegistryAddress:
        """Of "etcd://host:2379,host:2379/name". Raises ConfigurationError."""
        refuse_user(text)
        hosts, slash, name = text.removeprefix(_SCHEME).partition("/")
        if not text.startswith(_SCHEME) or not slash or not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"{text!r} names no pool in etcd: write etcd://HOST:{DEFAULT_PORT}/NAME, with a NAME of letters, "
                "digits, dots, dashes and underscores"
            )
        found = tuple(parse_host_port(host.strip(), DEFAULT_PORT, within=text) for host in hosts.split(","))
        return RegistryAddress(hosts=found, name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What a server says of itself: its id, `host:port` of its control door, and its life's own id.

    `weight` is how much of the pool it takes; 0.0: it doesn't say, or says what is none. Clients go by what it tells
    them when they meet it, and by this they see that it would tell something else by now.
    """

    server_id: str
    address: str
    instance: str
    weight: float = 0.0

    def encode(self) -> str:
        """As it lies in etcd."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(data: bytes) -> Announcement | None:
        """None if it is no announcement: others write to etcd, too."""
        try:
            fields: Any = json.loads(data) if len(data) <= MAX_ENTRY_BYTES else None
            texts = {name: str(fields[name]) for name in ("server_id", "address", "instance")}
            return Announcement(**texts, weight=_weight(fields.get("weight")))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None


def _weight(said: object) -> float:
    if isinstance(said, bool) or not isinstance(said, int | float):
        return 0.0
    return float(said) if 0 < said < MOST_WEIGHT else 0.0


class Registry:
    """A connection to the registry. Raises ServerUnavailable where none of etcd's hosts answers. Not thread-safe."""

    def __init__(self, address: RegistryAddress) -> None:
        """Raises ConfigurationError if the client of etcd isn't installed."""
        self.address = address
        self._hosts = list(address.hosts)
        self._clients: dict[tuple[str, int], Etcd3Client] = {}
        try:
            import etcd3gw.client  # noqa: F401 - an extra, and slow to import
        except ImportError as error:
            raise ConfigurationError(
                f"{address} needs a client of etcd: pip install 'torchcache[etcd]'"
            ) from error

    def servers(self, *, deadline: float = math.inf) -> list[Announcement]:
        """All that are announced, by id. No host is asked after `deadline` (`time.monotonic()`)."""

        def listed(client: Etcd3Client) -> list[Announcement]:
            entries = client.get_prefix(self.address.prefix)[:MAX_SERVERS]
            found = (Announcement.decode(value) for value, _ in entries)
            return sorted((one for one in found if one is not None), key=lambda one: one.server_id)

        return self._ask(listed, deadline)

    def announce(self, server: Announcement, ttl_s: int) -> Lease:
        """Enters the server until the lease that is returned has not been kept for `ttl_s`."""

        def enter(client: Etcd3Client) -> Lease:
            lease = client.lease(ttl_s)
            client.put(self.address.prefix + server.server_id, server.encode(), lease)
            return lease

        return self._ask(enter)

    def keep(self, lease: Lease) -> bool:
        """Renews the lease; False if it has ended."""
        return self._ask(lambda client: _of(lease, client).refresh()) > 0

    def withdraw(self, lease: Lease) -> None:
        """Ends the lease, and with it the server's entry."""
        self._ask(lambda client: _of(lease, client).revoke())

    def close(self) -> None:
        """Closes the connections."""
        while self._clients:
            self._clients.popitem()[1].session.close()

    def _ask(self, request: Callable[[Etcd3Client], _T], deadline: float = math.inf) -> _T:
        """Asks each host until one answers, beginning with the one that did last. They share the time there is."""
        failures = []
        for asked, host in enumerate(list(self._hosts)):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                failures.append("there is no time left")
                break
            try:
                client = self._client(host)
                client.timeout = min(TIMEOUT_S, left_s / (len(self._hosts) - asked))
                answer = request(client)
            except Exception as error:  # noqa: BLE001 - etcd3gw raises anything of an answer that isn't etcd's
                failures.append(f"{host_port(*host)}: {str(error) or type(error).__name__}")
                continue
            self._hosts.remove(host)
            self._hosts.insert(0, host)
            return answer
        raise ServerUnavailable(f"no host of {self.address} answers: {'; '.join(failures)}")

    def _client(self, host: tuple[str, int]) -> Etcd3Client:
        if host not in self._clients:
            from etcd3gw.client import Etcd3Client

            tls = environment.etcd_tls()
            self._clients[host] = Etcd3Client(
                *host,
                protocol="http" if tls.ca is None else "https",
                ca_cert=tls.ca,
                cert_cert=tls.certificate,
                cert_key=tls.key,
            )
        return self._clients[host]


def _of(lease: Lease, client: Etcd3Client) -> Lease:
    """The lease as asked of another host."""
    return type(lease)(lease.id, client)
