"""What a pool tells about itself: frozen values that mirror the control service's replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from torchcache.errors import TorchCacheError
from torchcache.model import ObjectId
from torchcache.save_names import saved_file
from torchcache.wire.v1 import cache_pb2

SaveState = Literal["reserved", "committed", "durable", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderStoreStatus:
    """What one server sent to one of its under-stores since it started. Bytes are payload."""

    name: str
    uri: str
    read_requests: int
    read_bytes: int
    write_requests: int
    write_bytes: int
    meta_requests: int
    retries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceStatus:
    """One dataset or checkpoint in one server's store. `dirty`: not yet durable, so never evicted.

    The others are what a user asked of it, see `Pool.set_policy`; `quota_bytes` is this server's share.
    """

    name: str
    bytes: int
    chunks: int
    pinned: bool
    dirty: bool
    priority: int = 0
    quota_bytes: int | None = None
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderStatus:
    """The order in which one reader reads a dataset, as it told the server.

    `position` counts the samples of `epoch` that were read, of `length`; -1 before it begins. `chunks` are the server's
    own, of all epochs told; `ahead_bytes` were fetched for it and not yet read, of `fetched_bytes` in all. Forgotten in
    `left_s` unless the reader calls.
    """

    namespace: str
    order: str
    epoch: int
    position: int
    length: int
    chunks: int
    ahead_bytes: int
    coming_chunks: int
    fetched_bytes: int
    left_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver:
    """A server that `clients` processes, as they told another lately, ask after all others.

    `reason`: it is "unreachable", "silent", or "slow", far slower than the others.
    """

    server_id: str
    reason: str
    clients: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesStatus:
    """Copies of the checkpoints that wait for their upload at one server, which looks after them.

    They are to have `wanted` at all servers together, and have `held`, as far as was found. `made` counts those made
    again in place of lost ones, `mended_chunks` what was damaged there and fetched from another, since it started.
    """

    wanted: int
    held: int
    made: int
    mended_chunks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """One server, as it sees itself. Counters run since it started.

    Of the store's disk: `spare_bytes` are in files kept to be written again, `dead_bytes` in segments where chunks
    were, `overhead_bytes` in the index and the records beside it, `free_bytes` left on the file system. `damaged_kept`
    counts damaged chunks that stay because there is no other copy. `out_of_service` says why the disk is not used any
    more; empty while it is. `served_bytes` travelled by the flight lane; `local_chunks` and `local_bytes` clients read
    from the store's files themselves, by what they say. `weight` is how much of the pool it takes, beside the
    others' weights; 0.0 of a version that has none. `hedged_calls` are of `read_calls` those that another server was
    late for; `filling_bytes` are being fetched from under-stores now; `passed_over` are other servers, by what clients
    told this one within a minute. `saves` counts the checkpoints that it holds by how far they are: "saving", "cached",
    "replicated", "durable", "failed"; "copy" are those that another server owns. Of very many `namespaces` and `orders`
    those that don't fit into an answer of some megabytes are only counted, as `namespaces_left_out`, smallest datasets
    first, and `orders_left_out`. `oldest_pending_s` is how long ago the checkpoint was committed that waits longest for
    its upload there; 0.0 if none does. `copies` is None of a server that doesn't know of the others, and so looks after
    no copies.
    """

    address: str
    server_id: str
    instance: str
    version: str
    store_path: str
    uptime_s: float
    capacity_bytes: int
    used_bytes: int
    chunks: int
    segments: int
    hits: int
    misses: int
    corrupt: int
    evicted_chunks: int
    passed_through: int
    filled_chunks: int
    filled_bytes: int
    served_bytes: int
    local_chunks: int
    local_bytes: int
    read_calls: int
    write_calls: int
    upload_pending_bytes: int
    spare_bytes: int
    dead_bytes: int
    overhead_bytes: int
    free_bytes: int
    recycled_segments: int
    compacted_bytes: int
    expired_chunks: int
    scrubbed_bytes: int
    scrub_rounds: int
    damaged_kept: int
    disk_errors: int
    out_of_service: str
    under_stores: tuple[UnderStoreStatus, ...]
    namespaces: tuple[NamespaceStatus, ...]
    orders: tuple[OrderStatus, ...] = ()
    weight: float = 0.0
    hedged_calls: int = 0
    filling_bytes: int = 0
    passed_over: tuple[PassedOver, ...] = ()
    saves: dict[str, int] = field(default_factory=dict)
    namespaces_left_out: int = 0
    orders_left_out: int = 0
    oldest_pending_s: float = 0.0
    copies: CopiesStatus | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """How much of some objects the pool holds. Objects count as resident when they are held whole.

    `bytes` counts only objects whose size is known beforehand: computed samples count as objects alone.
    """

    objects: int
    resident_objects: int
    bytes: int
    resident_bytes: int

    @property
    def fraction(self) -> float:
        """Resident bytes of all bytes, or objects of all objects where no size is known; 1.0 of nothing."""
        if self.bytes:
            return self.resident_bytes / self.bytes
        return self.resident_objects / self.objects if self.objects else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatistics:
    """What this process asked of the pool since it first used it.

    `lanes` maps a server's address to the lane its bytes travel by, `lane_reasons` to why that isn't the local one,
    empty if it is. `local_extents` and `local_bytes` of `extents` and `read_bytes` this process read from a server's
    files itself, and `local_writes` of `write_calls` it wrote into them; the others came by the flight lane.
    `read_calls` and `write_calls` count calls to a server (do_get, do_put), not samples; `extents` and `read_bytes`
    what they delivered, `written_bytes` what was acknowledged; `retries` calls made again, and `retries_refused` those
    that were not, because a tenth of all calls is the most that is made again.

    `out` maps the addresses of servers that reads pass over to the reason, `put_out` counts how often that began, and
    `probes` how often one was tried. `hedges` are calls that were late and asked of the next server too, with
    `hedged_extents` in them; `hedges_won` those that it answered first; `hedges_refused` those that were not made,
    because a twentieth of all extents, less where hedges were in vain, may be asked for twice; a call of more than 256
    counts as one of 256.
    """

    lanes: dict[str, str]
    lane_reasons: dict[str, str] = field(default_factory=dict)
    local_extents: int = 0
    local_bytes: int = 0
    local_writes: int = 0
    read_calls: int = 0
    write_calls: int = 0
    control_calls: int = 0
    extents: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    retries: int = 0
    retries_refused: int = 0
    suspects: int = 0
    out: dict[str, str] = field(default_factory=dict)
    put_out: int = 0
    probes: int = 0
    hedges: int = 0
    hedged_extents: int = 0
    hedges_won: int = 0
    hedges_refused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveInfo:
    """One save of a checkpoint. Times are seconds since the epoch, 0.0 where it hasn't happened.

    `manifest` and `borrowed` are empty in listings. `error` says why a failed save failed. `replicas` is how many
    servers held it when it was committed; `server` the id of the one that says this. `borrowed`: files that lie in the
    pool as those of another save, by name, its path and id.
    """

    store: str
    path: str
    part: str
    save_id: str
    state: SaveState
    manifest: bytes
    pending_bytes: int
    total_bytes: int
    error: TorchCacheError | None
    committed_unix_s: float
    durable_unix_s: float
    replicas: int = 1
    server: str = ""
    borrowed: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def file(self, name: str) -> ObjectId:
        """A file of the save, as the pool holds it."""
        path, save_id = self.borrowed.get(name, (self.path, self.save_id))
        return saved_file(self.store, path, name, save_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A path that is a save's, for `lease_s` seconds unless renewed.

    `servers` are the ids of those that shall hold the save, the one that commits it first; `wanted` how many there
    should be. The others are what they are told of it.
    """

    lease_s: float
    servers: tuple[str, ...]
    wanted: int
    writer: str
    overwrite: bool
    replaceable: tuple[str, ...] = ()


