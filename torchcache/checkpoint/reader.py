"""CacheStorageReader: torch.distributed.checkpoint's StorageReader over the pool."""

from __future__ import annotations

import os
import uuid
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from torchcache.checkpoint.garbage import A_MOMENT_BYTES, CALM_S, MANY_ITEMS, Truce, garbage_waits
from torchcache.checkpoint.hold import Hold
from torchcache.checkpoint.host_memory import EXTRA_MEMORY_BYTES, checked_bound
from torchcache.checkpoint.layout import metadata_name, part_name
from torchcache.checkpoint.loading import plan_loads, run_loads
from torchcache.checkpoint.location import checkpoint_uri, looks_like_checkpoint
from torchcache.checkpoint.manifest import Item, Manifest
from torchcache.checkpoint.metadata import load_metadata, metadata_of
from torchcache.checkpoint.source import SavedFiles, Source
from torchcache.checkpoint.stored import Backing, item_at
from torchcache.connecting import connect
from torchcache.errors import CheckpointError, IntegrityError, NotCommitted, NotResident, ObjectNotFound
from torchcache.local_pool import LocalPool
from torchcache.model import Extent, ObjectInfo
from torchcache.pool import Pool, SaveInfo
from torchcache.pool.storage_uris import at_storage
from torchcache.save_names import save_namespace, saved_file

MOST_METADATA_BYTES: Final = 1 << 30
"""Of a `.metadata`: some five million items."""

if TYPE_CHECKING:
    from torch.distributed.checkpoint._extension import ExtensionRegistry

_MANIFEST_OF_MANY_BYTES: Final = 128 * MANY_ITEMS


