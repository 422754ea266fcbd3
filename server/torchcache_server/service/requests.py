"""What a client asked for, checked: protobuf in, plans of plain values out. Pure.

Everything that comes over the wire is bounds-checked here, once, so that no other module has to distrust it; but what
a save and its files may be called, cache/saves.py says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from torchcache.errors import ConfigurationError
from torchcache.marks import Marks
from torchcache.model import SAVE_PREFIX, UNKNOWN_SIZE, ChunkId, ObjectId, ObjectInfo
from torchcache.save_names import KEPT_PREFIXES, put_namespace, save_namespace
from torchcache.wire.v1 import cache_pb2
from torchcache_server.cache.ahead import MAX_CHUNKS, Piece, Wanted
from torchcache_server.cache.policies import PolicyChange

MAX_EXTENTS: Final = 65_536
MAX_OBJECTS: Final = 65_536
MAX_KEY_BYTES: Final = 4096
MAX_NAME_BYTES: Final = 1024
"""Of a version and of an under-store's name."""

MAX_OBJECT_BYTES: Final = 1 << 50
"""Larger than any object of any store: what claims more only wants its chunks counted."""

MAX_NAMESPACES: Final = 4096
"""In a report: a client names those it read from, once a second."""

MAX_REPORTED: Final = 1 << 50
"""Bytes, or chunks, that one report may tell of."""

MAX_EPOCH: Final = 1 << 31

MAX_ORDER_SAMPLES: Final = 1 << 32
"""Of an epoch: positions are 32 bits."""

MAX_AHEAD: Final = 4096
"""Chunks named at a time to be fetched ahead of use."""

MAX_NAMESPACE_BYTES: Final = MAX_KEY_BYTES + 2 * MAX_NAME_BYTES

MAX_PASSED_OVER: Final = 64
"""Servers that one read tells of."""

REASONS: Final = frozenset(("unreachable", "silent", "slow"))
"""For passing one over."""

MAX_CALL_S: Final = 120.0
DEFAULT_CALL_S: Final = 60.0
"""Where the caller sets no deadline."""

_SAVE_ID: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")
_SERVER_ID: Final = _SAVE_ID


Number = TypeVar("Number", np.uint64, np.uint32)


@dataclass(frozen=True, slots=True)
class ReportedUse:
    """What a client read from the store's files by itself."""

    namespaces: Sequence[str]
    chunks: int
    bytes: int
    marks: Marks


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """A read, column by column: extent i is bytes [start[i], end[i]) of objects[object[i]].

    `end` is -1 where the object's size is unknown and the extent goes to its end.
    """

    namespace: str
    objects: Sequence[ObjectInfo]
    object: Sequence[int]
    start: Sequence[int]
    end: Sequence[int]
    resident_only: bool
    suspect: bool
    timeout_s: float
    hedge: bool = False
    passed_over: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class WritePlan:
    """A write: rows of the stream are chunks of `objects`, to be stored under `namespace`."""

    namespace: str
    objects: Sequence[ObjectInfo]
    durable: bool

    @property
    def is_save(self) -> bool:
        """The bytes exist nowhere else yet: eviction must not take them."""
        return any(o.id.is_save and not o.id.is_sample for o in self.objects)


