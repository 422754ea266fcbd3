from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AheadState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AHEAD_STATE_HERE: _ClassVar[AheadState]
    AHEAD_STATE_COMING: _ClassVar[AheadState]
    AHEAD_STATE_LATER: _ClassVar[AheadState]
    AHEAD_STATE_READ: _ClassVar[AheadState]
    AHEAD_STATE_FAILED: _ClassVar[AheadState]

class SaveState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SAVE_STATE_UNSPECIFIED: _ClassVar[SaveState]
    SAVE_STATE_RESERVED: _ClassVar[SaveState]
    SAVE_STATE_COMMITTED: _ClassVar[SaveState]
    SAVE_STATE_DURABLE: _ClassVar[SaveState]
    SAVE_STATE_FAILED: _ClassVar[SaveState]
AHEAD_STATE_HERE: AheadState
AHEAD_STATE_COMING: AheadState
AHEAD_STATE_LATER: AheadState
AHEAD_STATE_READ: AheadState
AHEAD_STATE_FAILED: AheadState
SAVE_STATE_UNSPECIFIED: SaveState
SAVE_STATE_RESERVED: SaveState
SAVE_STATE_COMMITTED: SaveState
SAVE_STATE_DURABLE: SaveState
SAVE_STATE_FAILED: SaveState