class CacheStorageReader(StorageReader):
    """Loads checkpoints through the pool: what CacheStorageWriter saved, and what FileSystemWriter did.

    The pool's own committed save comes first, then the manifest in the under-store, then a stock `.metadata`, of which
    only what stock checkpoints consist of is unpickled. Bytes come from the nearest copy, are checked against the
    manifest's checksums, and go straight into their tensors where those are contiguous in CPU memory. Any number of
    ranks may load, however many saved.

    `path` and `pool` are as for CacheStorageWriter. Objects other than tensors must pass torch's weights_only loading;
    `allow_pickle` hands them to the planner unchecked, which lets a checkpoint run code: only for those you trust.
    What can't go straight into its tensor, or isn't one, takes at most `extra_memory_bytes` at a time, and one
    more that is large. Raises ConfigurationError.

    `_extension_registry` is FileSystemReader's, experimental there: it undoes the stream extensions that items were
    saved through.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        pool: str | Pool | LocalPool | None = None,
        allow_pickle: bool = False,
        extra_memory_bytes: int = EXTRA_MEMORY_BYTES,
        _extension_registry: ExtensionRegistry | None = None,
    ) -> None:
        super().__init__()
        self.path: str | os.PathLike[str] = checkpoint_uri(path)
        self.allow_pickle = allow_pickle
        self.extra_memory_bytes = checked_bound(extra_memory_bytes)
        self._extension_registry = _extension_registry
        self._given_pool = pool
        self._forget()

    def _forget(self) -> None:
        self._pool: Pool | None = None
        self._calm: Truce | None = None
        self._decoded: tuple[bytes, Manifest] | None = None
        self._opens_again = False
        self._close()

    def _close(self) -> None:
        self._source: Source | None = None
        self._hold: Hold | None = None
        self._part = ""
        self._save_id = ""  # of what is open, or what stands for it where it has none
        self._items: dict[MetadataIndex, Item] = {}
        self._global_error: Exception | None = None
        self.load_id = ""
        """What `storage_meta` calls the load for which the metadata was read last."""
        self._end_calm()

    def __getstate__(self) -> dict[str, Any]:
        given = self._given_pool.pool if isinstance(self._given_pool, LocalPool) else self._given_pool
        return {
            "path": self.path,
            "allow_pickle": self.allow_pickle,
            "extra_memory_bytes": self.extra_memory_bytes,
            "_extension_registry": self._extension_registry,
            "_given_pool": given,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        return f"CacheStorageReader({str(self.path)!r})"

    # ---- the contract, in the order torch calls it ----

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` is a path or URI that can name a checkpoint."""
        return looks_like_checkpoint(checkpoint_id)

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The URI that is loaded from."""
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins another load, from `checkpoint_id` if given."""
        if self._hold is not None:
            self._hold.release()
        self._close()
        if checkpoint_id:
            self.path = checkpoint_uri(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata; with `rank=`, that of the part which this rank saved without collectives.

        Raises NotCommitted if there is no checkpoint, IntegrityError if its manifest is damaged.
        """
        rank: int | None = kwargs.get("rank")
        if rank is None:
            self._source = self._global_error = None
            try:
                return self._open("")
            except Exception as error:
                self._global_error = error
                raise
        # torch asks for a rank's part after any error. Loading it after a passing one would part this rank from the
        # others, who load the whole: they would wait for it forever.
        if self._global_error is not None and not isinstance(self._global_error, NotCommitted):
            raise self._global_error
        return self._open(part_name(rank))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        if self._source is None:
            self._open(part_name(kwargs["rank"]) if not kwargs.get("use_collectives", True) else "")
        if metadata.storage_data is None:
            raise CheckpointError("the metadata has no storage_data", object=str(self.path))
        if _save_id_of(metadata, default=self._save_id) != self._save_id:
            raise self._overwritten()
        if self._calm is None and len(metadata.storage_data) >= MANY_ITEMS:
            self._begin_calm(metadata)
        self._items = {index: item_at(index, info, metadata) for index, info in metadata.storage_data.items()}

    def _begin_calm(self, metadata: Metadata) -> None:
        """Until it has been loaded by: whoever plans from `metadata` makes objects by the ten thousand."""
        before, self._calm = self._calm, Truce(CALM_S)
        self._calm.end_with(metadata)
        if before is not None:
            before.end()

    def _end_calm(self) -> None:
        calm, self._calm = self._calm, None
        if calm is not None:
            calm.end()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Tells the coordinator which save this rank has open; one of the rank's own concerns nobody else."""
        return plan if self._part else replace(plan, storage_data=self._save_id)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Raises CheckpointError if the ranks found different saves: each looked for itself."""
        if len({plan.storage_data for plan in plans if isinstance(plan.storage_data, str)}) > 1:
            raise self._overwritten()
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fetches and hands over what the plan asks for; done when it returns.

        The planner is asked from this thread alone.
        """
        source = self._source
        if source is None:
            raise CheckpointError("set_up_storage_reader has to be called first", object=str(self.path))
        loads = plan_loads(
            plan.items,
            self._items,
            planner,
            require=source.require,
            allow_pickle=self.allow_pickle,
            registry=self._extension_registry,
        )
        small = sum(self._length(item) for item in plan.items) < A_MOMENT_BYTES
        if not small:
            self._end_calm()
        with (
            self._hold.kept() if self._hold is not None else nullcontext(),
            garbage_waits() if small else nullcontext(),
        ):
            run_loads(loads, source, extra_memory_bytes=self.extra_memory_bytes)
        # What was opened goes with torch's plans, before the collector looks at them; the next load opens anew.
        self._hold = self._calm = self._source = None
        self._items = {}
        if not self._opens_again:
            self._decoded = None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _length(self, request: ReadItem) -> int:
        item = self._items.get(request.storage_index)
        return 0 if item is None else item.length

    def backing(self, metadata: Metadata) -> Backing:
        """What bears out the shapes that `metadata`, as read last, claims. Good for longer than one load."""
        if self._source is None:
            raise CheckpointError("read_metadata has to be called first", object=str(self.path))
        return Backing(metadata, self._source, where=str(self.path), registry=self._extension_registry)

    def give_hold(self) -> Hold | None:
        """Hands the hold on what is open to the caller, to keep it for longer than one load; None of a stock one."""
        hold, self._hold, self._opens_again = self._hold, None, True
        return hold

    # ---- within ----

    @property
    def pool(self) -> Pool:
        """The pool, connected at first use in each process."""
        if self._pool is None:
            self._pool = connect(self._given_pool)
        return self._pool

    def _overwritten(self) -> CheckpointError:
        uri = str(self.path)
        return CheckpointError(f"{uri} was overwritten while it was being loaded; load it again", object=uri)

    def _open(self, part: str) -> Metadata:
        uri = at_storage(self.pool, str(self.path))
        self._part = part
        store, path = self.pool.resolve(uri)
        try:
            info = self.pool.get_save(store, path, part)
        except NotCommitted:
            info = None
        if info is None or info.state == "reserved":
            return self._open_stock(uri, part)
        return self._open_save(uri, info)

    def _open_save(self, uri: str, info: SaveInfo) -> Metadata:
        if self._hold is not None:
            self._hold.release()
        self._hold = Hold(self.pool, info)
        self._hold.take()
        with garbage_waits():
            manifest = self._decode(info.manifest, uri)
            if manifest.save_id != info.save_id:
                raise IntegrityError(f"the manifest of {uri} belongs to another save", object=uri)
            saved = SavedFiles.of(info, manifest.files)
            self._source = Source(self.pool, uri, saved, durable=info.state == "durable")
            self._save_id = info.save_id
            pickled_bytes = manifest.pickled_bytes
            self.load_id = uuid.uuid4().hex
            metadata = metadata_of(
                manifest, load_id=self.load_id, pickled=lambda: self._pickled(uri, info, pickled_bytes)
            )
            if len(info.manifest) >= _MANIFEST_OF_MANY_BYTES:
                self._begin_calm(metadata)
        return metadata

    def _decode(self, manifest: bytes, uri: str) -> Manifest:
        """The manifest; that of the last time if it is the same: a resume opens its checkpoint more than once."""
        if self._decoded is None or self._decoded[0] != manifest:
            self._decoded = (manifest, Manifest.decode(manifest, where=uri))
        return self._decoded[1]

    def _open_stock(self, uri: str, part: str) -> Metadata:
        name = metadata_name(part)
        try:
            file = self.pool.stat(f"{uri}/{name}")
            if not file.size:  # how an overwrite withdraws the old checkpoint before it writes the new one
                raise ObjectNotFound(f"{uri}/{name} is empty", object=f"{uri}/{name}")
        except ObjectNotFound as error:
            raise NotCommitted(
                f"there is no committed checkpoint at {uri}: neither a save in the pool, nor a manifest or {name} in "
                f"the under-store ({error.message})",
                object=uri,
            ) from error
        metadata = load_metadata(self._content(file, uri), where=f"{uri}/{name}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None  # noqa: S101 - narrows the type
        metadata.storage_meta.load_id = self.load_id = uuid.uuid4().hex
        self._source = Source(self.pool, uri, None, durable=True)
        self._save_id = _save_id_of(metadata, default=file.id.version)
        return metadata

    def _pickled(self, uri: str, info: SaveInfo, size: int) -> Metadata:
        """`.metadata` of our own save, from the pool or the under-store."""
        name = metadata_name(info.part)
        copy = saved_file(info.store, info.path, name, info.save_id)
        try:
            data = self._content(ObjectInfo(copy, size), save_namespace(info.store, info.path, info.save_id))
        except NotResident:
            data = self._content(self.pool.stat(f"{uri}/{name}"), uri)
        return load_metadata(data, where=f"{uri}/{name}")

    def _content(self, file: ObjectInfo, namespace: str) -> bytes:
        if file.size > MOST_METADATA_BYTES:
            raise CheckpointError(
                f"{file.id.key} has {file.size:,} bytes; of a checkpoint's metadata at most {MOST_METADATA_BYTES:,} "
                "are read, as it is taken into memory whole. If it is yours and you trust it, load it with torch's own "
                "reader",
                object=file.id.key,
            )
        return bytes(self.pool.read([Extent(file)], namespace=namespace)[0])


def _save_id_of(metadata: Metadata, *, default: str) -> str:
    """The save that a Metadata belongs to; older releases of torch gave it no id."""
    return getattr(getattr(metadata, "storage_meta", None), "save_id", None) or default
