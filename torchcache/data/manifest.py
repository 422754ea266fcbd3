"""The frozen list of a dataset's objects: an Arrow IPC file that every worker maps.

A million objects cost each process a few pages of page cache instead of a list of its own. The file is named by its
checksum and lies in the user's cache folder, so the ranks of a job share it; it pickles as path and digests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from torchcache.errors import ConfigurationError, IntegrityError, ObjectNotFound
from torchcache.model import ObjectId, ObjectInfo, object_infos

_SCHEMA = pa.schema([("id", pa.large_binary()), ("size", pa.int64())])  # `ObjectId.encoded`
BATCH_ROWS = 65_536
_PRIVATE = "listing-"
T = TypeVar("T")
_UNUSED_S = 30 * 24 * 3600.0


class _Rows(NamedTuple):
    """A batch of the list where it lies in the mapped file. Id i is ids[offsets[i]:offsets[i + 1]]."""

    offsets: memoryview
    ids: memoryview
    sizes: memoryview

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _Rows:
        (_, offsets, ids), (_, sizes) = (
            [memoryview(buffer or b"") for buffer in column.buffers()] for column in batch.columns
        )
        rows = len(batch)
        return cls(offsets.cast("q")[: rows + 1], ids, sizes.cast("q")[:rows])


class Manifest:
    """Objects of one under-store, in order. Opened at first use in each process; pickles."""

    def __init__(self, path: Path, checksum: str, digest: str) -> None:
        self.path = path
        self.checksum = checksum
        """Hex, of the file's bytes: proves at every opening that they are the ones written."""
        self.digest = digest
        """Hex, of the rows: equal for equal lists, whatever release of Arrow wrote the file."""
        self._open: _OpenList | None = None

    @classmethod
    def write(cls, store: str, objects: Iterable[ObjectInfo], folder: Path) -> Manifest:
        """Writes the list of `objects`, all of the under-store `store`, as a file in `folder`.

        Files in `folder` that no dataset has opened for a month are removed. Raises ConfigurationError if `folder`
        can't be written.
        """
        return cls.of_batches(store, _batches(objects), folder)

    @classmethod
    def of_batches(cls, store: str, batches: Iterable[pa.RecordBatch], folder: Path) -> Manifest:
        """`write`, of rows as `table` has them, in batches of `BATCH_ROWS`."""
        path, checksum, digest = write_file(folder, lambda file: _write_batches(file, store, batches))
        return cls(path, checksum, digest)

    def moved_to(self, folder: Path) -> Manifest:
        """The same list, in `folder`, where others may have put an equal one."""
        return Manifest(self.path.replace(folder / self.path.name), self.checksum, self.digest)

    def __reduce__(self) -> tuple[object, ...]:
        return (Manifest, (self.path, self.checksum, self.digest))

    def __len__(self) -> int:
        return self._load().length

    def __getitem__(self, index: int) -> ObjectInfo:
        """Object number `index`, from 0; negative ones are not for here."""
        return self.take([index])[0]

    def take(self, indices: Iterable[int]) -> list[ObjectInfo]:
        """The objects of `indices`, in order."""
        # From the mapped bytes: Arrow's own scalars take three times as long.
        batches, rows = self._load().batches, BATCH_ROWS
        encoded, taken_sizes = [], []
        for index in indices:
            offsets, ids, sizes = batches[index // rows]
            row = index % rows
            encoded.append(bytes(ids[offsets[row] : offsets[row + 1]]))
            taken_sizes.append(sizes[row])
        return object_infos(ObjectId.all_from_encoded(encoded), taken_sizes)

    def keys(self) -> list[str]:
        """All keys, in order."""
        return [key for part in self.key_parts() for key in part]

    def key_parts(self) -> Iterator[list[str]]:
        """The keys, in order, a batch at a time."""
        for rows in self._load().batches:
            yield [
                ObjectId.from_encoded(bytes(rows.ids[start:end])).key for start, end in pairwise(rows.offsets)
            ]

    def table(self) -> pa.Table:
        """The rows as Arrow has them."""
        self._load()
        with pa.memory_map(str(self.path)) as file:
            return pa.ipc.open_file(file).read_all()

    def size_parts(self) -> Iterator[npt.NDArray[np.int64]]:
        """The sizes, in order, a batch at a time."""
        for rows in self._load().batches:
            yield np.frombuffer(rows.sizes, np.int64)

    @property
    def total_bytes(self) -> int:
        """The sum of all sizes."""
        return sum(int(sizes.sum()) for sizes in self.size_parts())

    def _load(self) -> _OpenList:
        if self._open is None:
            self._open = _map(self.path, self.checksum)
        return self._open


class _OpenList(NamedTuple):
    batches: Sequence[_Rows]
    length: int


@contextlib.contextmanager
def private_folder(folder: Path) -> Iterator[Path]:
    """A folder within `folder` for lists that nobody else should see; it goes with all that is left in it.

    Raises ConfigurationError if `folder` can't be written.
    """
    with _writable(folder):
        own = tempfile.TemporaryDirectory(dir=folder, prefix=_PRIVATE)
    with own as name:
        yield Path(name)


def write_file(folder: Path, write: Callable[[IO[bytes]], T]) -> tuple[Path, str, T]:
    """A file for `map_file` in `folder`, its checksum, and what `write` returned, which wrote it.

    Files in `folder` that nobody has mapped for a month are removed. Raises ConfigurationError if it can't be written.
    """
    with _writable(folder):
        descriptor, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            returned = write(file)
        checksum = _checksum(pa.memory_map(name))
        return temporary.replace(folder / f"{checksum}.arrow"), checksum, returned
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Makes the folder, and what is done in it; an OSError is then told as one of the folder."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(folder)
        yield
    except OSError as error:
        raise ConfigurationError(
            f"can't keep the list of a dataset's files in {folder}: {error}; let TORCHCACHE_HOME name a folder "
            "that can be written"
        ) from error


def _write_batches(file: object, store: str, batches: Iterable[pa.RecordBatch]) -> str:
    """Writes the rows and returns their digest."""
    digest = _RowsDigest(store)
    with pa.ipc.new_file(file, _SCHEMA) as writer:
        for batch in batches:
            digest.update(batch)
            writer.write_batch(batch)
    return digest.hexdigest()


def _batches(objects: Iterable[ObjectInfo]) -> Iterator[pa.RecordBatch]:
    """Batches of `BATCH_ROWS` rows; only the last may be shorter."""
    rest = iter(objects)
    while rows := list(islice(rest, BATCH_ROWS)):
        columns = [[o.id.encoded for o in rows], [o.size for o in rows]]
        yield pa.RecordBatch.from_pydict(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA)


class _RowsDigest:
    """xxh3-128 over what the batches say, independent of how Arrow lays a file out."""

    def __init__(self, store: str) -> None:
        self._hash = xxhash.xxh3_128(store.encode())

    def update(self, batch: pa.RecordBatch) -> None:
        for column in batch.columns:
            _, first, *data = column.buffers()
            rows = len(column)
            if data:
                offsets = memoryview(first).cast("q")[: rows + 1]
                self._hash.update(offsets)
                self._hash.update(memoryview(data[0])[: offsets[rows]] if data[0] else b"")
            else:
                self._hash.update(memoryview(first)[: 8 * rows])

    def hexdigest(self) -> str:
        return str(self._hash.hexdigest())


def _checksum(file: pa.MemoryMappedFile) -> str:
    return str(xxhash.xxh3_128_hexdigest(file.read_buffer()))


def map_file(path: Path, checksum: str, what: str = "files") -> pa.MemoryMappedFile:
    """The file, a dataset's list of `what`, if it is the one that was written.

    Raises ObjectNotFound if it is gone, IntegrityError if it is damaged.
    """
    try:
        file = pa.memory_map(str(path))
    except FileNotFoundError as error:
        raise ObjectNotFound(
            f"the dataset's list of {what}, {path}, is gone, or was made on another machine: create the dataset again, "
            "on this machine",
            object=str(path),
        ) from error
    except OSError as error:
        raise IntegrityError(f"the dataset's list of {what}, {path}, can't be read: {error}") from error
    if _checksum(file) != checksum:
        raise IntegrityError(f"the dataset's list of {what}, {path}, is damaged: create the dataset again")
    with contextlib.suppress(OSError):
        os.utime(path)  # still in use: see _sweep
    return file


def _map(path: Path, checksum: str) -> _OpenList:
    file = map_file(path, checksum)
    reader = pa.ipc.open_file(file)
    batches = [_Rows.of(reader.get_batch(i)) for i in range(reader.num_record_batches)]
    length = sum(len(rows.sizes) for rows in batches)
    return _OpenList(batches, length)


def _sweep(folder: Path) -> None:
    oldest = time.time() - _UNUSED_S
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime >= oldest:
                continue
            if path.suffix in (".arrow", ".tmp"):
                path.unlink()
            elif path.name.startswith(_PRIVATE):
                shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
        except OSError:
            continue  # another process swept it first
