"""CacheStorageWriter: torch.distributed.checkpoint's StorageWriter over the pool."""

from __future__ import annotations

import os
import pickle
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future as LocalFuture
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

import torchcache
from torchcache.checkpoint.compression import Zstd
from torchcache.checkpoint.durable import wait_until_durable
from torchcache.checkpoint.extensions import require_streams
from torchcache.checkpoint.garbage import A_MOMENT_BYTES, garbage_waits
from torchcache.checkpoint.holder import holder_name
from torchcache.checkpoint.host_memory import EXTRA_MEMORY_BYTES, Room, checked_bound
from torchcache.checkpoint.layout import MOST_FILE_BYTES, assign_files, metadata_name, part_name
from torchcache.checkpoint.lease import Lease, end_lease_of_thread
from torchcache.checkpoint.location import checkpoint_uri, looks_like_checkpoint
from torchcache.checkpoint.manifest import Item, Manifest
from torchcache.checkpoint.metadata import dcp_version, describe, knows_extensions, stock_metadata
from torchcache.checkpoint.reuse import (
    LEAST_TAKEN,
    MEMORY,
    Base,
    KeptItem,
    Written,
    file_names,
    files_to_keep,
)
from torchcache.checkpoint.stager import StagedSave, default_stager
from torchcache.checkpoint.staging import StagedFile, expected_bytes
from torchcache.checkpoint.takeover import Takeover
from torchcache.checkpoint.ticket import Ticket, forget_arrived, take_arrived
from torchcache.checkpoint.unchanged import find_unchanged
from torchcache.connecting import connect
from torchcache.errors import CheckpointError, ConfigurationError, OutOfSpace
from torchcache.local_pool import LocalPool
from torchcache.pool import Pool
from torchcache.pool.reports import Reservation
from torchcache.pool.storage_uris import at_storage
from torchcache.threads import Threads

if TYPE_CHECKING:
    from torch.distributed.checkpoint._extension import StreamTransformExtension

Durability = Literal["pool", "store"]

_WRITERS = min(4, os.cpu_count() or 1)
_FILES_BEING_WRITTEN = _WRITERS + 1  # one asks for room, or is being committed, while others move bytes
_FILES_IN_FLIGHT = _FILES_BEING_WRITTEN + 1
_LEAST_BYTES_PER_S = 20e6