def read_plan(ticket: bytes) -> ReadPlan:
    """The read a ticket asks for. Raises ConfigurationError if it isn't one or points outside its objects."""
    request = cache_pb2.ReadRequest()
    _parse(request, ticket, "ticket")
    objects = object_infos(request.objects)
    count = len(request.object)
    if count > MAX_EXTENTS:
        raise ConfigurationError(
            f"a read of {count} extents: split it, {MAX_EXTENTS} are allowed in a request"
        )
    if not count == len(request.offset) == len(request.length):
        raise ConfigurationError("a read whose columns object, offset and length differ in length")
    index = np.array(request.object, dtype=np.int64)
    if count and int(index.max()) >= len(objects):
        raise ConfigurationError("a read points to an object that it doesn't list")
    start = np.array(request.offset, dtype=np.int64)
    length = np.array(request.length, dtype=np.int64)
    sizes = np.array([o.size for o in objects], dtype=np.int64)
    size = sizes[index] if count else sizes[:0]
    known = size != UNKNOWN_SIZE
    # Compared without adding offset and length, whose sum may overflow.
    bad = (start < 0) | (length < -1) | (known & ((start > size) | (length > size - start)))
    bad |= ~known & (length > np.iinfo(np.int64).max - np.maximum(start, 0))
    if bad.any():
        at = int(np.argmax(bad))
        raise ConfigurationError(
            f"bytes from {start[at]}, {length[at]} of them, do not lie within the {size[at]} bytes of the object",
            object=str(objects[index[at]].id),
        )
    end = np.where(length < 0, size, start + length)
    return ReadPlan(
        namespace=_fill_namespace(request.namespace, objects),
        objects=objects,
        object=index.tolist(),
        start=start.tolist(),
        end=end.tolist(),
        resident_only=request.resident_only,
        suspect=request.suspect,
        timeout_s=timeout(request.timeout_s),
        hedge=request.hedge,
        passed_over=_passed_over(request.passed_over),
    )


def _passed_over(told: Sequence[cache_pb2.PassedOver]) -> list[tuple[str, str]]:
    """Ids of servers, and why they are passed over; without reasons that only a later version knows."""
    if len(told) > MAX_PASSED_OVER:
        raise ConfigurationError(f"a read tells of {len(told)} servers: {MAX_PASSED_OVER} are allowed")
    for one in told:
        if not _SERVER_ID.fullmatch(one.server_id):
            raise ConfigurationError(
                f"a server's id is 1 to 64 letters, digits, - and _, not {one.server_id[:80]!r}"
            )
    return [(one.server_id, one.reason) for one in told if one.reason in REASONS]


def write_plan(command: bytes) -> WritePlan:
    """The write a descriptor's command announces.

    Raises ConfigurationError if it isn't one, if an object's size is unknown, or if an object is neither a computed
    sample nor a file of a save lying in its own namespace: what an under-store holds, only the server fills.
    """
    request = cache_pb2.WriteRequest()
    _parse(request, command, "descriptor")
    return WritePlan(*_writable(request.namespace, request.objects), request.durable)


def prepared_chunks(
    request: cache_pb2.PrepareWriteRequest,
) -> tuple[WritePlan, list[tuple[ChunkId, int, int]]]:
    """The write that a client wants to do by itself: each chunk with its object's size and its own.

    Raises ConfigurationError as `write_plan`, and for a chunk that its object doesn't have.
    """
    plan = WritePlan(*_writable(request.namespace, request.objects), durable=False)
    if len(request.object) != len(request.chunk):
        raise ConfigurationError("a write whose columns object and chunk differ in length")
    if len(request.chunk) > MAX_OBJECTS:
        raise ConfigurationError(
            f"a write of {len(request.chunk)} chunks: split it, {MAX_OBJECTS} are allowed"
        )
    chunks = []
    for number, index in zip(request.object, request.chunk, strict=True):
        if number >= len(plan.objects):
            raise ConfigurationError("a write points to an object that it doesn't list")
        info = plan.objects[number]
        if index >= info.chunk_count:
            raise ConfigurationError(
                f"there is no chunk {index} in an object of {info.size}", object=str(info.id)
            )
        chunk = ChunkId(info.id, index)
        chunks.append((chunk, info.size, chunk.length(info.size)))
    return plan, chunks


def _writable(name: str, refs: Iterable[cache_pb2.ObjectRef]) -> tuple[str, list[ObjectInfo]]:
    namespace = namespace_name(name)
    objects = object_infos(refs)
    for info in objects:
        if info.size < 0:
            raise ConfigurationError("a write must give the object's size", object=str(info.id))
        if not _may_write(namespace, info.id):
            raise ConfigurationError(
                f"clients write samples, and files of a save into its own namespace; not this into {namespace!r}",
                object=str(info.id),
            )
    return namespace, objects


