"""The memory pool with saves: what the checkpoint classes use of `Pool`, with dials a real one does not have."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Mapping, Sequence

from tests.unit.memory_pool import MemoryPool
from torchcache.errors import (
    AlreadyExists,
    CheckpointError,
    NotResident,
    TorchCacheError,
)
from torchcache.lanes.base import Passing
from torchcache.model import Extent, ObjectId
from torchcache.pool import SaveInfo, SaveState
from torchcache.pool.reports import Reservation
from torchcache.save_names import saved_file


class CheckpointPool(MemoryPool):
    """`upload` makes a committed save durable, `evict` drops the pool's copy of its files."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.reserved: dict[tuple[str, str, str], str] = {}
        self.renewals = 0
        self.renew_error: TorchCacheError | None = None
        self.write_error: TorchCacheError | None = None
        self.abandoned: list[str] = []
        self.writes: list[tuple[str, ObjectId, bool, list[int]]] = []
        self.committed: dict[tuple[str, str, str], tuple[list[tuple[str, int]], bytes]] = {}
        self.uploads = True
        self.lease_s = 10.0
        self.lends = True
        self.borrowings: list[tuple[tuple[str, str], frozenset[str]]] = []
        self.loans: dict[str, SaveInfo] = {}
        self.returned: list[frozenset[str]] = []
        self.asked_near: list[tuple[str, ...]] = []

    def write(
        self,
        namespace: str,
        objects: Sequence[tuple[ObjectId, Sequence[bytes | memoryview]]],
        *,
        durable: bool = False,
        timeout_s: float = 60.0,
        servers: Sequence[str] = (),
        all_copies: bool = False,
        passing: Passing | None = None,
    ) -> None:
        if self.write_error is not None:
            raise self.write_error
        with self.lock:
            for object, buffers in objects:
                self.writes.append((namespace, object, durable, [len(b) for b in buffers]))
                at = 0
                for buffer in buffers:
                    if passing is not None:
                        passing(at, memoryview(buffer))
                    at += len(buffer)
                self.save_files[object] = b"".join(buffers)

    def _content(self, object: ObjectId) -> bytes:
        if object.is_save and object not in self.save_files:
            raise NotResident(f"{object} isn't here", object=str(object))
        return super()._content(object)

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
        self.asked_near.append(tuple(near))
        key = (store, path, part)
        there = self.objects.keys() & {(store, f"{path}/{part}.metadata")}
        if (key in self.saved or there) and not overwrite:
            raise AlreadyExists(f"{path} already holds a checkpoint: pass overwrite=True or another path")
        if key in self.reserved:
            raise AlreadyExists(f"another save of {path} is being written by {writer}")
        self.reserved[key] = save_id
        return Reservation(
            lease_s=self.lease_s, servers=("only",), wanted=1, writer=writer, overwrite=overwrite
        )

    def renew_save(self, store: str, path: str, part: str, save_id: str, *, server: str = "") -> float:
        self.renewals += 1
        if self.renew_error is not None:
            raise self.renew_error
        return self.lease_s

    def abandon_save(
        self, store: str, path: str, part: str, save_id: str, *, servers: Sequence[str] = ()
    ) -> None:
        self.abandoned.append(save_id)
        if self.reserved.get((store, path, part)) == save_id:
            del self.reserved[store, path, part]

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
        key = (store, path, part)
        base = self.loans.pop(save_id, None)
        origins: dict[str, tuple[str, str]] = {}
        for name in borrowed:
            assert base is not None
            origins[name] = base.borrowed.get(name, (base.path, base.save_id))
        if self.reserved.pop(key, None) != save_id:
            raise AlreadyExists(f"the save of {path} was superseded")
        for name, size in files:
            origin = origins.get(name, (path, save_id))
            held = self.save_files.get(saved_file(store, origin[0], name, origin[1]))
            if held is None or len(held) != size:
                raise CheckpointError(f"{path} can't be committed: file {name} isn't here whole")
        self.committed[key] = (list(files), metadata)
        self.saved[key] = SaveInfo(
            store=store,
            path=path,
            part=part,
            save_id=save_id,
            state="committed",
            manifest=manifest,
            pending_bytes=1,
            total_bytes=1,
            error=None,
            committed_unix_s=1.0,
            durable_unix_s=0.0,
            borrowed=origins,
        )
        return self.saved[key]

    def borrow_files(
        self,
        save: tuple[str, str, str, str],
        base: tuple[str, str],
        sizes: Mapping[str, int],
        *,
        servers: Sequence[str],
    ) -> frozenset[str]:
        self.borrowings.append((base, frozenset(sizes)))
        found = self.saved.get((save[0], base[0], save[2]))
        if not self.lends or found is None or found.save_id != base[1]:
            return frozenset()
        self.loans[save[3]] = found
        return frozenset(
            name for name, size in sizes.items() if len(self.save_files[found.file(name)]) == size
        )

    def return_files(
        self, save: tuple[str, str, str, str], names: Collection[str], *, servers: Sequence[str]
    ) -> None:
        self.returned.append(frozenset(names))

    def get_save(self, store: str, path: str, part: str = "", *, manifest: bool = True) -> SaveInfo:
        info = super().get_save(store, path, part)
        if info.state == "committed" and self.uploads:
            self.saved[store, path, part] = dataclasses.replace(info, pending_bytes=info.pending_bytes + 1)
        return info

    # ---- dials ----

    def upload(self, store: str, path: str, part: str = "", *, state: SaveState = "durable") -> None:
        """What the write-back does: files, `.metadata` and manifest go to the under-store."""
        key = (store, path, part)
        info = self.saved[key]
        files, metadata = self.committed[key]
        for name, _ in files:
            self.objects[store, f"{path}/{name}"] = self.save_files[info.file(name)]
        self.objects[store, f"{path}/{part}.metadata"] = metadata
        self.objects[store, f"{path}/{part}.torchcache.json"] = info.manifest
        self.saved[key] = dataclasses.replace(info, state=state, pending_bytes=0)

    def evict(self) -> None:
        self.save_files.clear()

    def extents_of(self, suffix: str) -> list[Extent]:
        """All extents read so far of files whose key ends so."""
        return [e for read in self.reads for e in read if e.object.id.key.endswith(suffix)]

    def only_save(self) -> SaveInfo:
        (info,) = self.saved.values()
        return info