class _Save:
    """What a writer knows of the save that a thread is in the middle of."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.rank: int | None = None
        self.part = ""
        self.ticket: Ticket | None = None
        self.lease: Lease | None = None
        self.reservation: Reservation | None = None
        self.lasts = False
        self.ranks = 0
        self.release: weakref.finalize[[], CacheStorageWriter] | None = None

    def forget_release(self) -> None:
        if self.release is not None:
            self.release.detach()


class CacheStorageWriter(StorageWriter):
    """Saves checkpoints through the pool: training waits for the pool's disks, the upload to the store runs behind.

    What appears at `path` in the under-store is a stock DCP checkpoint, which FileSystemReader can load, and beside it
    our manifest with checksums. Until the manifest is there, nobody sees the checkpoint there.

    `path` is a URI ("s3://bucket/run/step-100", "file:///...") or a folder's path. `pool` is what
    `torchcache.connect` takes. A save returns when it is restorable: from the pool, synced to its disk
    (`durability="pool"`), or from the under-store (`"store"`). Until the under-store has it, `replicas` servers hold
    it: two, or one in a pool of one, unless given; where fewer can be reached, a warning says so. An existing
    checkpoint at `path` is `AlreadyExists` unless `overwrite`. `compression` is "zstd", or a
    `torchcache.checkpoint.Zstd` with level and threads: each item that gets smaller by it is one zstd frame, as DCP's
    ZStandard extension writes it. What has to be copied first (from a GPU, or because it isn't contiguous), what is
    compressed, and other objects than tensors take at most `extra_memory_bytes` at a time, or one that is larger.

    With `reuse_unchanged` tensors that are as this process's last save in the same folder has them, by their checksums,
    are neither sent nor stored again, unless compressed. In the under-store each checkpoint is whole all the same. A
    save that finds no room gives back what it has borrowed, and sends it.

    `_extensions` are torch's own stream extensions, experimental there: each item's bytes go through them, as with
    FileSystemWriter. Nothing is reused then, and readers need an `_extension_registry` that knows them.

    One writer may serve many saves (`checkpoint_id=` gives each its path), from several threads too, and pickles. It is
    its own stager for `dcp.async_save`, see `stage`.
    Raises ConfigurationError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        pool: str | Pool | LocalPool | None = None,
        durability: Durability = "pool",
        replicas: int | None = None,
        compression: str | Zstd | None = None,
        extra_memory_bytes: int = EXTRA_MEMORY_BYTES,
        overwrite: bool = False,
        reuse_unchanged: bool = True,
        _extensions: Sequence[StreamTransformExtension] | None = None,
    ) -> None:
        super().__init__()
        if durability not in ("pool", "store"):
            raise ConfigurationError(f"durability must be 'pool' or 'store', not {durability!r}")
        if replicas is not None and (isinstance(replicas, bool) or replicas < 1):
            raise ConfigurationError(f"replicas={replicas!r}: give 1 or more, or None")
        self.extra_memory_bytes = checked_bound(extra_memory_bytes)
        self.compression = Zstd.of(compression)
        if self.compression is not None and not knows_extensions():
            raise ConfigurationError("compressed items need torch 2.7 or newer: its .metadata tells of them")
        self._extensions = require_streams(_extensions)
        if self._extensions and not knows_extensions():
            raise ConfigurationError("_extensions need torch 2.7 or newer: its .metadata tells of them")
        if self._extensions and self.compression is not None:
            raise ConfigurationError("give compression= or _extensions=, one of them")
        self.path: str | os.PathLike[str] = checkpoint_uri(path)
        self.durability: Durability = durability
        self.replicas = replicas
        self.overwrite = overwrite
        self.reuse_unchanged = reuse_unchanged and self.compression is None and not self._extensions
        self.save_id = ""
        """Of the save that this process wrote last by it, in `storage_meta` of what is read back."""
        self._given_pool = pool
        self._forget()

    def _forget(self) -> None:
        self._pool: Pool | None = None
        self._staged: StagedSave | None = None  # until the thread that saves it has begun
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_pool"], state["_local"], state["_staged"]
        if isinstance(self._given_pool, LocalPool):
            state["_given_pool"] = self._given_pool.pool
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        return f"CacheStorageWriter({str(self.path)!r}, durability={self.durability!r})"

    # ---- staging for async_save ----

    _synchronize_after_execute = False  # torch takes for its AsyncStager only what has this, too

    @property
    def should_synchronize_after_execute(self) -> bool:
        """No: `stage` returns when all is copied."""
        return False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What `dcp.async_save` stops training for: one copy into memory that all writers of this process use again.

        Waits for the save before, if that still reads the memory.
        """
        staged, self._staged = default_stager().stage_save(state_dict)
        return staged

    def synchronize_staging(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Gives back the memory that async saves were staged in, once none reads it."""
        default_stager().close()

    # ---- the contract, in the order torch calls it ----

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` is a path or URI that can name a checkpoint."""
        return looks_like_checkpoint(checkpoint_id)

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The URI saves go to."""
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins another save, at `checkpoint_id` if given."""
        self._end_last_save()
        if checkpoint_id:
            self.path = self._local.path = checkpoint_uri(checkpoint_id)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=getattr(self._local, "path", self.path))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._end_last_save()
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.begun()
        save = self._local.save = _Save(self._local.__dict__.pop("path", self.path))
        save.rank = kwargs.get("rank")
        if not kwargs.get("use_collectives", True):
            if save.rank is None:
                raise ConfigurationError("a save without collectives needs to know its rank")
            save.part = part_name(save.rank)

    def _end_last_save(self) -> None:
        end_lease_of_thread()
        forget_arrived()
        self._local.save = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Reserves the path and gives each rank its ticket. Raises AlreadyExists."""
        tickets = self._reserve(self._current(), len(plans))
        return [replace(plan, storage_data=ticket) for plan, ticket in zip(plans, tickets, strict=True)]

    def _reserve(self, save: _Save, ranks: int) -> list[Ticket]:
        pool = self.pool
        uri = at_storage(pool, str(save.path))
        store, path = pool.resolve(uri)
        save_id = uuid.uuid4().hex
        first_rank = (save.rank or 0) if save.part else 0
        base = MEMORY.base(store, path, save.part) if self.reuse_unchanged else None
        save.reservation = reserved = pool.reserve_save(
            store,
            path,
            save.part,
            save_id,
            overwrite=self.overwrite,
            writer=holder_name(),
            replicas=self.replicas,
            near=base.servers if base is not None and base.lasts else (),
        )
        # Until it is committed: one that found no room, on whichever rank, is followed by one that borrows nothing.
        MEMORY.forget_base(store, path, save.part)
        named = (base.path, base.save_id) if base is not None else None
        tickets = [
            Ticket(uri, store, path, save.part, save_id, first_rank + i, reserved.servers, named)
            for i in range(ranks)
        ]
        save.ticket, save.ranks = tickets[0], ranks
        save.lease = Lease(pool, save.ticket, reserved.lease_s)
        save.lease.start()
        save.release = weakref.finalize(self, save.lease.release)
        save.release.atexit = False
        return tickets

    @property
    def may_have_borrowed(self) -> bool:
        """Whether the coordinator of this thread's save let it borrow. If it fails, the next isn't."""
        save: _Save | None = getattr(self._local, "save", None)
        return save is not None and save.ticket is not None and save.ticket.base is not None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the plan's items to the pool, synced to its disk; done when it returns.

        The planner is asked from this thread alone.
        """
        ticket = self._ticket_of(plan)
        self.save_id = ticket.save_id
        sizes = [expected_bytes(item) for item in plan.items]
        # A moment's work is Python's above all.
        with garbage_waits() if sum(sizes) < A_MOMENT_BYTES else nullcontext():
            alone = self._current().ranks == 1
            try:
                results = self._write_files(
                    ticket, plan, planner, sizes, before=None if alone else ticket.base
                )
            except OutOfSpace:
                if not alone or ticket.base is None:
                    raise
                # Where it would lie if it had not looked for what it could borrow, another server may have room.
                anew = self._reserve_anew()
                results = self._write_files(anew, plan, planner, sizes, before=ticket.base)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_files(
        self,
        ticket: Ticket,
        plan: SavePlan,
        planner: SavePlanner,
        sizes: list[int],
        *,
        before: tuple[str, str] | None,
    ) -> list[WriteResult]:
        """`before`: path and id of the save whose upload may have to be waited for."""
        unchanged = self._find_unchanged(ticket, plan, planner, sizes)
        self._current().lasts = sum(was.length for was in unchanged.values()) >= LEAST_TAKEN * max(
            sum(sizes), 1
        )
        borrowed = self._borrow(ticket, list(unchanged.values()))
        taken = Takeover(self.pool, ticket, borrowed, before=before)
        kept: list[int] = []
        lasting: list[int] = []
        fresh: list[int] = []
        for number in range(len(plan.items)):
            was = unchanged.get(number)
            if was is not None and was.file in taken.files:
                kept.append(number)
            else:
                # Apart: the next save finds the files of those that last without any that changed.
                (fresh if was is None else lasting).append(number)

        def write(*groups: list[int]) -> list[WriteResult]:
            chosen = [([plan.items[n] for n in group], [sizes[n] for n in group]) for group in groups]
            return self._write_items(ticket, chosen, planner, names, taken)

        names = file_names(ticket.rank, taken.files)
        results = write(lasting, fresh)
        if taken.files:
            results += [_taken_over(plan.items[number], unchanged[number]) for number in kept]
        elif kept:  # they were given back
            self._current().lasts = False
            results += write(kept)
        if self.reuse_unchanged:
            items_written = [result.storage_data for result in results]
            written = Written(ticket.save_id, ticket.rank, ticket.part, items_written)
            MEMORY.note_written(written, instead_of=ticket.base[1] if ticket.base else None)
        return results

    def _reserve_anew(self) -> Ticket:
        """Of a save of one rank: gives back all that was written, and begins again; nothing is borrowed any more."""
        save = self._current()
        save.forget_release()
        end_lease_of_thread()
        save.lasts = False
        return self._reserve(save, 1)[0]

    def _find_unchanged(
        self, ticket: Ticket, plan: SavePlan, planner: SavePlanner, sizes: list[int]
    ) -> dict[int, KeptItem]:
        if ticket.base is None or not self.reuse_unchanged:
            return {}
        before = MEMORY.written(ticket.base[1], ticket.rank, ticket.part)
        if before is None:
            return {}
        return find_unchanged(plan.items, sizes, planner.resolve_data, before, threads=_WRITERS)

    def _borrow(self, ticket: Ticket, unchanged: Sequence[KeptItem]) -> dict[str, int]:
        """The files that this save takes over, and their sizes."""
        wanted = files_to_keep(unchanged)
        if not wanted or ticket.base is None:
            return {}
        save = (ticket.store, ticket.path, ticket.part, ticket.save_id)
        lent = self.pool.borrow_files(save, ticket.base, wanted, servers=ticket.servers)
        return {name: size for name, size in wanted.items() if name in lent}

    def _write_items(
        self,
        ticket: Ticket,
        groups: Sequence[tuple[list[WriteItem], list[int]]],
        planner: SavePlanner,
        names: Iterator[str],
        taken: Takeover,
    ) -> list[WriteResult]:
        """Writes items, given with their sizes; those of two groups never into one file."""
        results: list[WriteResult] = []
        writes: deque[LocalFuture[list[WriteResult]]] = deque()
        room = Room(self.extra_memory_bytes)
        # Two of the largest files fit: one is copied while the other is written.
        most_bytes = min(MOST_FILE_BYTES, max(self.extra_memory_bytes // 2, 1))
        files: Iterator[Sequence[WriteItem]] = (
            items[run.start : run.stop]
            for items, sizes in groups
            for run in assign_files(sizes, writers=_WRITERS, most_bytes=most_bytes)
        )
        with Threads(_FILES_BEING_WRITTEN, name="torchcache-save") as threads:
            try:
                for run_of_items in files:
                    rest = run_of_items
                    while rest:
                        staged = StagedFile(
                            next(names),
                            rest,
                            planner.resolve_data,
                            compression=self.compression,
                            extensions=self._extensions,
                            room=room,
                            most_object_bytes=max(most_bytes // 2, 1),
                        )
                        rest = staged.rest
                        writes.append(threads.submit(self._write_file, ticket, staged, taken))
                        if len(writes) >= _FILES_IN_FLIGHT:
                            results += writes.popleft().result()
                while writes:
                    results += writes.popleft().result()
            finally:
                for write in writes:
                    write.cancel()
        return results

    def _ticket_of(self, plan: SavePlan) -> Ticket:
        own, arrived = self._current().ticket, take_arrived(plan.storage_data)
        # The coordinator knows the save; a plan that says otherwise is a cached one of an earlier save.
        ticket = own if own and (arrived is None or arrived.save_id != own.save_id) else arrived
        if ticket is None:
            raise CheckpointError("write_data was called without a plan that prepare_global_plan has seen")
        return ticket

    def _write_file(self, ticket: Ticket, file: StagedFile, taken: Takeover) -> list[WriteResult]:
        try:
            return self._write_staged(ticket, file, taken)
        finally:
            file.close()

    def _write_staged(self, ticket: Ticket, file: StagedFile, taken: Takeover) -> list[WriteResult]:
        # Hashed before it is sent, here or piece by piece on the way: a tensor that changes meanwhile must not be taken
        # for what was sent by the next save.
        file.lay_out()
        objects = [(ticket.file(file.name), file.buffers)]
        taken.write(
            lambda all_copies: self.pool.write(
                ticket.namespace,
                objects,
                durable=True,
                timeout_s=_time_for(file.size),
                servers=ticket.servers,
                all_copies=all_copies,
                passing=file.passing,
            )
        )
        with garbage_waits():
            return [
                WriteResult(index=item.index, size_in_bytes=entry.length, storage_data=entry)
                for item, entry in file.describe()
            ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commits the save: from here on it can be loaded. Raises AlreadyExists if another writer took over."""
        save = self._current()
        ticket, lease = save.ticket, save.lease
        if ticket is None or lease is None:
            raise CheckpointError("finish was called without prepare_global_plan")
        if lease.error is not None:
            raise lease.error
        with garbage_waits():
            items: list[Item] = [result.storage_data for of_rank in results for result in of_rank]
            finished = stock_metadata(metadata, items, checkpoint_id=ticket.uri, save_id=ticket.save_id)
            pickled = pickle.dumps(finished)
            manifest = _manifest(ticket, metadata, items, pickled)
            encoded = manifest.encode()
        if manifest.pickled_bytes:
            self._write_metadata(ticket, pickled)
        try:
            committed = self.pool.commit_save(
                ticket.store,
                ticket.path,
                ticket.part,
                ticket.save_id,
                files=list(manifest.files.items()),
                borrowed={item.file for item in items if isinstance(item, KeptItem)},
                metadata=pickled,
                manifest=encoded,
                reservation=save.reservation,
            )
        finally:
            # Even a commit that failed may have arrived: nothing is given back from here on.
            lease.stop()
            save.forget_release()
        base = Base(ticket.path, ticket.save_id, ticket.servers, save.lasts)
        MEMORY.note_committed(ticket.store, ticket.part, base)
        if self.durability == "store":
            wait_until_durable(self.pool, committed)
        # As FileSystemWriter does: dcp.save returns this object.
        metadata.__dict__.update(finished.__dict__)

    # ---- within ----

    @property
    def pool(self) -> Pool:
        """The pool, connected at first use in each process."""
        if self._pool is None:
            self._pool = connect(self._given_pool)
        return self._pool

    def _current(self) -> _Save:
        save: _Save | None = getattr(self._local, "save", None)
        if save is None:
            raise CheckpointError("set_up_storage_writer has to be called first, in this thread")
        return save

    def _write_metadata(self, ticket: Ticket, pickled: bytes) -> None:
        # Planner data without a JSON form has to be loadable before the upload too.
        target = ticket.file(metadata_name(ticket.part))
        self.pool.write(ticket.namespace, [(target, [pickled])], durable=True, servers=ticket.servers)


def _taken_over(item: WriteItem, was: KeptItem) -> WriteResult:
    return WriteResult(index=item.index, size_in_bytes=was.length, storage_data=was)


def _manifest(ticket: Ticket, metadata: Metadata, items: Sequence[Item], pickled: bytes) -> Manifest:
    files: dict[str, int] = {}
    for item in items:
        end = item.file_bytes if isinstance(item, KeptItem) else item.start + item.length
        files[item.file] = max(files.get(item.file, 0), end)
    return Manifest(
        save_id=ticket.save_id,
        checkpoint=ticket.uri,
        created_unix_s=round(time.time(), 3),
        torch=str(torch.__version__),
        torchcache=torchcache.__version__,
        dcp_version=dcp_version(),
        files=files,
        items=tuple(items),
        **describe(metadata, pickled=pickled),
    )


def _time_for(size_bytes: int) -> float:
    return 120.0 + size_bytes / _LEAST_BYTES_PER_S
