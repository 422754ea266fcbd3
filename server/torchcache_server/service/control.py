"""The control service: protobuf in, calls of the cache, protobuf out. No decisions are made here."""

# ruff: noqa: N802 - gRPC calls the methods by the names in the proto file

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Protocol

import grpc

from torchcache.environment import CREDENTIAL_VARIABLES
from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache.model import ChunkId, ObjectInfo
from torchcache.save_names import KEPT_PREFIXES
from torchcache.wire.status import encode_error
from torchcache.wire.v1 import cache_pb2 as pb
from torchcache.wire.v1 import cache_pb2_grpc
from torchcache_server.cache.ahead import Ahead, StageAhead
from torchcache_server.cache.policies import Policies
from torchcache_server.cache.read_through import ReadThrough
from torchcache_server.cache.stage import resident_bytes, stage
from torchcache_server.cache.write_back import WriteBack
from torchcache_server.store import NamespaceUsage, Store
from torchcache_server.understore import UnderStore

from .calls import deadline_of, remaining_s
from .counters import CopyCounts, ServiceCounters
from .draining import Draining
from .request_log import RequestLog, current, level_of
from .requests import (
    dataset_name,
    namespace_name,
    object_infos,
    object_key,
    policy_change,
    prepared_chunks,
    reported_use,
    save_id,
    timeout,
    told_piece,
    wanted_ahead,
)
from .saves import SaveCalls
from .status_size import (
    MAX_NAMESPACES_BYTES,
    MAX_ORDERS_BYTES,
    MAX_PASSED_OVER_BYTES,
    by_weight,
    fitting,
)

MAX_PAGE: Final = 1000
"""Objects in a page of a listing: as many as S3 gives at once, and within the bound of a control message."""


MAX_LEFT: Final = 1000
"""URIs that a reply names."""


