"""Who serves a pool: addresses as people write them, and what opens a server's door."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torchcache.errors import ConfigurationError

DEFAULT_PORT = 7440


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """How to reach servers over TLS. Paths are of PEM files.

    `ca` verifies the servers (None: the machine's own authorities); `certificate` and `key` prove who we are, where
    the servers ask for it.
    """

    ca: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigurationError("TLS: certificate and key belong together, give both or neither")
        for path in (self.ca, self.certificate, self.key):
            if path is not None and not Path(path).is_file():
                raise ConfigurationError(f"TLS: there is no file {path}")


@dataclass(frozen=True, kw_only=True)
class Access:
    """What opens the door of a pool's servers.

    The token is `token`, else the content of `token_file`, read when first needed: only the file's name pickles.
    """

    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    tls: TlsConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One server's doors. `data_port` 0 and an empty `server_id` are not known yet: the server tells them."""

    host: str
    port: int
    data_port: int = 0
    server_id: str = ""

    @property
    def address(self) -> str:
        """`host:port` of the control door: how users, messages and statistics name the server."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class MemberSource(Protocol):
    """Where a pool's servers come from. Pickles; holds nothing open."""

    @property
    def description(self) -> str:
        """How messages name the pool: its address, or the embedded pool's folder."""

    @property
    def access(self) -> Access: ...

    @property
    def embedded(self) -> bool:
        """Whether the pool lives only as long as somebody on this machine uses it."""

    def resolve(self, *, deadline: float) -> list[Endpoint]:
        """The servers now. Called again when one could not be reached; may start what is missing.

        `deadline` is a time.monotonic() value.
        """
