"""The server's settings: from command line and TOML file, checked at once, frozen."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torchcache import environment
from torchcache.addresses import UNIX, host_port, is_loopback, is_unix, parse_unix
from torchcache.errors import ConfigurationError
from torchcache.registry import RegistryAddress
from torchcache.sizes import parse_size
from torchcache_server.understore import check_name, shown_uri

from .logs import DEFAULT_FORMAT, DEFAULT_LEVEL, LogFormat, check_format, check_level

DEFAULT_LISTEN: Final = "127.0.0.1:7440"
DEFAULT_METRICS_HOST: Final = "127.0.0.1"
DEFAULT_DRAIN_S: Final = 60.0
EMBEDDED_DRAIN_S: Final = 40.0
DEFAULT_LEASE_S: Final = 10.0
DEFAULT_IDLE_S: Final = 15.0
WEIGHTS: Final = (0.01, 100.0)
DEFAULT_SCRUB_BYTES_S: Final = 32 * 1024 * 1024
MAX_SCRUB_BYTES_S: Final = 100 * 1024**3
MAX_SERVERS: Final = 64
_EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - refused


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM files of the server's certificate and its private key, and of the authority that signs its clients'."""

    certificate: Path
    key: Path
    client_ca: Path | None = None  # None: clients need no certificate


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Place of an embedded server: number `index` of the pool in folder `root`."""

    root: Path
    index: int
    idle_s: float = DEFAULT_IDLE_S  # it ends after so long without a client

    @property
    def folder(self) -> Path:
        return self.root / f"server-{self.index}"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """All a server needs to know. `port` 0 takes free ports; otherwise data is served on the port behind it.

    `host` may be the path of a Unix socket; then there are no ports.
    """

    host: str
    port: int
    store: Path
    capacity_bytes: int
    under_stores: tuple[tuple[str, str], ...]  # (name, URI)
    token_file: Path
    tls: Tls | None = None
    drain_s: float = DEFAULT_DRAIN_S
    metrics_port: int | None = None
    metrics_host: str = DEFAULT_METRICS_HOST
    metrics_insecure: bool = False  # off loopback, too, without TLS and a token
    scrub_bytes_s: int = DEFAULT_SCRUB_BYTES_S  # 0: no scrub
    min_free_bytes: int | None = None  # None: the store chooses
    lease_s: float = DEFAULT_LEASE_S  # the same for all servers of a pool
    max_pending_bytes: int | None = (
        None  # of checkpoints not uploaded yet; None: three quarters of the capacity
    )
    embedded: Embedded | None = None
    join: RegistryAddress | None = None
    pool: str | None = None  # its address, as clients have it; None: `join`'s, if that is given
    advertise: str | None = None  # the host by which others reach it; None: `host`
    weight: float = 1.0  # see pool_weight
    log_format: LogFormat = DEFAULT_FORMAT
    log_level: str = DEFAULT_LEVEL
    umask: int | None = None  # of what is written in file:// under-stores; None: the process's
    servers: int = 1  # more share the machine, each with a part of the capacity; see several.py

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65534:
            raise ConfigurationError(
                f"port {self.port}: give 0, or 1 to 65534, since data takes the one behind it"
            )
        if not 1 <= self.servers <= MAX_SERVERS:
            raise ConfigurationError(f"{self.servers} servers: give 1 to {MAX_SERVERS}")
        if not WEIGHTS[0] <= self.weight <= WEIGHTS[1]:
            raise ConfigurationError(f"a weight of {self.weight}: give {WEIGHTS[0]} to {WEIGHTS[1]:.0f}")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise ConfigurationError(f"metrics port {self.metrics_port} does not exist")
        if not 0 <= self.drain_s <= 86_400:
            raise ConfigurationError(f"a drain of {self.drain_s} s: give 0 to 86400")
        self._check_saves()
        if not 0 <= self.scrub_bytes_s <= MAX_SCRUB_BYTES_S:
            raise ConfigurationError(
                f"a scrub rate of {self.scrub_bytes_s} bytes a second: give 0, for none, to 100GiB"
            )
        if self.min_free_bytes is not None and self.min_free_bytes < 0:
            raise ConfigurationError(f"{self.min_free_bytes} bytes can't be left free: give 0 or more")
        if not self.under_stores:
            raise ConfigurationError("no under-store: give at least one, like --under-store s3=s3://")
        self._check_address()
        if self.metrics_port is not None and self.tls is None and not self.metrics_open:
            raise ConfigurationError(
                f"refusing to serve metrics on {self.metrics_host} without TLS: give --tls-cert and --tls-key, and "
                "Prometheus a token; or listen for it on 127.0.0.1; or say --metrics-insecure, where the network lets "
                "only Prometheus reach that port"
            )
        if self.join is None and self.advertise is not None:
            raise ConfigurationError("advertise is for a pool that is joined: give --join, too")
        if self.join is not None and self.advertise is None and self.host in _EVERYWHERE:
            raise ConfigurationError(
                f"{self.host} is no host by which others reach this server: give one with --advertise HOST"
            )
        for name, _ in self.under_stores:
            check_name(name)

    @property
    def metrics_open(self) -> bool:
        """Whether metrics are served in the clear, to whoever asks."""
        return self.metrics_insecure or is_loopback(self.metrics_host)

    @property
    def pool_address(self) -> str | None:
        """Where its pool's other servers are found; None: it knows of none."""
        return self.pool if self.pool is not None or self.join is None else str(self.join)

    @property
    def reached_at(self) -> str:
        """The host by which others reach it."""
        return self.advertise if self.advertise is not None else self.host

    @property
    def pool_weight(self) -> float:
        """How much of the pool it takes, beside what the same says of the others.

        Embedded ones share a disk evenly: what was free of it when each was started shall not count.
        """
        return self.weight * (self.capacity_bytes if self.embedded is None else 1.0)

    def _check_saves(self) -> None:
        if self.max_pending_bytes is not None and not 0 < self.max_pending_bytes <= self.capacity_bytes:
            raise ConfigurationError(
                f"{self.max_pending_bytes} bytes of checkpoints may wait for their upload: give 1 up to the capacity"
            )
        if not 0.1 <= self.lease_s <= 3600:
            raise ConfigurationError(f"a lease of {self.lease_s} s: give 0.1 to 3600")

    def _check_address(self) -> None:
        if self.tls is None and not is_loopback(self.host):
            raise ConfigurationError(
                f"refusing to listen on {self.host} without TLS: the token would travel in the clear. Give --tls-cert "
                "and --tls-key, or listen on 127.0.0.1 or unix:///folder/name.sock"
            )
        if is_unix(self.host) and self.tls is not None:
            raise ConfigurationError(
                "TLS is for the network: drop --tls-cert and --tls-key, or listen on HOST:PORT"
            )
        if is_unix(self.host) and self.join is not None:
            raise ConfigurationError(
                "a Unix socket can't be announced to other machines: drop --join, or listen on HOST:PORT"
            )

    @property
    def address(self) -> str:
        """Host and control port as asked for, or the socket."""
        return host_port(self.host, self.port)


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises ConfigurationError if it can't be read."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"the configuration file {path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the configuration file {path} is not TOML: {error}") from None