def policy_change(request: cache_pb2.SetPolicyRequest) -> PolicyChange:
    """The change a request asks for. Raises ConfigurationError for numbers that are none; the rest Policy checks."""
    ttl_s = request.ttl_s if request.HasField("ttl_s") else None
    if ttl_s is not None and not math.isfinite(ttl_s):
        raise ConfigurationError(f"a time to live of {ttl_s} s: give a number of seconds, or 0 for none")
    return PolicyChange(
        pinned=request.pinned if request.HasField("pinned") else None,
        priority=request.priority if request.HasField("priority") else None,
        quota_bytes=request.quota_bytes if request.HasField("quota_bytes") else None,
        ttl_s=ttl_s,
    )


def reported_use(request: cache_pb2.ReportUseRequest) -> ReportedUse:
    """What a client says that it read. Raises ConfigurationError for what nobody can have read."""
    if len(request.namespaces) > MAX_NAMESPACES:
        raise ConfigurationError(
            f"{len(request.namespaces)} namespaces in a report: split it, {MAX_NAMESPACES} are allowed"
        )
    if not 0 <= request.chunks <= MAX_REPORTED or not 0 <= request.bytes <= MAX_REPORTED:
        raise ConfigurationError(f"nobody read {request.chunks} chunks of {request.bytes} bytes in all")
    names = tuple(map(namespace_name, request.namespaces))
    return ReportedUse(names, request.chunks, request.bytes, _column("marks", request.marks, np.uint64))


def told_piece(request: cache_pb2.TellOrderRequest) -> Piece:
    """A piece of an order. Raises ConfigurationError for one that can't be of any."""
    marks = _column("marks", request.marks, np.uint64)
    positions = _column("positions", request.positions, np.uint32)
    if not 0 <= request.epoch <= MAX_EPOCH or not 0 < request.length <= MAX_ORDER_SAMPLES:
        raise ConfigurationError(f"there is no epoch {request.epoch} of {request.length} samples")
    if not 0 < request.total <= MAX_CHUNKS or not 0 <= request.first < request.total:
        raise ConfigurationError(
            f"chunk {request.first} of an order of {request.total}: {MAX_CHUNKS} are allowed"
        )
    if not 0 < len(marks) == len(positions) or request.first + len(marks) > request.total:
        raise ConfigurationError("a piece of an order whose columns don't fit it or each other")
    if int(positions.max()) >= request.length:
        raise ConfigurationError("a piece of an order with positions beyond its end")
    return Piece(
        namespace=dataset_name(request.namespace),
        order=save_id(request.order),
        epoch=request.epoch,
        length=request.length,
        total=request.total,
        first=request.first,
        marks=marks,
        positions=positions,
        running=request.running,
    )


def wanted_ahead(request: cache_pb2.StageAheadRequest) -> list[Wanted]:
    """The chunks that are to be fetched ahead of use. Raises ConfigurationError."""
    objects = object_infos(request.objects)
    if not len(request.object) == len(request.chunk) == len(request.position):
        raise ConfigurationError("chunks whose columns object, chunk and position differ in length")
    if len(request.object) > MAX_AHEAD:
        raise ConfigurationError(
            f"{len(request.object)} chunks at a time: {MAX_AHEAD} are allowed, ask again"
        )
    wanted = []
    for number, index, position in zip(request.object, request.chunk, request.position, strict=True):
        if number >= len(objects):
            raise ConfigurationError("a chunk of an object that the request doesn't list")
        info = objects[number]
        if index >= info.chunk_count:
            raise ConfigurationError(
                f"there is no chunk {index} in an object of {info.size}", object=str(info.id)
            )
        wanted.append(Wanted(info, index, position))
    return wanted


def dataset_name(name: str) -> str:
    """The namespace of a dataset. Raises ConfigurationError for one of what must be kept."""
    if name.startswith(KEPT_PREFIXES):
        raise ConfigurationError(f"nothing is fetched ahead into {name[:100]!r}")
    return namespace_name(name)


def _column(name: str, data: bytes, kind: type[Number]) -> NDArray[Number]:
    """Numbers packed little-endian. Raises ConfigurationError."""
    if len(data) % np.dtype(kind).itemsize:
        raise ConfigurationError(f"{name} of {len(data)} bytes are no whole numbers")
    return np.frombuffer(data, np.dtype(kind).newbyteorder("<")).astype(kind)


