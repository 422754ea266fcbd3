"""The port for Prometheus: whom it answers, and that nobody keeps it."""

from __future__ import annotations

import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, make_wsgi_app
from torchcache_server.process.config import Tls
from torchcache_server.process.metrics_port import MAX_CONNECTIONS, MetricsServer, _Handler, for_tokens
from torchcache_server.process.tls import server_context
from torchcache_server.service.scopes import Tokens

from torchcache.cli.certificates import Pair, make_authority, make_certificate
from torchcache.tokens import Scope, ScopedToken


@contextmanager
def serving(*, tokens: Tokens | None = None, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of one that has a counter to tell of."""
    registry = CollectorRegistry()
    Counter("told", "So that there is something", registry=registry).inc()
    app = make_wsgi_app(registry)
    with MetricsServer("127.0.0.1", 0, app if tokens is None else for_tokens(app, tokens), context) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def scrape(port: int, token: str = "", context: ssl.SSLContext | None = None) -> str:
    url = f"{'https' if context else 'http'}://127.0.0.1:{port}/metrics"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=60, context=context) as answer:
        text: str = answer.read().decode()
        return text


def silent(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def half(port: int) -> socket.socket:
    begun = silent(port)
    begun.sendall(b"GET /metrics HTTP/1.1\r\nHost")
    return begun


@pytest.mark.hostile("exhaustion")
@pytest.mark.parametrize("caller", [silent, half])
def test_connections_that_say_nothing_keep_nobody_out(caller: Callable[[int], socket.socket]) -> None:
    with serving() as port, ExitStack() as open_ones:
        callers = [open_ones.enter_context(caller(port)) for _ in range(MAX_CONNECTIONS + 20)]
        for first in callers[:20]:
            assert first.recv(1) == b"", "the newer ones have taken its place"
        assert "told_total 1.0" in scrape(port)


@pytest.mark.hostile("exhaustion")
def test_who_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Handler, "timeout", 0.05)
    with serving() as port, closing(silent(port)) as caller:
        assert caller.recv(1) == b""


def written(folder: Path, name: str, pair: Pair) -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    certificate.write_bytes(pair.certificate)
    key.write_bytes(pair.key)
    return certificate, key


@pytest.mark.hostile("auth")
def test_off_loopback_it_takes_tls_and_a_token(tmp_path: Path) -> None:
    authority = make_authority()
    made = make_certificate(authority, "server", ["127.0.0.1"], days=1)
    certificate, key = written(tmp_path, "server", made)
    context = server_context(Tls(certificate=certificate, key=key))
    roots, _ = written(tmp_path, "ca", authority)
    tokens = Tokens([ScopedToken(Scope.READ, "a-token-of-readers")])
    trusting = ssl.create_default_context(cafile=str(roots))
    with (
        serving(tokens=tokens, context=context) as port,
        closing(silent(port)),
    ):  # who would keep the handshake
        assert "told_total 1.0" in scrape(port, "a-token-of-readers", trusting)
        for token in ("", "another"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                scrape(port, token, trusting)
        with pytest.raises(OSError, match=r".*"):
            scrape(port, "a-token-of-readers")