def from_settings(settings: Mapping[str, Any]) -> ServerConfig:
    """The configuration that `settings` describe: names and values as in the TOML file.

    listen, store, capacity, under_stores (a table), token_file, tls_cert, tls_key, tls_client_ca, drain_s,
    metrics_port, metrics_host, metrics_insecure, scrub_rate (bytes a second), min_free, lease_s, max_pending, weight,
    join, advertise, pool, log_format, log_level, servers; an embedded server has embedded (its pool's folder), index
    and idle_s in place of listen, store, join, pool and servers.
    None is the same as absent.

    Raises ConfigurationError, also for a setting that doesn't exist.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    _refuse_unknown(given)
    embedded = _embedded(given)
    host, port = parse_listen("127.0.0.1:0" if embedded else _text(given, "listen", DEFAULT_LISTEN))
    if "capacity" not in given:
        raise ConfigurationError("no capacity: say how much the store may hold, like --capacity 100GB")
    default_token = embedded.root / "token" if embedded else environment.token_file()
    return ServerConfig(
        host=host,
        port=port,
        store=embedded.folder / "store" if embedded else _path(given, "store"),
        capacity_bytes=parse_size(given["capacity"]),
        under_stores=_under_stores(given.get("under_stores", {})),
        token_file=_path(given, "token_file") if "token_file" in given else default_token,
        tls=_tls(given),
        drain_s=_number(given, "drain_s", EMBEDDED_DRAIN_S if embedded else DEFAULT_DRAIN_S),
        metrics_port=int(_number(given, "metrics_port", 0)) if "metrics_port" in given else None,
        metrics_host=_text(given, "metrics_host", DEFAULT_METRICS_HOST),
        metrics_insecure=_flag(given, "metrics_insecure"),
        scrub_bytes_s=_size_or_zero(given, "scrub_rate", DEFAULT_SCRUB_BYTES_S),
        min_free_bytes=_size_or_zero(given, "min_free", 0) if "min_free" in given else None,
        lease_s=_number(given, "lease_s", DEFAULT_LEASE_S),
        max_pending_bytes=parse_size(given["max_pending"]) if "max_pending" in given else None,
        embedded=embedded,
        join=RegistryAddress.parse(_text(given, "join")) if "join" in given else None,
        advertise=_text(given, "advertise") if "advertise" in given else None,
        pool=_text(given, "pool") if "pool" in given else None,
        weight=_number(given, "weight", 1.0),
        log_format=check_format(_text(given, "log_format", DEFAULT_FORMAT)),
        log_level=check_level(_text(given, "log_level", DEFAULT_LEVEL)),
        servers=_whole(given, "servers", 1),
    )


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[ipv6]:port"; of "unix:///path" the path, and 0. Raises ConfigurationError."""
    if text.startswith(UNIX):
        return parse_unix(text, within=text), 0
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_host = bool(bare) and not is_unix(bare) and (":" not in bare or host != bare)
    if not colon or not is_host or not port.isascii() or not port.isdigit():
        raise ConfigurationError(
            f"{text!r} is no address to listen on: write HOST:PORT, like {DEFAULT_LISTEN}, or unix:///folder/name.sock"
        )
    return bare, int(port)


