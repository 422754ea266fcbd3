"""One server, wired: token, under-stores, store, caches, the two ports; and its end, in order."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from torchcache import environment
from torchcache.addresses import host_port, is_unix
from torchcache.errors import ConfigurationError
from torchcache.kernel import kernel_id
from torchcache.records import IDENTITY
from torchcache.registry import Announcement, Registry
from torchcache.tokens import ScopedToken
from torchcache.unix_sockets import data_socket
from torchcache.wire.v1 import cache_pb2
from torchcache_server import understore
from torchcache_server.cache.ahead import StageAhead
from torchcache_server.cache.maintenance import Maintenance, Rest
from torchcache_server.cache.policies import Policies
from torchcache_server.cache.read_through import ReadThrough
from torchcache_server.cache.write_back import WriteBack
from torchcache_server.service.admission import Admission
from torchcache_server.service.control import ControlService, ServerFacts
from torchcache_server.service.counters import CopyCounts, ServiceCounters
from torchcache_server.service.draining import Draining
from torchcache_server.service.request_log import RequestLog
from torchcache_server.service.scopes import Tokens
from torchcache_server.store import OS, DiskCalls, Store
from torchcache_server.understore.base import UnderStore
from torchcache_server.understore.s3 import S3UnderStore

from .config import ServerConfig
from .copy_keeper import CopyKeeper
from .endpoint import EndpointFile
from .life import exposed, open_key, started
from .listeners import ControlListener, listen_data, stop_data
from .logs import hide_credentials
from .lost_peers import notice_lost_peers
from .membership import Membership
from .metrics import ServerCollector
from .metrics_port import serve_metrics
from .socket_files import SocketFiles
from .tls import TlsContents, read_tls
from .token_file import read_or_create_tokens

CALLS_S: Final = 0.5
"""What calls that run may take to end. Of one that is cancelled the client's gRPC prints a line, and it fails."""

STOP_S: Final = 2.0
"""What streams may take to notice that the server closes: at their next batch."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What the ports serve."""

    store: Store
    read_through: ReadThrough
    ahead: StageAhead
    counters: ServiceCounters