def server_status(reply: cache_pb2.StatusReply, address: str) -> ServerStatus:
    """The status a reply tells of."""
    uris = {store.name: store.uri for store in reply.info.under_stores}
    stores = tuple(
        UnderStoreStatus(
            name=u.name,
            uri=uris.get(u.name, ""),
            read_requests=u.read_requests,
            read_bytes=u.read_bytes,
            write_requests=u.write_requests,
            write_bytes=u.write_bytes,
            meta_requests=u.meta_requests,
            retries=u.retries,
        )
        for u in reply.under_stores
    )
    namespaces = tuple(map(namespace_status, reply.namespaces))
    same = {name: getattr(reply, name) for name in _SAME}
    return ServerStatus(
        address=address,
        server_id=reply.info.server_id,
        instance=reply.info.instance,
        version=reply.info.version,
        under_stores=stores,
        namespaces=namespaces,
        orders=tuple(map(_order_status, reply.orders)),
        weight=reply.info.weight,
        passed_over=tuple(
            PassedOver(server_id=one.server_id, reason=one.reason, clients=one.clients)
            for one in reply.passed_over
        ),
        saves=dict(reply.saves),
        copies=_copies_status(reply.copies) if reply.HasField("copies") else None,
        **same,
    )


def _copies_status(reply: cache_pb2.CopiesStatus) -> CopiesStatus:
    return CopiesStatus(**{one.name: getattr(reply, one.name) for one in fields(CopiesStatus)})


def _order_status(reply: cache_pb2.OrderStatus) -> OrderStatus:
    return OrderStatus(**{one.name: getattr(reply, one.name) for one in fields(OrderStatus)})


def namespace_status(reply: cache_pb2.NamespaceStatus) -> NamespaceStatus:
    """The namespace a reply tells of."""
    return NamespaceStatus(
        name=reply.name,
        bytes=reply.bytes,
        chunks=reply.chunks,
        pinned=reply.pinned,
        dirty=reply.dirty,
        priority=reply.priority,
        quota_bytes=reply.quota_bytes or None,
        ttl_s=reply.ttl_s or None,
    )


_SAME = tuple(
    one.name
    for one in fields(ServerStatus)
    if one.name in cache_pb2.StatusReply.DESCRIPTOR.fields_by_name
    and one.name not in ("under_stores", "namespaces", "orders", "passed_over", "saves", "copies")
)
