"""The under-store POSIX: a tree of files. An object's version is its size and mtime_ns.

Writes appear at once and whole: a temporary file beside the target, synced, then linked or renamed. Writers of
torchcache exclude each other by a lock on the folder, so that "replace exactly this version" holds among them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice

from torchcache.errors import (
    AlreadyExists,
    ConfigurationError,
    DeadlineExceeded,
    TorchCacheError,
)
from torchcache.model import ByteRange, ObjectId, ObjectInfo
from torchcache.save_names import CLAIM_NAME
from torchcache_server.understore.base import Counters, FolderPage, Listing, changed, check_range, shown_uri
from torchcache_server.understore.posix_files import Root, locked, translate, version_of
from torchcache_server.understore.posix_temporary import Temporaries, remove
from torchcache_server.understore.posix_walk import walk

_TRIES = 100
"""To make a folder and write into it, while others remove it."""

_COPY_BYTES = 16 * 1024 * 1024


class PosixUnderStore:
    """Files beneath the folder of `uri` ("file:///folder"), with their path from there as key.

    Symlinks are followed as long as they end beneath the root; such as lead out of it are not listed. What is made gets
    the mode that `umask` leaves of it; None: the process's own.
    """

    def __init__(self, name: str, uri: str, *, umask: int | None = None) -> None:
        path = uri.removeprefix("file://")
        if not uri.startswith("file:///") or os.path.normpath(path) != (path.rstrip("/") or "/"):
            raise ConfigurationError(
                f"{shown_uri(uri)!r} is not the URI of a folder: write file:///absolute/path"
            )
        self._name = name
        self._root = Root(os.path.normpath(path), umask)
        self._counters = Counters()
        self._temporaries = Temporaries(umask)

    @property
    def name(self) -> str:
        return self._name

    @property
    def uri(self) -> str:
        return self._root.uri

    @property
    def counters(self) -> Counters:
        return self._counters

    def list(self, prefix: str, *, start_after: str, limit: int, deadline: float) -> Listing:
        self._counters.add("meta")
        objects: list[ObjectInfo] = []
        uri = self._root.uri_of(prefix)
        try:
            for key, status in islice(walk(self._root, prefix, start_after), limit + 1):
                if time.monotonic() >= deadline:
                    raise DeadlineExceeded(f"the deadline passed while {uri} was listed", object=uri)
                objects.append(self._info(key, status))
        except TorchCacheError:
            raise  # ObjectNotFound is an OSError too.
        except OSError as error:
            raise translate(error, "list", uri) from error
        return Listing(objects[:limit], truncated=len(objects) > limit)

    def list_folder(
        self, prefix: str, *, token: str, deadline: float, start_after: str = ""
    ) -> FolderPage | None:
        return None

    def stat(self, key: str, *, deadline: float) -> ObjectInfo:
        self._counters.add("meta")
        try:
            with self._root.opened(key) as file:
                return self._info(key, os.fstat(file))
        except TorchCacheError:
            raise  # ObjectNotFound is an OSError too.
        except OSError as error:
            raise translate(error, "stat", self._root.uri_of(key)) from error

    def read(self, object: ObjectInfo, range: ByteRange, *, deadline: float) -> bytearray:
        key, uri = object.id.key, self._root.uri_of(object.id.key)
        check_range(object, range, uri)
        self._counters.add("read")
        try:
            with self._root.opened(key) as file:
                self._check_version(file, object)
                data = bytearray(range.length)
                filled = _read_into(data, file, range.start)
                # Again: a writer in place may have begun after the first look.
                self._check_version(file, object)
        except TorchCacheError:
            raise  # ObjectNotFound is an OSError too.
        except OSError as error:
            raise translate(error, "read", uri) from error
        if filled != len(data):
            raise changed(uri)
        self._counters.add("read", requests=0, bytes=filled)
        return data

    def write(
        self,
        key: str,
        parts: Iterator[memoryview],
        size: int,
        *,
        replaces: str | None,
        deadline: float,
    ) -> ObjectInfo:
        self._counters.add("write")
        uri = self._root.uri_of(key)
        target = key.rpartition("/")[2]
        try:
            with self._place(key, replaces, deadline) as (folder, temporary, file):
                status = self._fill(file, parts, size, uri=uri, deadline=deadline)
                with locked(folder, uri, deadline):
                    found = self._check_replaces(folder, target, replaces, uri)
                    status = _set_apart(file, status, found)
                    _publish(folder, temporary, target, create=replaces == "")
                os.fsync(folder)
        except TorchCacheError:
            raise  # ObjectNotFound is an OSError too.
        except FileExistsError as error:
            raise AlreadyExists(f"{uri} exists already", object=uri) from error
        except OSError as error:
            raise translate(error, "write", uri) from error
        return self._info(key, status)

    def copy(
        self, source: ObjectInfo, key: str, *, replaces: str | None, deadline: float
    ) -> ObjectInfo | None:
        return None  # bytes of a file pass through here anyway

    def delete(self, key: str, *, deadline: float) -> None:
        self._counters.add("meta")
        uri = self._root.uri_of(key)
        try:
            with self._root.folder_of(key, create=False) as folder, locked(folder, uri, deadline):
                remove(folder, key.rpartition("/")[2])
                os.fsync(folder)
                if key.endswith(CLAIM_NAME):  # the last thing of a checkpoint that is deleted, or given up
                    self._root.remove_if_empty(folder, key)
        except TorchCacheError:
            raise  # ObjectNotFound is an OSError too.
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise translate(error, "delete", uri) from error

    def close(self) -> None:
        pass

    @contextmanager
    def _place(self, key: str, replaces: str | None, deadline: float) -> Iterator[tuple[int, str, int]]:
        """The folder of `key`, made if need be, and name and descriptor of a temporary file in it.

        Whoever deletes a checkpoint may remove a folder that is empty; from the file on it is not.
        """
        uri, target = self._root.uri_of(key), key.rpartition("/")[2]
        for tries_left in reversed(range(_TRIES)):
            with ExitStack() as opened:
                try:
                    folder = opened.enter_context(self._root.folder_of(key, create=True))
                    self._check_replaces(folder, target, replaces, uri)
                    temporary, file = opened.enter_context(self._temporaries.file(folder, uri, deadline))
                except TorchCacheError:
                    raise  # ObjectNotFound is a FileNotFoundError too.
                except FileNotFoundError:
                    if not tries_left:
                        raise
                    continue
                yield folder, temporary, file
                return

    def _info(self, key: str, status: os.stat_result) -> ObjectInfo:
        return ObjectInfo(ObjectId(self._name, key, version_of(status)), status.st_size)

    def _check_version(self, file: int, object: ObjectInfo) -> None:
        if version_of(os.fstat(file)) != object.id.version:
            raise changed(self._root.uri_of(object.id.key))

    def _check_replaces(
        self, folder: int, target: str, replaces: str | None, uri: str
    ) -> os.stat_result | None:
        """What is there now, if that is what `replaces` says."""
        try:
            found = os.stat(target, dir_fd=folder)
        except FileNotFoundError:
            found = None
        if replaces == "" and found:
            raise AlreadyExists(f"{uri} exists already", object=uri)
        if replaces and (found is None or version_of(found) != replaces):
            raise AlreadyExists(
                f"{uri} is no longer at version {replaces}: another writer replaced or removed it", object=uri
            )
        return found

    def _fill(
        self, file: int, parts: Iterator[memoryview], size: int, *, uri: str, deadline: float
    ) -> os.stat_result:
        """Writes and syncs the bytes of `parts`."""
        for part in parts:
            view = memoryview(part).cast("B")
            while len(view):
                if time.monotonic() >= deadline:
                    raise DeadlineExceeded(f"the deadline passed while {uri} was written", object=uri)
                count = os.write(file, view[:_COPY_BYTES])
                self._counters.add("write", requests=0, bytes=count)
                view = view[count:]
        # The kernel's own mtime is as coarse as its tick: two writes within one would share a version.
        os.utime(file, ns=(time.time_ns(),) * 2)
        os.fsync(file)
        status = os.fstat(file)
        if status.st_size != size:
            raise ConfigurationError(f"{status.st_size} bytes were given for {uri} of {size}", object=uri)
        return status


def _set_apart(file: int, status: os.stat_result, found: os.stat_result | None) -> os.stat_result:
    """Makes the new file younger than the one it replaces, so that no version comes twice, whatever the clock does."""
    if found is None or found.st_mtime_ns < status.st_mtime_ns:
        return status
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    os.fsync(file)
    return os.fstat(file)


def _publish(folder: int, temporary: str, target: str, *, create: bool) -> None:
    if create:
        os.link(temporary, target, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    else:
        os.rename(temporary, target, src_dir_fd=folder, dst_dir_fd=folder)


def _read_into(data: bytearray, file: int, offset: int) -> int:
    """Fills `data` from `offset` on; how much there was."""
    view, filled = memoryview(data), 0
    while filled < len(view):
        count = os.preadv(file, [view[filled:]], offset + filled)
        if not count:
            break
        filled += count
    return filled
