"""The two ports: gRPC for control, Arrow Flight for data."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc
import pyarrow as pa
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from torchcache.addresses import host_port, is_unix
from torchcache.errors import ConfigurationError
from torchcache.unix_sockets import data_socket
from torchcache.wire import liveness
from torchcache.wire.v1 import cache_pb2, cache_pb2_grpc
from torchcache_server.service.admission import CONTROL_THREADS, Admission
from torchcache_server.service.control import ControlService
from torchcache_server.service.data import DataServer
from torchcache_server.service.interceptors import ControlInterceptor
from torchcache_server.service.latencies import Latencies
from torchcache_server.service.request_log import RequestLog
from torchcache_server.service.scopes import Tokens

from .config import ServerConfig
from .tls import TlsContents

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
MAX_METADATA_BYTES: Final = 8 * 1024
_SERVICE: Final = cache_pb2.DESCRIPTOR.services_by_name["Control"]
_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: nothing can be a bomb
    *liveness.CONTROL_OPTIONS,
)


class ControlListener:
    """The control service and the health service on one port. Serves after `start`."""

    def __init__(
        self,
        config: ServerConfig,
        tokens: Tokens,
        admission: Admission,
        latencies: Latencies,
        tls: TlsContents | None,
        *,
        log: RequestLog | None = None,
    ) -> None:
        """Binds the port. Raises ConfigurationError if that can't be."""
        self._server = grpc.server(
            ThreadPoolExecutor(CONTROL_THREADS, thread_name_prefix="control"),
            interceptors=[ControlInterceptor(tokens, admission, latencies, log)],
            options=_OPTIONS,
            maximum_concurrent_rpcs=2 * CONTROL_THREADS,
        )
        self._health = health.HealthServicer()
        try:
            if tls is None:
                self.port: int = self._server.add_insecure_port(config.address)
            else:
                credentials = grpc.ssl_server_credentials(
                    [(tls.key, tls.certificate)], tls.client_ca, tls.client_ca is not None
                )
                self.port = self._server.add_secure_port(config.address, credentials)
        except RuntimeError:
            raise cannot_listen(config.host, config.port) from None

    def start(self, service: ControlService) -> None:
        """Answers from now on."""
        cache_pb2_grpc.add_ControlServicer_to_server(service, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", _SERVICE.full_name):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server.start()

    def not_serving(self) -> None:
        """Health says so from now on; calls are still answered."""
        self._health.enter_graceful_shutdown()

    def stop(self, grace_s: float) -> None:
        """Refuses new calls, gives those that run `grace_s`."""
        self._server.stop(grace_s).wait()


def listen_data(config: ServerConfig, tls: TlsContents | None, **service: Any) -> DataServer:
    """The data server on the port behind the control port, or the socket beside it.

    Raises ConfigurationError if that can't be bound.
    """
    port = config.port + 1 if config.port else 0
    scheme = "grpc+tls" if tls else "grpc"
    options: dict[str, Any] = {}
    if tls is not None:
        options["tls_certificates"] = [(tls.certificate, tls.key)]
        if tls.client_ca is not None:
            options |= {"verify_client": True, "root_certificates": tls.client_ca}
    try:
        if is_unix(config.host):
            return DataServer(f"grpc+unix://{data_socket(config.host)}", **service)
        return DataServer(f"{scheme}://{host_port(config.host, port)}", tls=options, **service)
    except (pa.ArrowException, OSError):
        raise cannot_listen(config.host, port) from None


def stop_data(server: DataServer, timeout_s: float) -> bool:
    """Stops the data server; False if a stream still hangs after `timeout_s` (a peer that reads nothing)."""
    stopper = threading.Thread(target=server.shutdown, name="data-shutdown", daemon=True)
    stopper.start()
    stopper.join(timeout_s)
    return not stopper.is_alive()


def cannot_listen(host: str, port: int) -> ConfigurationError:
    """The error for an address that gRPC refused: what it hides, a plain bind tells."""
    reason = "gRPC refused the address"
    try:
        addresses = [] if is_unix(host) else socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in addresses:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
    return ConfigurationError(f"can't listen on {host_port(host, port)}: {reason}. Choose another --listen")
