"""What the two ports prove themselves with, read and tried before they listen: gRPC would only say it can't bind."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field

from torchcache.errors import ConfigurationError

from .config import Tls


@dataclass(frozen=True, slots=True)
class TlsContents:
    """The server's certificate and key, and the authority of its clients' if they need one; PEM."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None = None


def server_context(tls: Tls) -> ssl.SSLContext:
    """For a port that isn't gRPC's. Raises ssl.SSLError or OSError for files that can't be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key, password=lambda: b"")
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def read_tls(tls: Tls) -> TlsContents:
    """Raises ConfigurationError that names the files which can't be used."""
    files = [str(file) for file in (tls.certificate, tls.key, tls.client_ca) if file is not None]
    try:
        server_context(tls)
        return TlsContents(
            tls.certificate.read_bytes(),
            tls.key.read_bytes(),
            tls.client_ca.read_bytes() if tls.client_ca is not None else None,
        )
    except ssl.SSLError as error:
        authority = ", and an authority of clients" if tls.client_ca is not None else ""
        raise ConfigurationError(
            f"{', '.join(files)} are no TLS certificate and its unencrypted key{authority}, PEM: {error}"
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"the TLS files {', '.join(files)} can't be read: {error.strerror}"
        ) from None
