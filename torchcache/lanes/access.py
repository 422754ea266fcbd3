"""What opens a server's door: the token, and TLS."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from torchcache.errors import ConfigurationError
from torchcache.lanes.client_token import read_token


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """How to reach servers over TLS. Paths are of PEM files.

    `ca` verifies the servers (None: the machine's own authorities); `certificate` and `key` prove who we are, where
    the servers ask for it. `server_name` is the name that their certificates bear, where it isn't the one by which
    they are reached.
    """

    ca: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigurationError("TLS: certificate and key belong together, give both or neither")
        for path in (self.ca, self.certificate, self.key):
            if path is not None and not Path(path).is_file():
                raise ConfigurationError(f"TLS: there is no file {path}")

    def contents(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The PEM texts: authority, certificate, key."""
        ca, certificate, key = (
            Path(path).read_bytes() if path is not None else None
            for path in (self.ca, self.certificate, self.key)
        )
        return ca, certificate, key


@dataclass(frozen=True, kw_only=True)
class Access:
    """What opens the doors of a pool's servers.

    The token is `token`, else the first of `token_file`, read when it is first needed: only the file's name pickles.
    """

    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    tls: TlsConfig | None = None

    def bearer(self) -> str | None:
        """The value of the `authorization` header; None without a token, which the server then refuses to serve.

        Raises ConfigurationError for a file that can't be used, see `read_token`, and for what no header can hold.
        """
        token = self.token
        if token is None and self.token_file is not None:
            token = read_token(self.token_file)
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            where = "token=" if self.token is not None else f"the token file {self.token_file}"
            raise ConfigurationError(
                f"{where} is no token: give its printable characters alone, without the line's end or blanks"
            )
        return f"Bearer {token}" if token else None

    def without_token(self) -> str:
        """Why there is none, and what to do; for who was refused for that."""
        if self.token_file is None:
            return "the server wants a token: pass token="
        state = "holds no token" if self.token_file.exists() else "doesn't exist"
        return (
            f"the token file {self.token_file} {state}: copy the server's there, let TORCHCACHE_TOKEN_FILE name a "
            "copy, or pass token="
        )

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """For grpcio; None means no TLS."""
        if self.tls is None:
            return None
        ca, certificate, key = self.tls.contents()
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def server_name(self) -> str | None:
        """The name that the servers' certificates are checked for; None: the one they are reached by."""
        return self.tls.server_name if self.tls is not None else None
