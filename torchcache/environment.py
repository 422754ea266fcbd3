"""The one place where the library reads environment variables."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

_ENDPOINT_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
)
CREDENTIAL_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def pool_address() -> str | None:
    """`TORCHCACHE_POOL`: the pool `connect()` uses when no address is given."""
    return os.environ.get("TORCHCACHE_POOL") or None


def lane() -> str | None:
    """`TORCHCACHE_LANE`: the lane of pools that are given none."""
    return os.environ.get("TORCHCACHE_LANE") or None


def home() -> Path:
    """`TORCHCACHE_HOME`, else the user's cache folder: where the embedded pool keeps its store."""
    configured = os.environ.get("TORCHCACHE_HOME")
    return Path(configured) if configured else Path(platformdirs.user_cache_dir("torchcache"))


def token_file() -> Path:
    """`TORCHCACHE_TOKEN_FILE`, else `token` in `home()`: the token of servers started by hand."""
    configured = os.environ.get("TORCHCACHE_TOKEN_FILE")
    return Path(configured) if configured else home() / "token"


def tls_ca() -> str | None:
    """`TORCHCACHE_TLS_CA`: PEM file of the authority that signed the certificates of the pool's servers."""
    return os.environ.get("TORCHCACHE_TLS_CA") or None


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdTls:
    """PEM files for etcd: the authority that signed its certificate, and what proves who asks."""

    ca: str | None
    certificate: str | None
    key: str | None


def etcd_tls() -> EtcdTls:
    """`TORCHCACHE_ETCD_CA`, which makes it TLS, and `TORCHCACHE_ETCD_CERT` and `TORCHCACHE_ETCD_KEY`."""
    return EtcdTls(
        ca=os.environ.get("TORCHCACHE_ETCD_CA") or None,
        certificate=os.environ.get("TORCHCACHE_ETCD_CERT") or None,
        key=os.environ.get("TORCHCACHE_ETCD_KEY") or None,
    )


def tls_client() -> tuple[str | None, str | None]:
    """`TORCHCACHE_TLS_CERT` and `TORCHCACHE_TLS_KEY`: PEM files that prove to the pool's servers who asks."""
    return os.environ.get("TORCHCACHE_TLS_CERT") or None, os.environ.get("TORCHCACHE_TLS_KEY") or None


def world() -> tuple[int, int]:
    """`WORLD_SIZE` and `RANK`, as torchrun sets them: the number of ranks and this one's. (1, 0) if there are none."""
    try:
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    except ValueError:
        return 1, 0
    return (size, rank) if 0 <= rank < size else (1, 0)


def endpoint_settings() -> dict[str, str]:
    """The variables that say *which* S3 is meant, without secrets. Pools of different settings are kept apart."""
    return {name: os.environ[name] for name in _ENDPOINT_VARIABLES if name in os.environ}


def credentials() -> dict[str, str]:
    """The variables that say *who* asks."""
    return {name: os.environ[name] for name in CREDENTIAL_VARIABLES if name in os.environ}


def credentials_digest(variables: Mapping[str, str]) -> str:
    """Tells whether two processes have the same credentials without showing them: SHA-256, in hex."""
    text = json.dumps(
        {name: variables[name] for name in CREDENTIAL_VARIABLES if name in variables}, sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()