def namespace_name(name: str) -> str:
    """A namespace's name as a client gave it. Raises ConfigurationError."""
    return _bounded("namespace", name, MAX_NAMESPACE_BYTES)


def object_infos(refs: Iterable[cache_pb2.ObjectRef]) -> list[ObjectInfo]:
    """The objects a request names. Raises ConfigurationError."""
    infos = [object_info(ref) for ref in refs]
    if len(infos) > MAX_OBJECTS:
        raise ConfigurationError(f"{len(infos)} objects in a request: split it, {MAX_OBJECTS} are allowed")
    return infos


def object_info(ref: cache_pb2.ObjectRef) -> ObjectInfo:
    """The object a reference names. Raises ConfigurationError."""
    # The files of a save are written and read once or twice, and every save's are others.
    remembers = not ref.version.startswith(SAVE_PREFIX)
    return (_remembered_info if remembers else _object_info)(ref.store, ref.key, ref.version, ref.size)


@lru_cache(8192)  # epochs name the same objects again and again, and an id keeps its encoding; 1 KB each
def _remembered_info(store: str, key: str, version: str, size: int) -> ObjectInfo:
    return _object_info(store, key, version, size)


def _object_info(store: str, key: str, version: str, size: int) -> ObjectInfo:
    id_ = ObjectId(under_store_name(store), object_key(key), _bounded("version", version, MAX_NAME_BYTES))
    if not UNKNOWN_SIZE <= size <= MAX_OBJECT_BYTES:
        raise ConfigurationError(f"an object can't have {size} bytes", object=str(id_))
    if size == UNKNOWN_SIZE and not (id_.is_sample or id_.is_save):
        raise ConfigurationError("only the size of a sample may be left open", object=str(id_))
    return ObjectInfo(id_, size)


def under_store_name(name: str) -> str:
    """An under-store's name as a client gave it. Raises ConfigurationError."""
    return _bounded("under-store", name, MAX_NAME_BYTES)


def object_key(key: str) -> str:
    """A key as a client gave it. Raises ConfigurationError."""
    return _bounded("key", key, MAX_KEY_BYTES)


def save_id(value: str) -> str:
    """The id of a save, or of an object's write, as a client gave it. Raises ConfigurationError."""
    if not _SAVE_ID.fullmatch(value):
        raise ConfigurationError(f"a save's id is 1 to 64 letters, digits, - and _, not {value[:80]!r}")
    return value


def timeout(asked_s: float) -> float:
    """Seconds a call may take: what the caller asked, within `MAX_CALL_S`; 0 takes `DEFAULT_CALL_S`.

    Raises ConfigurationError for a negative time or none at all.
    """
    if math.isnan(asked_s) or asked_s < 0:
        raise ConfigurationError(f"a timeout of {asked_s} s: give a number of seconds")
    return min(asked_s or DEFAULT_CALL_S, MAX_CALL_S)


def _may_write(namespace: str, id_: ObjectId) -> bool:
    if id_.is_sample:
        return not namespace.startswith(KEPT_PREFIXES)
    if not id_.is_save:
        return False
    folder, save_id = id_.key.rpartition("/")[0], id_.version.removeprefix(SAVE_PREFIX)
    return namespace in (put_namespace(id_), save_namespace(id_.store, folder, save_id))


def _parse(message: Message, data: bytes, what: str) -> None:
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise ConfigurationError(f"the {what} is not a torchcache {type(message).__name__}") from None


def _fill_namespace(asked: str, objects: Sequence[ObjectInfo]) -> str:
    """The namespace that fills go to: never one of bytes that must be kept, which a fill would make permanent."""
    if not asked or asked.startswith(KEPT_PREFIXES):
        return objects[0].id.store if objects else "none"
    return namespace_name(asked)


def _bounded(what: str, value: str, limit_bytes: int) -> str:
    if not value:
        raise ConfigurationError(f"the {what} is missing")
    if len(value) * 4 > limit_bytes and (size := len(value.encode())) > limit_bytes:
        raise ConfigurationError(f"a {what} of {size} bytes: {limit_bytes} are allowed")
    return value
