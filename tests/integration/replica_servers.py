"""Servers of one pool that are killed and started again on their stores and ports; and a gate that stops uploads."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from examples.ports import free_port
from examples.seaweedfs import environment
from tests.integration.store_process_parts import Life, Starter, forking
from tests.proxy import Broken, Passing, Proxy, Side
from tests.waiting import until
from torchcache.connecting import connect
from torchcache.errors import TorchCacheError
from torchcache.placement import Placement
from torchcache.pool import Pool, SaveInfo
from torchcache.pool.saves import folder_key

LEASE_S = 2.0
"""A commit has half of it to tell storage; one that can't in time is the pool's alone for a while: not tested here."""
WAIT_S = 120.0


class UploadGate(Proxy):
    """Stands before an S3 server: while `closed`, every PUT of a checkpoint's shard is reset, and all else passes."""

    def __init__(self, endpoint_url: str) -> None:
        parts = urlsplit(endpoint_url)
        super().__init__((parts.hostname or "", parts.port or 80))
        self.closed = False

    def passing(self, side: Side) -> Passing:
        return self._checked if side == "client" else super().passing(side)

    def _checked(self, data: bytes) -> Iterator[bytes]:
        if (
            self.closed
            and data.startswith((b"PUT /", b"POST /"))
            and b".distcp" in data.partition(b"\r\n")[0]
        ):
            raise Broken
        yield data


class ReplicaServers:
    """`count` servers over one under-store, `name=uri`, and a pool that knows them all. Context manager.

    `more` is what the servers find in their environment. `keeps_copies`: they know of each other, and make copies of
    checkpoints again that are lost. `with_metrics`: each serves its own on `metrics_ports`.
    """

    def __init__(
        self,
        folder: Path,
        under_store: str,
        *,
        count: int = 3,
        starter: Starter | None = None,
        drain_s: float = 0.2,
        lease_s: float = LEASE_S,
        keeps_copies: bool = False,
        with_metrics: bool = False,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self._environment = more
        self._starter = starter or forking()
        self._ports = [free_port(beside=1) for _ in range(count)]
        self.metrics_ports = [free_port(beside=1) for _ in range(count)] if with_metrics else []
        self._lives: dict[int, Life] = {}
        self._arguments = [
            *("--capacity", "1GB", "--token-file", str(folder / "token"), "--under-store", under_store),
            *("--drain-s", str(drain_s), "--lease-s", str(lease_s), "--scrub-rate", "0"),
        ]
        if keeps_copies:
            self._arguments += ["--pool", ",".join(self.addresses)]
        self._closing = ExitStack()

    def __enter__(self) -> ReplicaServers:
        for number in range(len(self._ports)):
            self.start(number)
        self.token = (self.folder / "token").read_text().strip()
        self.pool = self.connect()
        self.ids = {status.address: status.server_id for status in self.pool.status()}
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()
        for life in self._lives.values():
            life.end()

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.0.1:{port}" for port in self._ports]

    def connect(self) -> Pool:
        """Another client's pool, with nothing learnt yet."""
        pool = connect(",".join(self.addresses), token=self.token)
        self._closing.callback(pool.close)
        return pool

    def start(self, number: int) -> None:
        store = self.store(number)
        arguments = ["--listen", self.addresses[number], "--store", str(store), *self._arguments]
        if self.metrics_ports:
            arguments += ["--metrics-port", str(self.metrics_ports[number])]
        with environment(self._environment):
            life = self._starter.start(arguments, self.log(number))
        self._lives[number] = life
        life.wait_ready()
        if hasattr(self, "token"):
            # gRPC tries an address that was dead a moment ago again after a pause: for all channels of the process.
            until(lambda: self.addresses[number] not in self._unreachable())

    def _unreachable(self) -> list[str]:
        with closing(connect(",".join(self.addresses), token=self.token)) as pool:
            try:
                pool.status()
            except TorchCacheError:
                return self.addresses
            return pool.unreachable()

    def store(self, number: int) -> Path:
        return self.folder / f"store-{number}"

    def log(self, number: int) -> Path:
        return self.folder / f"server-{number}.log"

    def end(self, number: int, how: signal.Signals = signal.SIGKILL) -> int | None:
        return self._lives.pop(number).end(how)

    def send(self, number: int, what: signal.Signals) -> None:
        self._lives[number].send(what)

    @property
    def running(self) -> list[int]:
        return sorted(self._lives)

    def kept(self, within: str = "") -> list[str]:
        """What any server says it must not evict, of names that have `within`; and who runs but doesn't answer."""
        found = self.pool.status()
        silent = {self.addresses[number] for number in self.running} - {status.address for status in found}
        dirty = (n.name for status in found for n in status.namespaces if n.dirty)
        return [*sorted(silent), *(name for name in dirty if within in name)]

    def order(self, uri: str) -> list[int]:
        """Numbers of the servers in the order that the checkpoint at `uri` is placed: its owner first."""
        order = Placement(self.ids.values()).order(folder_key(*self.pool.resolve(uri)))
        addresses = {id_: address for address, id_ in self.ids.items()}
        return [self.addresses.index(addresses[id_]) for id_ in order]


def wait_for_save(pool: Pool, uri: str, what: Callable[[SaveInfo], bool]) -> SaveInfo:
    """What the pool says of the checkpoint once it is `what` it should be."""
    deadline = time.monotonic() + WAIT_S
    while not what(info := pool.get_save(*pool.resolve(uri))):
        assert time.monotonic() < deadline, info
        time.sleep(0.05)
    return info


def two_servers(folder: Path) -> ReplicaServers:
    """Over the folder `source` in `folder`."""
    (folder / "source").mkdir()
    return ReplicaServers(folder, f"file=file://{folder}/source", count=2)


def uri_for(servers: ReplicaServers, test: str) -> str:
    """Of a path there that no other test, by its name, has."""
    return f"file://{servers.folder}/source/{test.replace('[', '-').rstrip(']')}"
