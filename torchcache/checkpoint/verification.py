"""Reading every byte of a saved checkpoint, and checking it against its manifest. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchcache.checkpoint.layout import cut
from torchcache.checkpoint.manifest import Item, Manifest, by_file, frame_digest
from torchcache.errors import IntegrityError, TorchCacheError, TransientError
from torchcache.model import CHUNK_BYTES, ByteRange, Extent, ObjectId, ObjectInfo

if TYPE_CHECKING:
    from torchcache.pool import Pool, SaveInfo

PIECE_BYTES = 4 * CHUNK_BYTES
"""Items up to this are read whole; the payloads of larger ones in pieces of it."""

_BATCH_BYTES = 64 * 1024 * 1024
_BATCH_PIECES = 512


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a file, or with one item of it."""

    file: str
    item: str | None
    error: TorchCacheError


@dataclass(slots=True)
class Piece:
    """Bytes [start, end) of a file, which belong to one item."""

    object: ObjectInfo
    item: Item
    range: ByteRange


def verify_save(
    pool: Pool, save: SaveInfo, manifest: Manifest, *, on_progress: Callable[[int, int], None]
) -> list[Fault]:
    """Reads the items of a save as a resume would, and returns what does not match its manifest.

    A durable save's files are read as they lie in the under-store (through the cache), one that isn't durable yet from
    the pool. `on_progress` gets (items, bytes) just read. Raises TransientError if the pool can't be asked.
    """
    faults: list[Fault] = []
    heads: dict[int, bytes] = {}
    for batch in _batches(_pieces(pool, save, manifest, faults)):
        extents = [Extent(piece.object, piece.range.start, piece.range.length) for piece in batch]
        outcomes = pool.read_each(extents, namespace=pool.uri(ObjectId(save.store, save.path, "")))
        for piece, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, TransientError):
                raise outcome
            try:
                if isinstance(outcome, TorchCacheError):
                    raise outcome
                _check(piece, outcome, heads)
            except TorchCacheError as error:
                faults.append(Fault(piece.item.file, piece.item.name, error))
            last = piece.range.end == piece.item.start + piece.item.length
            on_progress(int(last), piece.range.length)
    return faults


def _pieces(pool: Pool, save: SaveInfo, manifest: Manifest, faults: list[Fault]) -> Iterator[Piece]:
    for file, items in by_file(manifest.items):
        try:
            object = _file(pool, save, file, manifest.files[file])
        except TransientError:
            raise
        except TorchCacheError as error:
            faults.append(Fault(file, None, error))
            continue
        for item in items:
            for part in _parts(item):
                yield Piece(object, item, part)


def _file(pool: Pool, save: SaveInfo, name: str, size: int) -> ObjectInfo:
    """The object that holds a file of the save. Raises IntegrityError if its size is wrong."""
    if save.state != "durable":
        return ObjectInfo(save.file(name), size)
    uri = pool.uri(ObjectId(save.store, f"{save.path}/{name}", ""))
    object = pool.stat(uri)
    if object.size != size:
        raise IntegrityError(f"it has {object.size} bytes, and the manifest says {size}", object=uri)
    return object


def _parts(item: Item) -> Iterator[ByteRange]:
    """What to read of an item, in order, as ranges of its file."""
    start, end = item.start, item.start + item.length
    if item.length <= PIECE_BYTES:
        yield ByteRange(start, end)
        return
    yield ByteRange(start, item.payload.start)
    for part in cut(ByteRange(0, item.payload_length), PIECE_BYTES):
        yield ByteRange(item.payload.start + part.start, item.payload.start + part.end)
    yield ByteRange(item.payload.end, end)


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and (size + piece.range.length > _BATCH_BYTES or len(batch) == _BATCH_PIECES):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.range.length
    if batch:
        yield batch


def _check(piece: Piece, data: memoryview, heads: dict[int, bytes]) -> None:
    """Checks a piece. `heads` keeps the bytes before a large item's payload until those behind it come."""
    item, payload = piece.item, piece.item.payload
    inner = ByteRange(max(piece.range.start, payload.start), min(piece.range.end, payload.end))
    if inner.start < inner.end:
        at = piece.range.start
        part = ByteRange(inner.start - payload.start, inner.end - payload.start)
        item.verify(part, data[inner.start - at : inner.end - at])
    if piece.range.start == item.start:
        heads[id(item)] = bytes(data[: item.payload_start])
    if piece.range.end == item.start + item.length:
        tail = data[len(data) - (piece.range.end - max(payload.end, piece.range.start)) :]
        if frame_digest(heads.pop(id(item), b""), tail) != item.frame_digest:
            raise IntegrityError(
                f"the frame of {item.name!r} in file {item.file} does not match its checksum"
            )