class ObjectRef(_message.Message):
    __slots__ = ("store", "key", "version", "size")
    STORE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    store: str
    key: str
    version: str
    size: int
    def __init__(self, store: _Optional[str] = ..., key: _Optional[str] = ..., version: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("namespace", "objects", "object", "offset", "length", "resident_only", "suspect", "timeout_s", "hedge", "passed_over")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_ONLY_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    HEDGE_FIELD_NUMBER: _ClassVar[int]
    PASSED_OVER_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    objects: _containers.RepeatedCompositeFieldContainer[ObjectRef]
    object: _containers.RepeatedScalarFieldContainer[int]
    offset: _containers.RepeatedScalarFieldContainer[int]
    length: _containers.RepeatedScalarFieldContainer[int]
    resident_only: bool
    suspect: bool
    timeout_s: float
    hedge: bool
    passed_over: _containers.RepeatedCompositeFieldContainer[PassedOver]
    def __init__(self, namespace: _Optional[str] = ..., objects: _Optional[_Iterable[_Union[ObjectRef, _Mapping]]] = ..., object: _Optional[_Iterable[int]] = ..., offset: _Optional[_Iterable[int]] = ..., length: _Optional[_Iterable[int]] = ..., resident_only: bool = ..., suspect: bool = ..., timeout_s: _Optional[float] = ..., hedge: bool = ..., passed_over: _Optional[_Iterable[_Union[PassedOver, _Mapping]]] = ...) -> None: ...

class PassedOver(_message.Message):
    __slots__ = ("server_id", "reason", "clients")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    reason: str
    clients: int
    def __init__(self, server_id: _Optional[str] = ..., reason: _Optional[str] = ..., clients: _Optional[int] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("namespace", "objects", "durable")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    objects: _containers.RepeatedCompositeFieldContainer[ObjectRef]
    durable: bool
    def __init__(self, namespace: _Optional[str] = ..., objects: _Optional[_Iterable[_Union[ObjectRef, _Mapping]]] = ..., durable: bool = ...) -> None: ...

class WriteReply(_message.Message):
    __slots__ = ("bytes", "working")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKING_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    working: bool
    def __init__(self, bytes: _Optional[int] = ..., working: bool = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UnderStoreInfo(_message.Message):
    __slots__ = ("name", "uri")
    NAME_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    name: str
    uri: str
    def __init__(self, name: _Optional[str] = ..., uri: _Optional[str] = ...) -> None: ...

class LocalStore(_message.Message):
    __slots__ = ("path", "kernel", "device", "inode")
    PATH_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INODE_FIELD_NUMBER: _ClassVar[int]
    path: str
    kernel: str
    device: int
    inode: int
    def __init__(self, path: _Optional[str] = ..., kernel: _Optional[str] = ..., device: _Optional[int] = ..., inode: _Optional[int] = ...) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("server_id", "instance", "version", "data_port", "under_stores", "local_store", "weight", "unix_s")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIELD_NUMBER: _ClassVar[int]
    UNDER_STORES_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STORE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    instance: str
    version: str
    data_port: int
    under_stores: _containers.RepeatedCompositeFieldContainer[UnderStoreInfo]
    local_store: LocalStore
    weight: float
    unix_s: float
    def __init__(self, server_id: _Optional[str] = ..., instance: _Optional[str] = ..., version: _Optional[str] = ..., data_port: _Optional[int] = ..., under_stores: _Optional[_Iterable[_Union[UnderStoreInfo, _Mapping]]] = ..., local_store: _Optional[_Union[LocalStore, _Mapping]] = ..., weight: _Optional[float] = ..., unix_s: _Optional[float] = ...) -> None: ...

class UnderStoreCounters(_message.Message):
    __slots__ = ("name", "read_requests", "read_bytes", "write_requests", "write_bytes", "meta_requests", "retries")
    NAME_FIELD_NUMBER: _ClassVar[int]
    READ_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WRITE_BYTES_FIELD_NUMBER: _ClassVar[int]
    META_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    read_requests: int
    read_bytes: int
    write_requests: int
    write_bytes: int
    meta_requests: int
    retries: int
    def __init__(self, name: _Optional[str] = ..., read_requests: _Optional[int] = ..., read_bytes: _Optional[int] = ..., write_requests: _Optional[int] = ..., write_bytes: _Optional[int] = ..., meta_requests: _Optional[int] = ..., retries: _Optional[int] = ...) -> None: ...

class NamespaceStatus(_message.Message):
    __slots__ = ("name", "bytes", "chunks", "pinned", "dirty", "priority", "quota_bytes", "ttl_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    DIRTY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes: int
    chunks: int
    pinned: bool
    dirty: bool
    priority: int
    quota_bytes: int
    ttl_s: float
    def __init__(self, name: _Optional[str] = ..., bytes: _Optional[int] = ..., chunks: _Optional[int] = ..., pinned: bool = ..., dirty: bool = ..., priority: _Optional[int] = ..., quota_bytes: _Optional[int] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("info", "store_path", "uptime_s", "capacity_bytes", "used_bytes", "chunks", "segments", "hits", "misses", "corrupt", "evicted_chunks", "passed_through", "filled_chunks", "filled_bytes", "served_bytes", "read_calls", "write_calls", "upload_pending_bytes", "under_stores", "namespaces", "spare_bytes", "dead_bytes", "overhead_bytes", "free_bytes", "recycled_segments", "compacted_bytes", "expired_chunks", "scrubbed_bytes", "scrub_rounds", "damaged_kept", "disk_errors", "out_of_service", "local_chunks", "local_bytes", "orders", "passed_over", "hedged_calls", "filling_bytes", "saves", "oldest_pending_s", "copies", "namespaces_left_out", "orders_left_out")
    class SavesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    INFO_FIELD_NUMBER: _ClassVar[int]
    STORE_PATH_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    EVICTED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PASSED_THROUGH_FIELD_NUMBER: _ClassVar[int]
    FILLED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    FILLED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_CALLS_FIELD_NUMBER: _ClassVar[int]
    WRITE_CALLS_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_PENDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNDER_STORES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    SPARE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    OVERHEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECYCLED_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    COMPACTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    SCRUBBED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SCRUB_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_KEPT_FIELD_NUMBER: _ClassVar[int]
    DISK_ERRORS_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_SERVICE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ORDERS_FIELD_NUMBER: _ClassVar[int]
    PASSED_OVER_FIELD_NUMBER: _ClassVar[int]
    HEDGED_CALLS_FIELD_NUMBER: _ClassVar[int]
    FILLING_BYTES_FIELD_NUMBER: _ClassVar[int]
    SAVES_FIELD_NUMBER: _ClassVar[int]
    OLDEST_PENDING_S_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    ORDERS_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    info: InfoReply
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
    read_calls: int
    write_calls: int
    upload_pending_bytes: int
    under_stores: _containers.RepeatedCompositeFieldContainer[UnderStoreCounters]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStatus]
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
    local_chunks: int
    local_bytes: int
    orders: _containers.RepeatedCompositeFieldContainer[OrderStatus]
    passed_over: _containers.RepeatedCompositeFieldContainer[PassedOver]
    hedged_calls: int
    filling_bytes: int
    saves: _containers.ScalarMap[str, int]
    oldest_pending_s: float
    copies: CopiesStatus
    namespaces_left_out: int
    orders_left_out: int
    def __init__(self, info: _Optional[_Union[InfoReply, _Mapping]] = ..., store_path: _Optional[str] = ..., uptime_s: _Optional[float] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., chunks: _Optional[int] = ..., segments: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., corrupt: _Optional[int] = ..., evicted_chunks: _Optional[int] = ..., passed_through: _Optional[int] = ..., filled_chunks: _Optional[int] = ..., filled_bytes: _Optional[int] = ..., served_bytes: _Optional[int] = ..., read_calls: _Optional[int] = ..., write_calls: _Optional[int] = ..., upload_pending_bytes: _Optional[int] = ..., under_stores: _Optional[_Iterable[_Union[UnderStoreCounters, _Mapping]]] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceStatus, _Mapping]]] = ..., spare_bytes: _Optional[int] = ..., dead_bytes: _Optional[int] = ..., overhead_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., recycled_segments: _Optional[int] = ..., compacted_bytes: _Optional[int] = ..., expired_chunks: _Optional[int] = ..., scrubbed_bytes: _Optional[int] = ..., scrub_rounds: _Optional[int] = ..., damaged_kept: _Optional[int] = ..., disk_errors: _Optional[int] = ..., out_of_service: _Optional[str] = ..., local_chunks: _Optional[int] = ..., local_bytes: _Optional[int] = ..., orders: _Optional[_Iterable[_Union[OrderStatus, _Mapping]]] = ..., passed_over: _Optional[_Iterable[_Union[PassedOver, _Mapping]]] = ..., hedged_calls: _Optional[int] = ..., filling_bytes: _Optional[int] = ..., saves: _Optional[_Mapping[str, int]] = ..., oldest_pending_s: _Optional[float] = ..., copies: _Optional[_Union[CopiesStatus, _Mapping]] = ..., namespaces_left_out: _Optional[int] = ..., orders_left_out: _Optional[int] = ...) -> None: ...

class CopiesStatus(_message.Message):
    __slots__ = ("wanted", "held", "made", "mended_chunks")
    WANTED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    MADE_FIELD_NUMBER: _ClassVar[int]
    MENDED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    wanted: int
    held: int
    made: int
    mended_chunks: int
    def __init__(self, wanted: _Optional[int] = ..., held: _Optional[int] = ..., made: _Optional[int] = ..., mended_chunks: _Optional[int] = ...) -> None: ...

class OrderStatus(_message.Message):
    __slots__ = ("namespace", "order", "epoch", "position", "length", "chunks", "ahead_bytes", "coming_chunks", "fetched_bytes", "left_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    AHEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMING_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
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
    def __init__(self, namespace: _Optional[str] = ..., order: _Optional[str] = ..., epoch: _Optional[int] = ..., position: _Optional[int] = ..., length: _Optional[int] = ..., chunks: _Optional[int] = ..., ahead_bytes: _Optional[int] = ..., coming_chunks: _Optional[int] = ..., fetched_bytes: _Optional[int] = ..., left_s: _Optional[float] = ...) -> None: ...

class ReportUseRequest(_message.Message):
    __slots__ = ("namespaces", "chunks", "bytes", "marks")
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    MARKS_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedScalarFieldContainer[str]
    chunks: int
    bytes: int
    marks: bytes
    def __init__(self, namespaces: _Optional[_Iterable[str]] = ..., chunks: _Optional[int] = ..., bytes: _Optional[int] = ..., marks: _Optional[bytes] = ...) -> None: ...

class ReportUseReply(_message.Message):
    __slots__ = ("wants_marks",)
    WANTS_MARKS_FIELD_NUMBER: _ClassVar[int]
    wants_marks: bool
    def __init__(self, wants_marks: bool = ...) -> None: ...

class TellOrderRequest(_message.Message):
    __slots__ = ("namespace", "order", "epoch", "length", "total", "first", "marks", "positions", "running")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    MARKS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    order: str
    epoch: int
    length: int
    total: int
    first: int
    marks: bytes
    positions: bytes
    running: bool
    def __init__(self, namespace: _Optional[str] = ..., order: _Optional[str] = ..., epoch: _Optional[int] = ..., length: _Optional[int] = ..., total: _Optional[int] = ..., first: _Optional[int] = ..., marks: _Optional[bytes] = ..., positions: _Optional[bytes] = ..., running: bool = ...) -> None: ...

class TellOrderReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StageAheadRequest(_message.Message):
    __slots__ = ("namespace", "order", "epoch", "objects", "object", "chunk", "position", "running")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    order: str
    epoch: int
    objects: _containers.RepeatedCompositeFieldContainer[ObjectRef]
    object: _containers.RepeatedScalarFieldContainer[int]
    chunk: _containers.RepeatedScalarFieldContainer[int]
    position: _containers.RepeatedScalarFieldContainer[int]
    running: int
    def __init__(self, namespace: _Optional[str] = ..., order: _Optional[str] = ..., epoch: _Optional[int] = ..., objects: _Optional[_Iterable[_Union[ObjectRef, _Mapping]]] = ..., object: _Optional[_Iterable[int]] = ..., chunk: _Optional[_Iterable[int]] = ..., position: _Optional[_Iterable[int]] = ..., running: _Optional[int] = ...) -> None: ...

class StageAheadReply(_message.Message):
    __slots__ = ("known", "epoch", "position", "ahead_bytes", "state", "errors")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    AHEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    known: bool
    epoch: int
    position: int
    ahead_bytes: int
    state: _containers.RepeatedScalarFieldContainer[AheadState]
    errors: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, known: bool = ..., epoch: _Optional[int] = ..., position: _Optional[int] = ..., ahead_bytes: _Optional[int] = ..., state: _Optional[_Iterable[_Union[AheadState, str]]] = ..., errors: _Optional[_Iterable[str]] = ...) -> None: ...

class ForgetOrderRequest(_message.Message):
    __slots__ = ("namespace", "order")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    order: str
    def __init__(self, namespace: _Optional[str] = ..., order: _Optional[str] = ...) -> None: ...

class ForgetOrderReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetPolicyRequest(_message.Message):
    __slots__ = ("namespace", "pinned", "priority", "quota_bytes", "ttl_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    pinned: bool
    priority: int
    quota_bytes: int
    ttl_s: float
    def __init__(self, namespace: _Optional[str] = ..., pinned: bool = ..., priority: _Optional[int] = ..., quota_bytes: _Optional[int] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("namespace",)
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    def __init__(self, namespace: _Optional[str] = ...) -> None: ...

class EvictReply(_message.Message):
    __slots__ = ("freed_bytes",)
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    freed_bytes: int
    def __init__(self, freed_bytes: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("store", "prefix", "start_after", "limit")
    STORE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    START_AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    store: str
    prefix: str
    start_after: str
    limit: int
    def __init__(self, store: _Optional[str] = ..., prefix: _Optional[str] = ..., start_after: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ("objects", "truncated")
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    objects: _containers.RepeatedCompositeFieldContainer[ObjectRef]
    truncated: bool
    def __init__(self, objects: _Optional[_Iterable[_Union[ObjectRef, _Mapping]]] = ..., truncated: bool = ...) -> None: ...

class ListFolderRequest(_message.Message):
    __slots__ = ("store", "prefix", "token", "start_after")
    STORE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    START_AFTER_FIELD_NUMBER: _ClassVar[int]
    store: str
    prefix: str
    token: str
    start_after: str
    def __init__(self, store: _Optional[str] = ..., prefix: _Optional[str] = ..., token: _Optional[str] = ..., start_after: _Optional[str] = ...) -> None: ...

class ListFolderReply(_message.Message):
    __slots__ = ("supported", "objects", "folders", "token", "starts_anywhere")
    SUPPORTED_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    FOLDERS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    STARTS_ANYWHERE_FIELD_NUMBER: _ClassVar[int]
    supported: bool
    objects: _containers.RepeatedCompositeFieldContainer[ObjectRef]
    folders: _containers.RepeatedScalarFieldContainer[str]
    token: str
    starts_anywhere: bool
    def __init__(self, supported: bool = ..., objects: _Optional[_Iterable[_Union[ObjectRef, _Mapping]]] = ..., folders: _Optional[_Iterable[str]] = ..., token: _Optional[str] = ..., starts_anywhere: bool = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ("store", "key")
    STORE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    store: str
    key: str
    def __init__(self, store: _Optional[str] = ..., key: _Optional[str] = ...) -> None: ...

class StageRequest(_message.Message):
    __slots__ = ("namespace", "objects")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    objects: _containers.RepeatedCompositeFieldContainer[ObjectRef]
    def __init__(self, namespace: _Optional[str] = ..., objects: _Optional[_Iterable[_Union[ObjectRef, _Mapping]]] = ...) -> None: ...

class StageReply(_message.Message):
    __slots__ = ("errors",)
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    errors: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, errors: _Optional[_Iterable[str]] = ...) -> None: ...

class ResidencyRequest(_message.Message):
    __slots__ = ("objects",)
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    objects: _containers.RepeatedCompositeFieldContainer[ObjectRef]
    def __init__(self, objects: _Optional[_Iterable[_Union[ObjectRef, _Mapping]]] = ...) -> None: ...

class ResidencyReply(_message.Message):
    __slots__ = ("resident_bytes", "resident_objects")
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    resident_bytes: _containers.RepeatedScalarFieldContainer[int]
    resident_objects: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, resident_bytes: _Optional[_Iterable[int]] = ..., resident_objects: _Optional[_Iterable[int]] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("store", "key", "write_id", "size", "create_only", "wait_s")
    STORE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    CREATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    store: str
    key: str
    write_id: str
    size: int
    create_only: bool
    wait_s: float
    def __init__(self, store: _Optional[str] = ..., key: _Optional[str] = ..., write_id: _Optional[str] = ..., size: _Optional[int] = ..., create_only: bool = ..., wait_s: _Optional[float] = ...) -> None: ...

class PublishReply(_message.Message):
    __slots__ = ("done", "object")
    DONE_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    done: bool
    object: ObjectRef
    def __init__(self, done: bool = ..., object: _Optional[_Union[ObjectRef, _Mapping]] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("store", "key")
    STORE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    store: str
    key: str
    def __init__(self, store: _Optional[str] = ..., key: _Optional[str] = ...) -> None: ...

class DeleteReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrepareWriteRequest(_message.Message):
    __slots__ = ("namespace", "objects", "object", "chunk", "timeout_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    objects: _containers.RepeatedCompositeFieldContainer[ObjectRef]
    object: _containers.RepeatedScalarFieldContainer[int]
    chunk: _containers.RepeatedScalarFieldContainer[int]
    timeout_s: float
    def __init__(self, namespace: _Optional[str] = ..., objects: _Optional[_Iterable[_Union[ObjectRef, _Mapping]]] = ..., object: _Optional[_Iterable[int]] = ..., chunk: _Optional[_Iterable[int]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class HandedOutFile(_message.Message):
    __slots__ = ("number", "nonce", "size")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    number: int
    nonce: int
    size: int
    def __init__(self, number: _Optional[int] = ..., nonce: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class PrepareWriteReply(_message.Message):
    __slots__ = ("write_id", "files", "file", "offset")
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    write_id: str
    files: _containers.RepeatedCompositeFieldContainer[HandedOutFile]
    file: _containers.RepeatedScalarFieldContainer[int]
    offset: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, write_id: _Optional[str] = ..., files: _Optional[_Iterable[_Union[HandedOutFile, _Mapping]]] = ..., file: _Optional[_Iterable[int]] = ..., offset: _Optional[_Iterable[int]] = ...) -> None: ...

class CommitWriteRequest(_message.Message):
    __slots__ = ("write_id", "durable")
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    write_id: str
    durable: bool
    def __init__(self, write_id: _Optional[str] = ..., durable: bool = ...) -> None: ...

class CommitWriteReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbandonWriteRequest(_message.Message):
    __slots__ = ("write_id",)
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    write_id: str
    def __init__(self, write_id: _Optional[str] = ...) -> None: ...

class AbandonWriteReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SaveRef(_message.Message):
    __slots__ = ("store", "path", "part", "save_id")
    STORE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    SAVE_ID_FIELD_NUMBER: _ClassVar[int]
    store: str
    path: str
    part: str
    save_id: str
    def __init__(self, store: _Optional[str] = ..., path: _Optional[str] = ..., part: _Optional[str] = ..., save_id: _Optional[str] = ...) -> None: ...

class ReserveSaveRequest(_message.Message):
    __slots__ = ("save", "overwrite", "writer")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_FIELD_NUMBER: _ClassVar[int]
    WRITER_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    overwrite: bool
    writer: str
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ..., overwrite: bool = ..., writer: _Optional[str] = ...) -> None: ...

class RenewSaveRequest(_message.Message):
    __slots__ = ("save",)
    SAVE_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ...) -> None: ...

class LeaseReply(_message.Message):
    __slots__ = ("lease_s", "replaceable")
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    REPLACEABLE_FIELD_NUMBER: _ClassVar[int]
    lease_s: float
    replaceable: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, lease_s: _Optional[float] = ..., replaceable: _Optional[_Iterable[str]] = ...) -> None: ...

class SavedFile(_message.Message):
    __slots__ = ("name", "size", "borrowed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BORROWED_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    borrowed: bool
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., borrowed: bool = ...) -> None: ...

class BorrowFilesRequest(_message.Message):
    __slots__ = ("save", "base", "names")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    base: SaveRef
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ..., base: _Optional[_Union[SaveRef, _Mapping]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class BorrowFilesReply(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class ReturnFilesRequest(_message.Message):
    __slots__ = ("save", "names")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class ReturnFilesReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BorrowedFile(_message.Message):
    __slots__ = ("name", "path", "save_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SAVE_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    save_id: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., save_id: _Optional[str] = ...) -> None: ...

class CommitSaveRequest(_message.Message):
    __slots__ = ("save", "files", "metadata", "manifest", "replicas")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    files: _containers.RepeatedCompositeFieldContainer[SavedFile]
    metadata: bytes
    manifest: bytes
    replicas: int
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ..., files: _Optional[_Iterable[_Union[SavedFile, _Mapping]]] = ..., metadata: _Optional[bytes] = ..., manifest: _Optional[bytes] = ..., replicas: _Optional[int] = ...) -> None: ...

class PrepareCopyRequest(_message.Message):
    __slots__ = ("save", "files", "metadata", "manifest", "overwrite", "replaceable", "writer", "owner", "committed_unix_s", "replicas")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_FIELD_NUMBER: _ClassVar[int]
    REPLACEABLE_FIELD_NUMBER: _ClassVar[int]
    WRITER_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    files: _containers.RepeatedCompositeFieldContainer[SavedFile]
    metadata: bytes
    manifest: bytes
    overwrite: bool
    replaceable: _containers.RepeatedScalarFieldContainer[str]
    writer: str
    owner: str
    committed_unix_s: float
    replicas: int
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ..., files: _Optional[_Iterable[_Union[SavedFile, _Mapping]]] = ..., metadata: _Optional[bytes] = ..., manifest: _Optional[bytes] = ..., overwrite: bool = ..., replaceable: _Optional[_Iterable[str]] = ..., writer: _Optional[str] = ..., owner: _Optional[str] = ..., committed_unix_s: _Optional[float] = ..., replicas: _Optional[int] = ...) -> None: ...

class PrepareCopyReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConfirmCopyRequest(_message.Message):
    __slots__ = ("save", "committed_unix_s", "replicas")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    committed_unix_s: float
    replicas: int
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ..., committed_unix_s: _Optional[float] = ..., replicas: _Optional[int] = ...) -> None: ...

class ConfirmCopyReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DropCopyRequest(_message.Message):
    __slots__ = ("save",)
    SAVE_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ...) -> None: ...

class DropCopyReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbandonSaveRequest(_message.Message):
    __slots__ = ("save",)
    SAVE_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ...) -> None: ...

class AbandonSaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeleteSaveRequest(_message.Message):
    __slots__ = ("save", "wait_s")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    wait_s: float
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ..., wait_s: _Optional[float] = ...) -> None: ...

class DeleteSaveReply(_message.Message):
    __slots__ = ("done",)
    DONE_FIELD_NUMBER: _ClassVar[int]
    done: bool
    def __init__(self, done: bool = ...) -> None: ...

class HoldSaveRequest(_message.Message):
    __slots__ = ("save", "reader_id", "reader", "release")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    READER_ID_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    reader_id: str
    reader: str
    release: bool
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ..., reader_id: _Optional[str] = ..., reader: _Optional[str] = ..., release: bool = ...) -> None: ...

class GetSaveRequest(_message.Message):
    __slots__ = ("store", "path", "part", "without_manifest", "check_claim")
    STORE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHECK_CLAIM_FIELD_NUMBER: _ClassVar[int]
    store: str
    path: str
    part: str
    without_manifest: bool
    check_claim: bool
    def __init__(self, store: _Optional[str] = ..., path: _Optional[str] = ..., part: _Optional[str] = ..., without_manifest: bool = ..., check_claim: bool = ...) -> None: ...

class SaveReply(_message.Message):
    __slots__ = ("save", "state", "manifest", "pending_bytes", "error", "committed_unix_s", "durable_unix_s", "total_bytes", "replicas", "superseded", "holder", "borrowed", "uncertain", "later_save_id")
    SAVE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    PENDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    DURABLE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    SUPERSEDED_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    BORROWED_FIELD_NUMBER: _ClassVar[int]
    UNCERTAIN_FIELD_NUMBER: _ClassVar[int]
    LATER_SAVE_ID_FIELD_NUMBER: _ClassVar[int]
    save: SaveRef
    state: SaveState
    manifest: bytes
    pending_bytes: int
    error: str
    committed_unix_s: float
    durable_unix_s: float
    total_bytes: int
    replicas: int
    superseded: bool
    holder: str
    borrowed: _containers.RepeatedCompositeFieldContainer[BorrowedFile]
    uncertain: bool
    later_save_id: str
    def __init__(self, save: _Optional[_Union[SaveRef, _Mapping]] = ..., state: _Optional[_Union[SaveState, str]] = ..., manifest: _Optional[bytes] = ..., pending_bytes: _Optional[int] = ..., error: _Optional[str] = ..., committed_unix_s: _Optional[float] = ..., durable_unix_s: _Optional[float] = ..., total_bytes: _Optional[int] = ..., replicas: _Optional[int] = ..., superseded: bool = ..., holder: _Optional[str] = ..., borrowed: _Optional[_Iterable[_Union[BorrowedFile, _Mapping]]] = ..., uncertain: bool = ..., later_save_id: _Optional[str] = ...) -> None: ...

class ListSavesRequest(_message.Message):
    __slots__ = ("store", "prefix")
    STORE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    store: str
    prefix: str
    def __init__(self, store: _Optional[str] = ..., prefix: _Optional[str] = ...) -> None: ...

class ListSavesReply(_message.Message):
    __slots__ = ("saves",)
    SAVES_FIELD_NUMBER: _ClassVar[int]
    saves: _containers.RepeatedCompositeFieldContainer[SaveReply]
    def __init__(self, saves: _Optional[_Iterable[_Union[SaveReply, _Mapping]]] = ...) -> None: ...

class CredentialsRequest(_message.Message):
    __slots__ = ("variables",)
    class VariablesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VARIABLES_FIELD_NUMBER: _ClassVar[int]
    variables: _containers.ScalarMap[str, str]
    def __init__(self, variables: _Optional[_Mapping[str, str]] = ...) -> None: ...

class CredentialsReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("wait_s",)
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    wait_s: float
    def __init__(self, wait_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("done", "left", "drain_s", "streams", "pending_bytes")
    DONE_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    PENDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    done: bool
    left: _containers.RepeatedScalarFieldContainer[str]
    drain_s: float
    streams: int
    pending_bytes: int
    def __init__(self, done: bool = ..., left: _Optional[_Iterable[str]] = ..., drain_s: _Optional[float] = ..., streams: _Optional[int] = ..., pending_bytes: _Optional[int] = ...) -> None: ...
