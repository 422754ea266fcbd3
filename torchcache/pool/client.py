"""The pool as everything above sees it: ranges in, buffers out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from torchcache.errors import ConfigurationError, TorchCacheError
from torchcache.lanes.base import Buffer, Passing, ReadOptions
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.placement import Placement
from torchcache.pool import draining, orders, policies, staging
from torchcache.pool.draining import Drain
from torchcache.pool.farewell import farewell
from torchcache.pool.lane_choice import LaneName
from torchcache.pool.members import MemberSource
from torchcache.pool.objects import Objects
from torchcache.pool.orders import AheadChunk, OrderKey, StagedAhead, ToldOrder
from torchcache.pool.probing import answers_s
from torchcache.pool.reads import Reading, read_held
from torchcache.pool.reports import (
    NamespaceStatus,
    PoolStatistics,
    Reservation,
    Residency,
    SaveInfo,
    ServerStatus,
    server_status,
)
from torchcache.pool.saves import Saves
from torchcache.pool.session import Session
from torchcache.pool.writes import Writing
from torchcache.wire.request_ids import new_request_id
from torchcache.wire.v1 import cache_pb2

STATUS_S = 30.0


class Pool:
    """A pool of cache servers. Made by `torchcache.connect`.

    Pickles, forks and spawns safely: nothing opens before the first use in each process. All methods are
    thread-safe, keep their deadline, and raise only errors of `torchcache.errors`: ServerUnavailable, Overloaded and
    DeadlineExceeded once trying again did not help, ConfigurationError for wrong arguments and a refused token.
    """

    def __init__(self, source: MemberSource, lane: LaneName = "auto") -> None:
        self._source = source
        self._lane = lane
        self._sessions: dict[int, Session] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return (Pool, (self._source, self._lane))

    def __repr__(self) -> str:
        return f"Pool({self._source.description!r})"

    @property
    def address(self) -> str:
        """What the pool was connected by: the servers' addresses, or the embedded pool's folder."""
        return self._source.description

    @property
    def source(self) -> MemberSource:
        """Where its servers come from, and what opens their doors."""
        return self._source

    def _session(self) -> Session:
        """This process's session. After a fork the parent's is left behind, with the locks its threads held."""
        pid = os.getpid()
        session = self._sessions.get(pid)
        if session is None:
            session = self._sessions.setdefault(pid, Session(self._source, self._lane))
            for other in [key for key in self._sessions if key != pid]:
                self._sessions.pop(other, None)
        return session

    # ---- data ----

    def read(
        self,
        extents: Sequence[Extent],
        *,
        namespace: str = "",
        into: Sequence[memoryview] | None = None,
        timeout_s: float = 60.0,
    ) -> list[memoryview]:
        """The bytes of `extents`, verified, in order: read-only views, or the filled parts of `into`.

        `namespace` is the dataset or checkpoint that what is fetched is stored under. `into` holds one writable
        buffer an extent, at least as long. Raises the error of the first extent that failed.
        """
        views: list[memoryview] = []
        for outcome in self.read_each(extents, namespace=namespace, into=into, timeout_s=timeout_s):
            if isinstance(outcome, TorchCacheError):
                raise outcome
            views.append(outcome)
        return views

    def read_each(
        self,
        extents: Sequence[Extent],
        *,
        namespace: str = "",
        into: Sequence[memoryview] | None = None,
        resident_only: bool = False,
        as_bytes: bool = False,
        lend: bool = False,
        timeout_s: float = 60.0,
    ) -> list[memoryview | TorchCacheError]:
        """As `read`, with an error in the place of each extent that failed.

        With `resident_only` what the pool does not hold is `NotResident` instead of fetched. A view keeps the batch
        it came in alive, about 2 MiB: copy what is to be kept for long. `as_bytes` says that every view will be made
        `bytes`: the lane may then have done it, and `view.obj` is that. With `lend` the outcome of an extent may be a
        read-only view instead of its filled buffer, and that nobody has verified: it is the caller's to do.
        """
        if not extents:
            return []
        options = ReadOptions(
            namespace=namespace,
            resident_only=resident_only,
            as_bytes=as_bytes,
            lend=lend,
            request_id=new_request_id(),
        )
        return Reading(self._session(), extents, into, options, time.monotonic() + timeout_s).run()

    def read_held(
        self, server: str, extents: Sequence[Extent], *, namespace: str, timeout_s: float = 60.0
    ) -> list[memoryview | TorchCacheError]:
        """What one server, named by its id, holds of `extents`: nothing is fetched, and nobody else is asked.

        `NotResident` stands for what it doesn't hold, `IntegrityError` for what it holds damaged. Raises
        ServerUnavailable if it isn't known to answer.
        """
        return read_held(self._session(), server, extents, namespace, time.monotonic() + timeout_s)

    def write(
        self,
        namespace: str,
        objects: Sequence[tuple[ObjectId, Sequence[Buffer]]],
        *,
        durable: bool = False,
        timeout_s: float = 60.0,
        servers: Sequence[str] = (),
        all_copies: bool = False,
        passing: Passing | None = None,
    ) -> None:
        """Stores computed samples or files of a save; each object is the concatenation of its buffers.

        `servers` are those of the save's reservation: each gets all of it. Of the first's errors none is forgiven; the
        others' are logged, and the commit finds out; with `all_copies` that one of them has no room is raised too.

        `durable` acknowledges only after fsync. `timeout_s` bounds each call of about 64 MiB. Writing an object again
        changes nothing. `passing`, for one object alone, is told of its bytes before they are sent, those that are
        sent; see `lanes.base.Passing`. Raises OutOfSpace when the store has no room left that it may free.
        """
        if objects:
            writing = Writing(
                self._session(),
                namespace,
                durable=durable,
                timeout_s=timeout_s,
                servers=servers,
                all_copies=all_copies,
                passing=passing,
            )
            writing.run(objects)

    # ---- objects of the under-stores ----

    def resolve(self, uri: str) -> tuple[str, str]:
        """The (under-store name, key) of a URI. Raises ConfigurationError, naming the under-stores there are."""
        return Objects(self._session()).resolve(uri)

    def uri(self, object: ObjectId) -> str:
        """The URI of an object; `samples/<key>` of a computed sample, which has none."""
        return Objects(self._session()).uri(object)

    def stat(self, uri: str) -> ObjectInfo:
        """The object's version and size now. Raises ObjectNotFound."""
        return Objects(self._session()).stat(uri)

    def delete(self, uri: str) -> None:
        """Removes an object from the under-store; absent is fine."""
        Objects(self._session()).delete(uri)

    def publish(self, uri: str, data: Sequence[Buffer], *, create_only: bool = False) -> ObjectInfo:
        """Writes an object through to the under-store; it is there when the call returns.

        Raises AlreadyExists if `create_only` and something is there.
        """
        return Objects(self._session()).publish(uri, data, create_only=create_only)

    def stage(
        self,
        objects: Sequence[ObjectInfo],
        *,
        namespace: str,
        on_progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        on_missing: staging.OnMissing | None = None,
    ) -> None:
        """Fetches what of `objects` the pool does not hold yet.

        `on_progress` gets (objects, bytes) just done, in the caller's thread; `cancelled` is asked between batches.
        `on_missing` gets each object that could not be fetched or kept, with the reason; without it the first error is
        raised, after all were tried.
        """
        if objects:
            staging.Staging(self._session(), namespace).run(objects, on_progress, cancelled, on_missing)

    # ---- the order in which a dataset will be read ----

    def tell_order(self, server: str, told: ToldOrder) -> None:
        """Says in which order a reader will read chunks that the server with this id owns.

        It then evicts what is needed farthest in the future. Forgotten a minute after the last `stage_ahead`.
        """
        orders.tell(self._session(), server, told)

    def stage_ahead(
        self,
        server: str,
        key: OrderKey,
        epoch: int,
        chunks: Sequence[AheadChunk],
        *,
        running: int | None = None,
    ) -> StagedAhead | None:
        """Has chunks of a told order fetched before they are read; how it is with each. Returns at once.

        With no chunks it only says that the reader is still there. `running` is the epoch that runs, if that is known.
        None if the server doesn't know the order (any more).
        """
        return orders.stage(self._session(), server, key, epoch, chunks, running=running)

    def forget_order(self, server: str, key: OrderKey) -> None:
        """The reader goes."""
        orders.forget(self._session(), server, key)

    def residency(self, objects: Sequence[ObjectInfo]) -> Residency:
        """How much of `objects` the pool holds now."""
        return staging.residency(self._session(), objects)

    def resident_bytes(self, objects: Sequence[ObjectInfo]) -> Sequence[int]:
        """Of each of `objects` how many bytes the pool holds now; 0 of computed samples, whose size is unknown."""
        return staging.resident_bytes(self._session(), objects)

    # ---- what a dataset may take ----

    def set_policy(
        self,
        namespace: str,
        *,
        pinned: bool | None = None,
        priority: int | None = None,
        quota_bytes: int | None = None,
        ttl_s: float | None = None,
    ) -> dict[str, NamespaceStatus]:
        """Says how the pool treats a dataset when room is short; what is None stays as it is. Survives restarts.

        `namespace` is the dataset's name in `status`: its folder's URI, without a slash at the end, or
        `samples:<name>@<version>`. It need not hold anything yet. `pinned`: never evicted. `priority`, -1000 to 1000:
        who has a lower one yields first, and never takes room from who has a higher one; it starts at 0.
        `quota_bytes`: it takes no more of the pool than that, each server getting its share by weight; `ttl_s`: dropped
        once nobody used it for so long. Of these two 0 takes the limit away.

        Of a save in the pool only `pinned` can be set. A server that joins later has to be told again. Returns what
        each server now has of it, by address. Raises ServerUnavailable with the servers that could not be told; the
        others were.
        """
        return policies.set_policy(
            self._session(),
            namespace,
            pinned=pinned,
            priority=priority,
            quota_bytes=quota_bytes,
            ttl_s=ttl_s,
        )

    def evict(self, namespace: str) -> int:
        """Frees what the pool holds of a dataset, or of a checkpoint that is durable; returns the bytes.

        What was set by `set_policy` stays. Raises ConfigurationError if it is pinned or not yet durable, and
        ServerUnavailable with the servers that could not be told; the others were.
        """
        return policies.evict(self._session(), namespace)

    def drain(self, server: str) -> Iterator[Drain]:
        """Has the server of that address, or id, end in order; gives how far it is, at first and then every second.

        It leaves the pool's registry, takes nothing new, finishes what runs, uploads what isn't in storage yet, and its
        process ends: with exit code 0, or 1 if something is left. It goes on with that whether or not anybody goes on
        asking. Needs a token of scope `admin`. Raises ConfigurationError for a server that isn't the pool's, or isn't
        to be ended so, ServerUnavailable if it can't be reached, or was gone without a word of what is left.
        """
        return draining.drain(self._session(), server)

    # ---- saves of checkpoints; see wire/v1/cache.proto ----

    def reserve_save(
        self,
        store: str,
        path: str,
        part: str,
        save_id: str,
        *,
        overwrite: bool,
        writer: str,
        replicas: int | None = None,
        near: Sequence[str] = (),
    ) -> Reservation:
        """Claims `path` for a save, to be renewed within the lease, and chooses the servers that hold it.

        `replicas` is how many, by default two, or as many as there are; one in an embedded pool. `near` are those of an
        earlier save, from which files may be borrowed: they come first, if they can be reached. Raises AlreadyExists,
        and ConfigurationError if the pool hasn't so many servers.
        """
        if replicas is not None and replicas < 1:
            raise ConfigurationError(f"replicas={replicas}: give 1 or more")
        ref = cache_pb2.SaveRef(store=store, path=path, part=part, save_id=save_id)
        return Saves(self._session()).reserve(
            ref, overwrite=overwrite, writer=writer, replicas=replicas, near=near
        )

    def borrow_files(
        self,
        save: tuple[str, str, str, str],
        base: tuple[str, str],
        sizes: Mapping[str, int],
        *,
        servers: Sequence[str],
    ) -> frozenset[str]:
        """Asks for files of an earlier save as files of one that is being written, without sending them.

        `save` is (store, path, part, save id), `base` path and id of the earlier one, `sizes` the files' names and
        bytes, `servers` those of the reservation. Returns the names of those that all of them lend; the others have to
        be written. No failure of a server is raised: then nothing is lent.
        """
        store, path, part, save_id = save
        ref = cache_pb2.SaveRef(store=store, path=path, part=part, save_id=save_id)
        earlier = cache_pb2.SaveRef(store=store, path=base[0], part=part, save_id=base[1])
        return Saves(self._session()).borrow(ref, earlier, sizes, servers)

    def return_files(
        self, save: tuple[str, str, str, str], names: Collection[str], *, servers: Sequence[str]
    ) -> None:
        """Gives back files that `borrow_files` has got for a save: they will be written. No failure is raised."""
        store, path, part, save_id = save
        ref = cache_pb2.SaveRef(store=store, path=path, part=part, save_id=save_id)
        Saves(self._session()).give_back(ref, names, servers)

    def renew_save(self, store: str, path: str, part: str, save_id: str, *, server: str = "") -> float:
        """Renews the lease and returns it, in seconds. Raises AlreadyExists if another save took over.

        `server` is the first of the reservation's.
        """
        ref = cache_pb2.SaveRef(store=store, path=path, part=part, save_id=save_id)
        return Saves(self._session()).renew(ref, server)

    def commit_save(
        self,
        store: str,
        path: str,
        part: str,
        save_id: str,
        *,
        files: Sequence[tuple[str, int]],
        metadata: bytes,
        manifest: bytes,
        timeout_s: float = 120.0,
        reservation: Reservation | None = None,
        borrowed: Collection[str] = (),
    ) -> SaveInfo:
        """Commits a save whose `files` (name relative to `path`, size in bytes) were written durably, or `borrowed`.

        To all servers of the `reservation`: those that lack some of it hold no copy, and are warned of.
        """
        info = Saves(self._session()).commit(
            cache_pb2.SaveRef(store=store, path=path, part=part, save_id=save_id),
            files=files,
            borrowed=borrowed,
            metadata=metadata,
            manifest=manifest,
            timeout_s=timeout_s,
            reservation=reservation,
        )
        if self._source.embedded and info.state == "committed":
            farewell.expect(self, store, path, part, save_id)
        return info

    def abandon_save(
        self, store: str, path: str, part: str, save_id: str, *, servers: Sequence[str] = ()
    ) -> None:
        """Gives up a reservation, whose `servers` these are, and what was written under it."""
        ref = cache_pb2.SaveRef(store=store, path=path, part=part, save_id=save_id)
        Saves(self._session()).abandon(ref, servers)

    def delete_save(
        self, store: str, path: str, part: str = "", save_id: str = "", *, timeout_s: float = 600.0
    ) -> None:
        """Deletes the checkpoint at `path`, in the pool and in the under-store: for readers at once, then its files.

        Only `save_id`, if that is given. Raises NotCommitted if there is none, InUse if somebody reads it,
        AlreadyExists if a save is being written there, DeadlineExceeded if not all files are gone after `timeout_s`;
        the pool goes on deleting them.
        """
        ref = cache_pb2.SaveRef(store=store, path=path, part=part, save_id=save_id)
        Saves(self._session()).delete(ref, timeout_s=timeout_s)

    def hold_save(self, save: SaveInfo, reader_id: str, reader: str) -> float:
        """Keeps a save from being deleted while it is read; returns for how many seconds. Raises NotCommitted.

        `reader` is for people.
        """
        return Saves(self._session()).hold(_ref(save), reader_id, reader, release=False, server=save.server)

    def release_save(self, save: SaveInfo, reader_id: str) -> None:
        """Ends what `hold_save` began."""
        Saves(self._session()).hold(_ref(save), reader_id, "", release=True, server=save.server)

    def get_save(self, store: str, path: str, part: str = "", *, manifest: bool = True) -> SaveInfo:
        """The committed save at `path`; without its manifest if that isn't wanted. Raises NotCommitted."""
        return Saves(self._session()).get(store, path, part, manifest=manifest)

    def list_saves(self, uri: str) -> list[SaveInfo]:
        """The saves at and under the folder `uri`, by path, without manifests."""
        session = self._session()
        store, folder = Objects(session).resolve(uri)
        # With its slash: of run/step-1 is not run/step-10, and a bucket can be listed.
        return [*Saves(session).list(store, f"{folder.rstrip('/')}/" if folder else "")]

    # ---- the pool itself ----

    def status(self) -> list[ServerStatus]:
        """How every server is that answers; `unreachable` names the others. Raises ServerUnavailable if none does."""
        asked = self._session().ask_all("GetStatus", cache_pb2.StatusRequest(), timeout_s=STATUS_S)
        return [server_status(one.reply, one.member.address) for one in asked]

    def servers(self, *, opens: bool = True) -> dict[str, str]:
        """All servers: their addresses by their ids, which placement goes by. In the order of the pool's address.

        Raises ServerUnavailable if there is one that hasn't said its id. And, unless it `opens` the pool, if that was
        closed.
        """
        return self._session().addresses(STATUS_S, opens=opens)

    def placement(self, servers: Iterable[str], *, opens: bool = True) -> Placement:
        """Which of `servers`, ids that `servers()` gave, owns what. Raises ServerUnavailable if none answers."""
        return self._session().placement(servers, STATUS_S, opens=opens)

    @property
    def is_open(self) -> bool:
        """Whether this process has met the servers, and not closed the pool since."""
        session = self._sessions.get(os.getpid())
        return session is not None and session.current is not None

    def unreachable(self) -> list[str]:
        """The addresses of servers that did not answer when last asked: others stand in for them."""
        return self._session().silent()

    def answers_s(self) -> dict[str, float | None]:
        """How long each server takes to say that it lacks something, in seconds, by its address.

        None if it says nothing, or need not: the local lane reads its files.
        """
        return answers_s(self._session(), STATUS_S)

    def statistics(self) -> PoolStatistics:
        """What this process asked of the pool so far."""
        return self._session().statistics()

    def close(self) -> None:
        """Closes this process's connections to the pool; the next use opens them again."""
        self._session().close()

    def list_in_any_order(self, uri: str) -> Iterator[ObjectInfo]:
        """What `list` gives, in no order: folders are listed side by side where the under-store gains by that.

        Each folder is seen at another moment. Closing the iterator ends the calls.
        """
        return Objects(self._session()).list_in_any_order(uri)

    # Last, because its name hides the type within the class.
    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """Every object under the folder `uri`, in the order of the under-store, fetched page by page."""
        return Objects(self._session()).list(uri)


def _ref(save: SaveInfo) -> cache_pb2.SaveRef:
    return cache_pb2.SaveRef(store=save.store, path=save.path, part=save.part, save_id=save.save_id)