class CredentialsSink(Protocol):
    """Takes new credentials of the user who started the server. Raises ConfigurationError where that isn't allowed."""

    def __call__(self, variables: Mapping[str, str]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What a server says of itself."""

    server_id: str
    instance: str
    version: str
    data_port: int
    weight: float
    store_path: Path
    local_store: pb.LocalStore
    started_s: float  # time.monotonic()


class ControlService(SaveCalls, cache_pb2_grpc.ControlServicer):
    """Translates; the interceptor has checked the token, and turns what is raised here into status.

    `copies` tells of the copies that the server looks after; None if it looks after none.
    """

    def __init__(
        self,
        *,
        facts: ServerFacts,
        store: Store,
        under_stores: Mapping[str, UnderStore],
        read_through: ReadThrough,
        write_back: WriteBack,
        policies: Policies,
        ahead: StageAhead,
        counters: ServiceCounters,
        set_credentials: CredentialsSink,
        copies: Callable[[], CopyCounts | None] = lambda: None,
        log: RequestLog | None = None,
        draining: Draining | None = None,
        drain_s: float = 0.0,
        streams: Callable[[], int] = lambda: 0,
    ) -> None:
        self._facts = facts
        self._store = store
        self._under_stores = under_stores
        self._read_through = read_through
        self._write_back = write_back
        self._policies = policies
        self._ahead = ahead
        self._counters = counters
        self._set_credentials = set_credentials
        self._draining = draining or Draining(instead="it has no process of its own")
        self._drain_s = drain_s
        self._streams = streams
        self._copies = copies
        self._log = log or RequestLog()

    # ---- the server ----

    def GetInfo(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoReply:
        facts = self._facts
        return pb.InfoReply(
            server_id=facts.server_id,
            instance=facts.instance,
            version=facts.version,
            data_port=facts.data_port,
            under_stores=[pb.UnderStoreInfo(name=u.name, uri=u.uri) for u in self._under_stores.values()],
            local_store=facts.local_store,
            weight=facts.weight,
            unix_s=time.time(),
        )

    def GetStatus(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:
        usage = self._store.usage()
        served = self._counters
        namespaces, namespaces_left_out = fitting(
            _namespace_status, by_weight(self._store.namespaces()), MAX_NAMESPACES_BYTES
        )
        orders, orders_left_out = fitting(_order_status, self._ahead.standings(), MAX_ORDERS_BYTES)
        said_most = sorted(served.passed_over.counts().items(), key=lambda one: (-one[1], one[0]))
        passed_over, _ = fitting(_passed_over, said_most, MAX_PASSED_OVER_BYTES)
        return pb.StatusReply(
            info=self.GetInfo(pb.InfoRequest(), context),
            store_path=str(self._facts.store_path),
            uptime_s=time.monotonic() - self._facts.started_s,
            capacity_bytes=usage.capacity_bytes,
            used_bytes=usage.used_bytes,
            chunks=usage.chunks,
            segments=usage.segments,
            hits=usage.hits,
            misses=usage.misses,
            corrupt=usage.corrupt,
            evicted_chunks=usage.evicted_chunks,
            passed_through=self._read_through.passed_through,
            filled_chunks=self._read_through.filled_chunks,
            filled_bytes=self._read_through.filled_bytes,
            filling_bytes=self._read_through.filling_bytes,
            served_bytes=served.served_bytes,
            local_chunks=served.local_chunks,
            local_bytes=served.local_bytes,
            read_calls=served.read_calls,
            write_calls=served.write_calls,
            upload_pending_bytes=self._write_back.pending_bytes,
            saves=self._write_back.counts(),
            oldest_pending_s=self._write_back.holdings.oldest_s,
            copies=_copies_status(self._copies()),
            under_stores=[_counters(under_store) for under_store in self._under_stores.values()],
            namespaces=namespaces,
            namespaces_left_out=namespaces_left_out,
            spare_bytes=usage.spare_bytes,
            dead_bytes=usage.dead_bytes,
            overhead_bytes=usage.overhead_bytes,
            free_bytes=usage.free_bytes,
            recycled_segments=usage.recycled_segments,
            compacted_bytes=usage.compacted_bytes,
            expired_chunks=usage.expired_chunks,
            scrubbed_bytes=usage.scrubbed_bytes,
            scrub_rounds=usage.scrub_rounds,
            damaged_kept=usage.damaged_kept,
            disk_errors=usage.disk_errors,
            out_of_service=usage.out_of_service,
            orders=orders,
            orders_left_out=orders_left_out,
            hedged_calls=served.hedged_calls,
            passed_over=passed_over,
        )

    def SetCredentials(
        self, request: pb.CredentialsRequest, context: grpc.ServicerContext
    ) -> pb.CredentialsReply:
        unknown = sorted(set(request.variables) - set(CREDENTIAL_VARIABLES))
        if unknown:
            raise ConfigurationError(f"{', '.join(unknown)}: not variables that carry credentials")
        self._set_credentials(dict(request.variables))
        return pb.CredentialsReply()

    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainReply:
        wait_s = min(timeout(request.wait_s), remaining_s(context)) if request.wait_s else 0.0
        self._draining.begin()
        left = self._draining.wait(wait_s)
        return pb.DrainReply(
            done=left is not None,
            left=(left or [])[:MAX_LEFT],
            drain_s=self._drain_s,
            streams=self._streams(),
            pending_bytes=self._write_back.pending_bytes,
        )

    def ReportUse(self, request: pb.ReportUseRequest, context: grpc.ServicerContext) -> pb.ReportUseReply:
        use = reported_use(request)
        self._store.used(use.namespaces, chunks=use.chunks, marks=use.marks)
        self._counters.add(local_chunks=use.chunks, local_bytes=use.bytes)
        return pb.ReportUseReply(wants_marks=bool(self._store.foresights()))

    # ---- orders of reading ----

    def TellOrder(self, request: pb.TellOrderRequest, context: grpc.ServicerContext) -> pb.TellOrderReply:
        self._ahead.tell(told_piece(request))
        return pb.TellOrderReply()

    def StageAhead(self, request: pb.StageAheadRequest, context: grpc.ServicerContext) -> pb.StageAheadReply:
        running = request.running if request.HasField("running") else None
        staged = self._ahead.stage(
            dataset_name(request.namespace),
            save_id(request.order),
            request.epoch,
            wanted_ahead(request),
            running=running,
        )
        if staged is None:
            return pb.StageAheadReply(known=False)
        standing, ahead_bytes, states = staged
        return pb.StageAheadReply(
            known=True,
            epoch=standing.epoch,
            position=standing.position,
            ahead_bytes=ahead_bytes,
            state=[int(state) for state, _ in states],  # type: ignore[misc]  # an enum of the same numbers
            errors=self._told([error for _, error in states if error is not None]),
        )

    def ForgetOrder(
        self, request: pb.ForgetOrderRequest, context: grpc.ServicerContext
    ) -> pb.ForgetOrderReply:
        self._ahead.forget(dataset_name(request.namespace), save_id(request.order))
        return pb.ForgetOrderReply()

    def _told(self, errors: Sequence[TorchCacheError | None]) -> list[str]:
        """Errors of a reply, encoded, with the request's id; the gravest is logged."""
        request, failures = current.get(), [error for error in errors if error is not None]
        if failures:
            gravest = max(failures, key=level_of)
            self._log.failed("Stage", gravest, f" of {len(failures)} of {len(errors)}")
        request_id = request.id if request is not None else None
        return [encode_error(error, request_id=request_id) if error else "" for error in errors]

    # ---- policies ----

    def SetPolicy(self, request: pb.SetPolicyRequest, context: grpc.ServicerContext) -> pb.NamespaceStatus:
        name = namespace_name(request.namespace)
        usage = self._policies.change(name, policy_change(request))
        return pb.NamespaceStatus(name=name) if usage is None else _namespace_status(usage)

    def Evict(self, request: pb.EvictRequest, context: grpc.ServicerContext) -> pb.EvictReply:
        return pb.EvictReply(freed_bytes=self._policies.evict(namespace_name(request.namespace)))

    # ---- objects ----

    def ListObjects(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListReply:
        page = self._under_store(request.store).list(
            request.prefix,
            start_after=request.start_after,
            limit=min(request.limit, MAX_PAGE) if request.limit > 0 else MAX_PAGE,
            deadline=deadline_of(context),
        )
        return pb.ListReply(objects=[_ref(o) for o in page.objects], truncated=page.truncated)

    def ListFolder(self, request: pb.ListFolderRequest, context: grpc.ServicerContext) -> pb.ListFolderReply:
        page = self._under_store(request.store).list_folder(
            request.prefix,
            token=request.token,
            start_after=request.start_after,
            deadline=deadline_of(context),
        )
        if page is None:
            return pb.ListFolderReply(supported=False)
        objects = [_ref(o) for o in page.objects]
        return pb.ListFolderReply(
            supported=True, objects=objects, folders=page.folders, token=page.token, starts_anywhere=True
        )

    def StatObject(self, request: pb.StatRequest, context: grpc.ServicerContext) -> pb.ObjectRef:
        under_store = self._under_store(request.store)
        return _ref(under_store.stat(object_key(request.key), deadline=deadline_of(context)))

    def DeleteObject(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> pb.DeleteReply:
        self._under_store(request.store).delete(object_key(request.key), deadline=deadline_of(context))
        return pb.DeleteReply()

    def Stage(self, request: pb.StageRequest, context: grpc.ServicerContext) -> pb.StageReply:
        if not request.namespace or request.namespace.startswith(KEPT_PREFIXES):
            raise ConfigurationError(f"objects can't be staged into the namespace {request.namespace!r}")
        objects = object_infos(request.objects)
        errors = stage(self._read_through, request.namespace, objects, deadline=deadline_of(context))
        return pb.StageReply(errors=self._told(errors))

    def GetResidency(self, request: pb.ResidencyRequest, context: grpc.ServicerContext) -> pb.ResidencyReply:
        objects = [sized(self._store, info) for info in object_infos(request.objects)]
        held = resident_bytes(self._store, objects)
        whole = [
            i
            for i, (o, held_) in enumerate(zip(objects, held, strict=True))
            if is_whole(self._store, o, held_)
        ]
        return pb.ResidencyReply(resident_bytes=held, resident_objects=whole)

    def PublishObject(self, request: pb.PublishRequest, context: grpc.ServicerContext) -> pb.PublishReply:
        self._under_store(request.store)
        info = self._write_back.publish(
            request.store,
            object_key(request.key),
            save_id(request.write_id),
            request.size,
            create_only=request.create_only,
            wait_s=min(timeout(request.wait_s), remaining_s(context)),
        )
        return pb.PublishReply(done=False) if info is None else pb.PublishReply(done=True, object=_ref(info))

    # ---- writes of clients on this host ----

    def PrepareWrite(
        self, request: pb.PrepareWriteRequest, context: grpc.ServicerContext
    ) -> pb.PrepareWriteReply:
        plan, chunks = prepared_chunks(request)
        if plan.is_save:
            self._store.keep(plan.namespace, True)
        handed_out = self._store.prepare_write(plan.namespace, chunks, timeout_s=timeout(request.timeout_s))
        if handed_out is None:
            return pb.PrepareWriteReply()
        places = handed_out.places
        return pb.PrepareWriteReply(
            write_id=handed_out.write_id,
            files=[
                pb.HandedOutFile(number=f.number, nonce=f.nonce, size=f.size_bytes) for f in handed_out.files
            ],
            file=[-1 if place is None else place.file for place in places],
            offset=[0 if place is None else place.offset for place in places],
        )

    def CommitWrite(
        self, request: pb.CommitWriteRequest, context: grpc.ServicerContext
    ) -> pb.CommitWriteReply:
        committed = self._store.commit_write(request.write_id)
        if request.durable:
            self._store.sync(committed.namespace)
        self._counters.add(write_calls=1, written_bytes=committed.bytes)
        return pb.CommitWriteReply()

    def AbandonWrite(
        self, request: pb.AbandonWriteRequest, context: grpc.ServicerContext
    ) -> pb.AbandonWriteReply:
        self._store.abandon_write(request.write_id)
        return pb.AbandonWriteReply()


def sized(store: Store, info: ObjectInfo) -> ObjectInfo:
    """The object with its size, where only its first chunk tells it and that is held; else as it is."""
    head = ChunkId(info.id, 0)
    if info.size >= 0 or not store.contains(head):
        return info
    chunk = store.lookup(head)
    return ObjectInfo(info.id, chunk.object_size) if chunk is not None else info


def is_whole(store: Store, info: ObjectInfo, held_bytes: int) -> bool:
    """Whether `held_bytes` are all of the object; an empty one is held if its one chunk, empty, is."""
    return store.contains(ChunkId(info.id, 0)) if info.size == 0 else held_bytes >= info.size > 0


def _ref(info: ObjectInfo) -> pb.ObjectRef:
    return pb.ObjectRef(store=info.id.store, key=info.id.key, version=info.id.version, size=info.size)


def _namespace_status(usage: NamespaceUsage) -> pb.NamespaceStatus:
    return pb.NamespaceStatus(
        name=usage.name,
        bytes=usage.bytes,
        chunks=usage.chunks,
        pinned=usage.policy.pinned,
        dirty=usage.kept,
        priority=usage.policy.priority,
        quota_bytes=usage.policy.quota_bytes or 0,
        ttl_s=usage.policy.ttl_s or 0.0,
    )


def _passed_over(said: tuple[tuple[str, str], int]) -> pb.PassedOver:
    (server_id, reason), clients = said
    return pb.PassedOver(server_id=server_id, reason=reason, clients=clients)


def _copies_status(copies: CopyCounts | None) -> pb.CopiesStatus | None:
    return None if copies is None else pb.CopiesStatus(**asdict(copies))


def _order_status(ahead: Ahead) -> pb.OrderStatus:
    standing = ahead.standing
    return pb.OrderStatus(
        namespace=ahead.namespace,
        order=standing.order,
        epoch=standing.epoch,
        position=standing.position,
        length=standing.length,
        chunks=standing.chunks,
        ahead_bytes=ahead.ahead_bytes,
        coming_chunks=ahead.coming_chunks,
        fetched_bytes=ahead.fetched_bytes,
        left_s=standing.left_s,
    )


def _counters(under_store: UnderStore) -> pb.UnderStoreCounters:
    counted = under_store.counters
    return pb.UnderStoreCounters(
        name=under_store.name,
        read_requests=counted.read_requests,
        read_bytes=counted.read_bytes,
        write_requests=counted.write_requests,
        write_bytes=counted.write_bytes,
        meta_requests=counted.meta_requests,
        retries=counted.retries,
    )