class Server:
    """Serves from construction until `close`."""

    def __init__(
        self, config: ServerConfig, *, disk: DiskCalls = OS, draining: Draining | None = None
    ) -> None:
        """Raises ConfigurationError, or another TorchCacheError, with everything closed again.

        `disk` is what the store calls: a test may give one that fails. `draining` is how a call ends the server; by
        default none does.
        """
        self._draining = draining or Draining(instead="end it where it was started")
        self.config = config
        self._disk = disk
        self.instance = secrets.token_hex(8)
        self._admission = Admission()
        self._log = RequestLog()
        self._stack = ExitStack()
        self._stuck = False
        self._membership: Membership | None = None
        self._copy_keeper: CopyKeeper | None = None
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def _open(self) -> None:
        # What is wrong with these is said before a store is made.
        tokens = read_or_create_tokens(self.config.token_file)
        tls = read_tls(self.config.tls) if self.config.tls else None
        parts = self._open_store()
        self._keep_copies(parts.read_through, tokens)
        self._listen(parts, Tokens(tokens), tls)
        self._serve(parts)

    def _open_store(self) -> _Parts:
        """What lies behind the ports."""
        config, closing = self.config, self._stack
        self._under_stores = _open_under_stores(config, closing)
        store = Store(
            config.store,
            capacity_bytes=config.capacity_bytes,
            min_free_bytes=config.min_free_bytes,
            disk=self._disk,
        )
        closing.callback(store.close)
        read_through = ReadThrough(store, self._under_stores)
        closing.callback(read_through.close)
        self._write_back = WriteBack(
            store,
            self._under_stores,
            lease_s=config.lease_s,
            max_pending_bytes=config.max_pending_bytes or config.capacity_bytes * 3 // 4,
        )
        closing.callback(self._write_back.close)
        counters = ServiceCounters()
        maintenance = Maintenance(
            store,
            scrub_bytes_s=config.scrub_bytes_s,
            busy=self._is_busy,
            rest=Rest(busy=self._is_busy, done=lambda: self._bytes_moved(counters)),
        )
        closing.callback(maintenance.close)
        return _Parts(
            store=store,
            read_through=read_through,
            ahead=StageAhead(store, read_through),
            counters=counters,
        )

    def _is_busy(self) -> bool:
        return self._admission.streams > 0

    def _bytes_moved(self, counters: ServiceCounters) -> int:
        """By its clients and to or from storage, so far: what takes memory worth giving back."""
        stored = [one.counters.read_bytes + one.counters.write_bytes for one in self._under_stores.values()]
        return counters.served_bytes + counters.written_bytes + sum(stored)

    def _keep_copies(self, read_through: ReadThrough, tokens: Sequence[ScopedToken]) -> None:
        """Sees to it that checkpoints lie on as many servers as they should, if it knows of others."""
        address = self.config.pool_address
        if address is None:
            return
        from .peers import Peers, peers_access  # a client: others do without its imports

        try:
            peers = Peers(address, peers_access(tokens), server_id=self._write_back.holdings.server_id)
        except ConfigurationError as error:
            if self.config.pool is not None:
                raise
            _LOG.warning("lost copies of checkpoints aren't made again from here: %s", error.message)
            return
        self._copy_keeper = CopyKeeper(
            self._write_back.holdings,
            peers,
            lease_s=self.config.lease_s,
            mended=self._write_back.retry_failed,
        )
        self._stack.callback(self._copy_keeper.close)
        read_through.tell_damaged = self._write_back.holdings.report

    def _listen(self, parts: _Parts, tokens: Tokens, tls: TlsContents | None) -> None:
        """Takes the ports. Data is served from here on, control not yet."""
        config, closing = self.config, self._stack
        latencies = parts.counters.latencies
        sockets = SocketFiles(config.host) if is_unix(config.host) else None
        if sockets is not None:
            closing.callback(sockets.close)
        self._control = ControlListener(config, tokens, self._admission, latencies, tls, log=self._log)
        closing.callback(self._control.stop, CALLS_S)
        self._data = listen_data(
            config,
            tls,
            tokens=tokens,
            admission=self._admission,
            counters=parts.counters,
            store=parts.store,
            read_through=parts.read_through,
            log=self._log,
        )
        closing.callback(self._stop_data)
        if sockets is not None:
            sockets.protect()
        else:
            notice_lost_peers({self._control.port, self._data.port})
        if config.metrics_port is not None:
            collector = ServerCollector(
                under_stores=self._under_stores,
                write_back=self._write_back,
                admission=self._admission,
                store=parts.store,
                read_through=parts.read_through,
                counters=parts.counters,
                ahead=parts.ahead,
                copies=self._copies,
            )
            closing.enter_context(serve_metrics(config, collector, tokens))
        self._store = parts.store
        self.server_id: str = parts.store.server_id
        self.data_port: int = 0 if sockets is not None else self._data.port

    def _serve(self, parts: _Parts) -> None:
        """Answers on the control port, and says where it is found."""
        config, closing = self.config, self._stack
        facts = ServerFacts(
            server_id=self.server_id,
            instance=self.instance,
            version=version("torchcache"),
            data_port=self.data_port,
            weight=config.pool_weight,
            store_path=config.store,
            local_store=_local_store(config.store),
            started_s=time.monotonic(),
        )
        self._endpoint = self._endpoint_file()
        service = ControlService(
            facts=facts,
            under_stores=self._under_stores,
            write_back=self._write_back,
            policies=Policies(
                parts.store, settle_pin=self._write_back.settle_pin, is_save=self._write_back.is_save
            ),
            ahead=parts.ahead,
            set_credentials=self._set_credentials,
            draining=self._draining,
            drain_s=config.drain_s,
            streams=lambda: self._admission.streams,
            store=parts.store,
            read_through=parts.read_through,
            counters=parts.counters,
            copies=self._copies,
            log=self._log,
        )
        self._control.start(service)
        if config.join is not None:
            self._membership = Membership(Registry(config.join), self._announcement())
            closing.callback(self._membership.close)
        if self._endpoint:
            self._endpoint.write()
            closing.callback(self._endpoint.remove)

    @property
    def control_address(self) -> str:
        """ "host:port" of the control service."""
        return host_port(self.config.host, self._control.port)

    @property
    def data_place(self) -> str:
        """Where data is served: the port, or the socket."""
        host = self.config.host
        return host_port(data_socket(host), 0) if is_unix(host) else str(self.data_port)

    def say_started(self) -> None:
        """Tells the log what serves."""
        _LOG.info(
            "%s",
            started(
                self.config,
                version=version("torchcache"),
                address=self.control_address,
                data=self.data_place,
                usage=self._store.usage(),
            ),
        )
        for warning in (exposed(self.config), open_key(self.config)):
            if warning is not None:
                _LOG.warning("%s", warning)

    def leave(self) -> None:
        """Takes the server out of its pool's registry, or an embedded one's endpoint away, so that nobody new comes."""
        if self._membership:
            self._membership.close()
        if self._endpoint:
            self._endpoint.remove()

    def drain(self, timeout_s: float, *, abandoned: Callable[[], bool] | None = None) -> list[str]:
        """Refuses what is new, lets finish what runs and uploads what is not yet in the under-store.

        Gives up after `timeout_s`, or when `abandoned`, asked every second, says so. Returns the URIs of what is left.
        """
        deadline = time.monotonic() + timeout_s
        self.leave()
        self._control.not_serving()
        self._admission.begin_drain()
        while True:
            until = deadline if abandoned is None else min(deadline, time.monotonic() + 1.0)
            finished = self._admission.wait_until_idle(until - time.monotonic())
            left = self._write_back.drain(max(0.0, until - time.monotonic()))
            now = time.monotonic()
            # Back before its time: what is left, if anything, isn't going to be uploaded by waiting.
            if (finished and now < until) or now >= deadline or (abandoned is not None and abandoned()):
                self._draining.done(left)
                return left

    def close(self) -> bool:
        """Ends streams that still run, then everything. False if a stream is stuck, which would keep the process."""
        self._admission.close()
        self._stack.close()
        return not self._stuck

    def _copies(self) -> CopyCounts | None:
        return self._copy_keeper.counts() if self._copy_keeper is not None else None

    def _stop_data(self) -> None:
        self._stuck = not stop_data(self._data, STOP_S)
        if self._stuck:
            _LOG.warning("a stream whose peer reads nothing is left behind")

    def _announcement(self) -> Announcement:
        address = host_port(self.config.reached_at, self._control.port)
        weight = self.config.pool_weight
        return Announcement(server_id=self.server_id, address=address, instance=self.instance, weight=weight)

    def _endpoint_file(self) -> EndpointFile | None:
        if self.config.embedded is None:
            return None
        fields = {
            "pid": os.getpid(),
            "control": self.control_address,
            "data_port": self.data_port,
            "server_id": self.server_id,
            "instance": self.instance,
            "credentials_digest": environment.credentials_digest(environment.credentials()),
        }
        return EndpointFile(self.config.embedded.folder, fields)

    def _set_credentials(self, variables: Mapping[str, str]) -> None:
        if self._endpoint is None:
            raise ConfigurationError(
                "only the servers of an embedded pool take credentials from their clients"
            )
        hide_credentials(variables)
        for under_store in self._under_stores.values():
            if isinstance(under_store, S3UnderStore):
                under_store.set_credentials(variables)
        self._endpoint.write(credentials_digest=environment.credentials_digest(variables))
        self._write_back.retry_failed()


def _local_store(path: Path) -> cache_pb2.LocalStore:
    """How a client on this machine finds the open store, and tells it from any other."""
    found = (path / IDENTITY).stat()
    return cache_pb2.LocalStore(
        path=str(path.absolute()), kernel=kernel_id(), device=found.st_dev, inode=found.st_ino
    )


def _open_under_stores(config: ServerConfig, closing: ExitStack) -> dict[str, UnderStore]:
    opened: dict[str, UnderStore] = {}
    for name, uri in config.under_stores:
        opened[name] = understore.create(name, uri, umask=config.umask)
        closing.callback(opened[name].close)
    return opened
