"""`connect`: from what a user gives as a pool to a `Pool`."""

from __future__ import annotations

from torchcache.local_pool import LocalPool
from torchcache.pool.client import Pool
from torchcache.pool.members import TlsConfig


def connect(
    pool: str | Pool | LocalPool | None = None,
    *,
    token: str | None = None,
    tls: TlsConfig | str | None = None,
) -> Pool:
    """The pool at an address; nothing is opened yet.

    `pool` is "host:7440,host:7440", a Pool or LocalPool, or None: the address in `TORCHCACHE_POOL`, else the embedded
    pool of this user on this machine. `token` is the servers' token itself (default: the content of
    `TORCHCACHE_TOKEN_FILE`, or of `token` in `TORCHCACHE_HOME`). `tls` is a TlsConfig, or the path of the PEM file
    with the authority that signed the servers' certificates. Raises ConfigurationError.
    """
    raise NotImplementedError
