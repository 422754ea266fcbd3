"""The pool as everything above sees it: ranges in, buffers out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torchcache.errors import TorchCacheError
from torchcache.lanes.base import Buffer
from torchcache.model import Extent, ObjectId, ObjectInfo
from torchcache.pool.members import MemberSource
from torchcache.pool.reports import PoolStatistics, Residency, SaveInfo, ServerStatus


class Pool:
    """A pool of cache servers. Made by `torchcache.connect`.

    Pickles, forks and spawns safely: nothing opens before the first use in each process. All methods are
    thread-safe, keep their deadline, and raise only errors of `torchcache.errors`.
    """

    def __init__(self, source: MemberSource) -> None:
        self._source = source

    def __reduce__(self) -> tuple[object, ...]:
        return (Pool, (self._source,))

    def __repr__(self) -> str:
        return f"Pool({self._source.description!r})"

    @property
    def address(self) -> str:
        """What the pool was connected by: the servers' addresses, or the embedded pool's folder."""
        return self._source.description

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
        raise NotImplementedError

    def read_each(
        self,
        extents: Sequence[Extent],
        *,
        namespace: str = "",
        into: Sequence[memoryview] | None = None,
        resident_only: bool = False,
        timeout_s: float = 60.0,
    ) -> list[memoryview | TorchCacheError]:
        """As `read`, with an error in the place of each extent that failed.

        With `resident_only` what the pool does not hold is `NotResident` instead of fetched.
        """
        raise NotImplementedError

    def write(
        self,
        namespace: str,
        objects: Sequence[tuple[ObjectId, Sequence[Buffer]]],
        *,
        durable: bool = False,
        timeout_s: float = 60.0,
    ) -> None:
        """Stores computed samples or files of a save; each object is the concatenation of its buffers.

        `durable` acknowledges only after fsync. Writing an object again changes nothing.
        """
        raise NotImplementedError

    # ---- objects of the under-stores ----

    def resolve(self, uri: str) -> tuple[str, str]:
        """The (under-store name, key) of a URI. Raises ConfigurationError, naming the under-stores there are."""
        raise NotImplementedError

    def uri(self, object: ObjectId) -> str:
        """The URI of an object; `samples/...` of a computed sample, which has none, is its id."""
        raise NotImplementedError

    def stat(self, uri: str) -> ObjectInfo:
        """The object's version and size now. Raises ObjectNotFound."""
        raise NotImplementedError

    def delete(self, uri: str) -> None:
        """Removes an object from the under-store; absent is fine."""
        raise NotImplementedError

    def publish(self, uri: str, data: Sequence[Buffer], *, create_only: bool = False) -> ObjectInfo:
        """Writes an object through to the under-store; it is there when the call returns.

        Raises AlreadyExists if `create_only` and something is there.
        """
        raise NotImplementedError

    def stage(
        self,
        objects: Sequence[ObjectInfo],
        *,
        namespace: str,
        on_progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Fetches what of `objects` the pool does not hold yet.

        `on_progress` gets (objects, bytes) just done, in the caller's thread; `cancelled` is asked between batches.
        Raises the first error, after all were tried.
        """
        raise NotImplementedError

    def residency(self, objects: Sequence[ObjectInfo]) -> Residency:
        """How much of `objects` the pool holds now."""
        raise NotImplementedError

    # ---- saves of checkpoints; see wire/v1/cache.proto ----

    def reserve_save(
        self, store: str, path: str, part: str, save_id: str, *, overwrite: bool, writer: str
    ) -> float:
        """Claims `path` for a save; returns the lease in seconds, to be renewed within. Raises AlreadyExists."""
        raise NotImplementedError

    def renew_save(self, store: str, path: str, part: str, save_id: str) -> float:
        """Renews the lease and returns it, in seconds. Raises AlreadyExists if another save took over."""
        raise NotImplementedError

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
        overwrite: bool,
        timeout_s: float = 120.0,
    ) -> SaveInfo:
        """Commits a save whose `files` (name relative to `path`, size in bytes) were written durably."""
        raise NotImplementedError

    def abandon_save(self, store: str, path: str, part: str, save_id: str) -> None:
        """Gives up a reservation and what was written under it."""
        raise NotImplementedError

    def get_save(self, store: str, path: str, part: str = "") -> SaveInfo:
        """The committed save at `path`. Raises NotCommitted."""
        raise NotImplementedError

    def list_saves(self, uri: str) -> list[SaveInfo]:
        """The saves under the folder `uri`, without manifests."""
        raise NotImplementedError

    # ---- the pool itself ----

    def status(self) -> list[ServerStatus]:
        """How every server is. Raises ServerUnavailable if none can be reached."""
        raise NotImplementedError

    def statistics(self) -> PoolStatistics:
        """What this process asked of the pool so far."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes this process's connections; the next use opens them again."""
        raise NotImplementedError

    # Last, because its name hides the type within the class.
    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """Every object under the folder `uri`, by key, bytewise, fetched page by page."""
        raise NotImplementedError
