"""`connect`: from what a user gives as a pool to a `Pool`."""

from __future__ import annotations

from torchcache import environment
from torchcache.embedded import EmbeddedMembers
from torchcache.errors import ConfigurationError
from torchcache.lanes.access import Access, TlsConfig
from torchcache.local_pool import LocalPool, default_root, wanted_lane
from torchcache.pool.client import Pool
from torchcache.pool.discovery import member_source


def connect(
    pool: str | Pool | LocalPool | None = None,
    *,
    token: str | None = None,
    tls: TlsConfig | str | None = None,
    lane: str | None = None,
) -> Pool:
    """The pool at an address; nothing is opened yet.

    `pool` is "host:7440,host:7440" or "unix:///path.sock", or "etcd://host:2379/name" or "dns://name:7440", whose
    servers are looked for again while it is used, a Pool or LocalPool, or None: the address in `TORCHCACHE_POOL`, else
    the embedded pool of this user on this machine. `token` is the servers' token itself (default: the content of
    `TORCHCACHE_TOKEN_FILE`, or of `token` in `TORCHCACHE_HOME`). `tls` is a TlsConfig, or the path of the PEM file
    with the authority that signed the servers' certificates (default: `TORCHCACHE_TLS_CA`), to whom
    `TORCHCACHE_TLS_CERT` and `TORCHCACHE_TLS_KEY` prove who asks; without it only this machine's own servers are
    talked to. `lane` is how bytes travel: "local" reads the files of a server on this machine, "flight" the network,
    "auto" what is best for each server (default: `TORCHCACHE_LANE`, else "auto"). Raises
    ConfigurationError.
    """
    if isinstance(pool, Pool | LocalPool):
        if token is not None or tls is not None or lane is not None:
            raise ConfigurationError("token=, tls= and lane= belong to an address: a pool object has its own")
        return pool if isinstance(pool, Pool) else pool.pool
    address = pool if pool is not None else environment.pool_address()
    wanted = wanted_lane(lane)
    if address is None:
        if token is not None or tls is not None:
            raise ConfigurationError(
                "token= and tls= need the address of a pool: pass pool=, or set TORCHCACHE_POOL"
            )
        return Pool(EmbeddedMembers(root=default_root()), wanted)
    if not isinstance(address, str):
        raise ConfigurationError(f"pool={address!r}: give an address like host:7440, a Pool or a LocalPool")
    tls = environment.tls_ca() if tls is None else tls
    if isinstance(tls, str):
        certificate, key = environment.tls_client()
        tls = TlsConfig(ca=tls, certificate=certificate, key=key)
    access = Access(
        token=token,
        token_file=environment.token_file() if token is None else None,
        tls=tls,
    )
    return Pool(member_source(address, access), wanted)