def parse_under_stores(items: Iterable[str]) -> dict[str, str]:
    """The table of "NAME=URI" items. Raises ConfigurationError for other forms, and for a name given twice."""
    table: dict[str, str] = {}
    for item in items:
        name, equals, uri = item.partition("=")
        if not equals or not name or not uri or "://" in name:
            raise ConfigurationError(
                f"{shown_uri(item)!r} is no under-store: write NAME=URI, like s3=s3://bucket"
            )
        if name in table:
            raise ConfigurationError(f"the under-store {name!r} is given twice")
        table[name] = uri
    return table


_SETTINGS: Final = (
    "listen",
    "store",
    "capacity",
    "under_stores",
    "token_file",
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "drain_s",
    "metrics_port",
    "metrics_host",
    "metrics_insecure",
    "scrub_rate",
    "min_free",
    "lease_s",
    "max_pending",
    "join",
    "advertise",
    "pool",
    "weight",
    "log_format",
    "log_level",
    "servers",
    "embedded",
    "index",
    "idle_s",
)


_NOT_EMBEDDED: Final = frozenset(
    ("listen", "store", "tls_cert", "tls_key", "tls_client_ca", "join", "advertise", "pool", "servers")
)


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for name in given:
        if name not in _SETTINGS:
            near = difflib.get_close_matches(name, _SETTINGS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(_SETTINGS)}"
            raise ConfigurationError(f"there is no setting {name!r}{hint}")


def _embedded(given: Mapping[str, Any]) -> Embedded | None:
    if "embedded" not in given:
        for name in ("index", "idle_s"):
            if name in given:
                raise ConfigurationError(f"{name} belongs to an embedded server: give its pool's folder, too")
        return None
    extra = sorted(
        {"listen", "store", "tls_cert", "tls_key", "tls_client_ca", "join", "advertise", "pool", "servers"}
        & given.keys()
    )
    if extra:
        raise ConfigurationError(
            f"an embedded server chooses its address and store itself: drop {', '.join(extra)}"
        )
    index = int(_number(given, "index", 0))
    if index < 0:
        raise ConfigurationError(f"servers are numbered from 0, not {index}")
    idle_s = _number(given, "idle_s", DEFAULT_IDLE_S)
    if not 0 < idle_s <= 86_400:
        raise ConfigurationError(f"an idle time of {idle_s} s: give more than 0, up to 86400")
    return Embedded(root=_path(given, "embedded"), index=index, idle_s=idle_s)


def _under_stores(table: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(table, Mapping) or not all(isinstance(uri, str) for uri in table.values()):
        raise ConfigurationError('under_stores must be a table of names and URIs, like s3 = "s3://bucket"')
    return tuple((str(name), uri) for name, uri in table.items())


def _tls(given: Mapping[str, Any]) -> Tls | None:
    if not {"tls_cert", "tls_key", "tls_client_ca"} & given.keys():
        return None
    if "tls_cert" not in given or "tls_key" not in given:
        raise ConfigurationError("TLS needs both a certificate and its key: give --tls-cert and --tls-key")
    client_ca = _path(given, "tls_client_ca") if "tls_client_ca" in given else None
    return Tls(certificate=_path(given, "tls_cert"), key=_path(given, "tls_key"), client_ca=client_ca)


def _text(given: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = given.get(name, default)
    if not isinstance(value, str) or not value:
        raise ConfigurationError(
            f"{name} is missing" if value is None else f"{name} must be a text, not {value!r}"
        )
    return value


def _path(given: Mapping[str, Any], name: str) -> Path:
    value = given.get(name)
    return (value if isinstance(value, Path) else Path(_text(given, name))).expanduser().absolute()


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{name} must be a number, not {value!r}")
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be true or false, not {value!r}")
    return value


def _whole(given: Mapping[str, Any], name: str, default: int) -> int:
    value = _number(given, name, default)
    if value != int(value):
        raise ConfigurationError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def _size_or_zero(given: Mapping[str, Any], name: str, default: int) -> int:
    """Bytes of a size, or 0: parse_size takes none for a mistake."""
    value = given.get(name, default)
    if isinstance(value, str) and value.strip() == "0":
        return 0
    return 0 if value == 0 and not isinstance(value, bool) else parse_size(value)
