"""The port for Prometheus: HTTP, for a bounded number of connections; over TLS and for tokens where others reach it."""

from __future__ import annotations

import logging
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from torchcache.errors import ConfigurationError
from torchcache_server.service.scopes import Tokens

from .config import ServerConfig
from .tls import server_context

MAX_CONNECTIONS: Final = 32
"""Open at once. One more takes the place of the oldest: a scrape takes milliseconds."""

SILENT_S: Final = 10.0
"""How long one may say nothing."""

_LOG = logging.getLogger(__name__)

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@contextmanager
def serve_metrics(config: ServerConfig, collector: Collector, tokens: Tokens) -> Iterator[None]:
    """Serves at the configured place within the block. Raises ConfigurationError if that can't be listened on."""
    registry = CollectorRegistry()
    registry.register(collector)
    app: App = make_wsgi_app(registry)
    context = None
    if config.tls is not None and not config.metrics_open:
        app, context = for_tokens(app, tokens), server_context(config.tls)
    host, port = config.metrics_host, config.metrics_port or 0
    try:
        server = MetricsServer(host, port, app, context)
    except OSError as error:
        raise ConfigurationError(f"metrics can't listen on {host}, port {port}: {error.strerror}") from None
    with server:
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def for_tokens(app: App, tokens: Tokens) -> App:
    """The same for those who bring one of the tokens, of whatever scope."""

    def checked(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if tokens.scope_of([environ.get("HTTP_AUTHORIZATION", "")]) is None:
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
            return [b"metrics are for who brings a token of this pool: Authorization: Bearer ...\n"]
        return app(environ, start_response)

    return checked


class MetricsServer(ThreadingMixIn, WSGIServer):
    """A thread a connection, for the newest `MAX_CONNECTIONS`."""

    daemon_threads = True
    request_queue_size = 2 * MAX_CONNECTIONS

    def __init__(self, host: str, port: int, app: App, context: ssl.SSLContext | None = None) -> None:
        """Raises OSError."""
        self._context = context
        self._lock = threading.Lock()
        self._open: dict[socket.socket, None] = {}
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), _Handler)
        self.set_app(app)

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection. Its handshake is its thread's: a silent one would keep out all others."""
        taken, address = super().get_request()
        if self._context is not None:
            taken = self._context.wrap_socket(taken, server_side=True, do_handshake_on_connect=False)
        return taken, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begins a connection's thread, and ends the oldest for it if there are too many."""
        with self._lock:
            self._open[request] = oldest = None
            if len(self._open) > MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
        if oldest is not None:
            with suppress(OSError):
                socket.socket.shutdown(oldest, socket.SHUT_RDWR)  # of TLS, too, without a word to its peer
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """The end of a connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Peers that break off or speak something else are their own affair."""
        level = logging.DEBUG if isinstance(sys.exception(), OSError) else logging.ERROR
        _LOG.log(level, "a request for metrics failed", exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = SILENT_S

    def log_message(self, format: str, *args: Any) -> None:
        pass
