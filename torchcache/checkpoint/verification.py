"""Reading every byte of a saved checkpoint in each place that has it, and checking it against its manifest.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from torchcache.checkpoint.layout import cut
from torchcache.checkpoint.manifest import Item, Manifest, by_file, frame_digest
from torchcache.errors import (
    ConfigurationError,
    IntegrityError,
    NotResident,
    TorchCacheError,
    TransientError,
)
from torchcache.model import CHUNK_BYTES, ByteRange, Extent, ObjectId, ObjectInfo
from torchcache.save_names import save_namespace

if TYPE_CHECKING:
    from torchcache.pool import Pool, SaveInfo

PIECE_BYTES = 4 * CHUNK_BYTES
"""Items up to this are read whole; the payloads of larger ones in pieces of it."""

_BATCH_BYTES = 64 * 1024 * 1024
_BATCH_PIECES = 512


STORAGE: Final = "storage"
"""The place that isn't a server of the pool."""

_TIMEOUT_S: Final = 120.0

Read = Callable[[list[Extent]], Sequence[memoryview | TorchCacheError]]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong in a place with a file, or with one item of it; without a file, with the place."""

    place: str
    file: str
    item: str | None
    error: TorchCacheError


@dataclass(slots=True)
class Place:
    """Where the bytes of a save are: the address of a server, or STORAGE. Of `missing_bytes` a server whose copy isn't
    needed any more has freed some, which is no fault."""

    name: str
    held_bytes: int = 0
    missing_bytes: int = 0
    faults: list[Fault] = field(default_factory=list)

    def fault(self, file: str, item: str | None, error: TorchCacheError) -> None:
        """Notes one."""
        self.faults.append(Fault(self.name, file, item, error))


@dataclass(slots=True)
class Piece:
    """Bytes [start, end) of a file, which belong to one item."""

    object: ObjectInfo
    item: Item
    range: ByteRange


def verify_save(
    pool: Pool,
    save: SaveInfo,
    manifest: Manifest,
    *,
    on_progress: Callable[[int, int], None],
    servers: Mapping[str, str],
) -> list[Place]:
    """Reads the items of a save in each place that holds any, and says what doesn't match its manifest there.

    Of `servers`, addresses by ids, each is asked for what it holds itself: of a save that isn't durable all of it, or
    what isn't there is a fault, as are fewer holders than there were. Of a durable one storage is read too: what the
    pool caches of its files is evicted first, unless it is pinned. `on_progress` gets (items, bytes) just gone
    through, all of the save for each server and for storage. Raises TransientError if storage can't be read.
    """
    durable = save.state == "durable"
    namespace = save_namespace(save.store, save.path, save.save_id)
    places: list[Place] = []
    whole = 0
    for server, address in servers.items():
        place = Place(address)

        def read(extents: list[Extent], server: str = server) -> Sequence[memoryview | TorchCacheError]:
            return pool.read_held(server, extents, namespace=namespace, timeout_s=_TIMEOUT_S)

        pieces = _pieces(manifest, lambda file: ObjectInfo(save.file(file), manifest.files[file]), place)
        try:
            absent = _verify(place, pieces, read, on_progress)
        except TransientError as error:
            place.fault("", None, error)
            absent = []
        if not durable and place.held_bytes:
            for piece, missing in absent:
                place.fault(piece.item.file, piece.item.name, missing)
        whole += bool(place.held_bytes) and not place.faults
        if place.held_bytes or place.faults:
            places.append(place)
    if not durable and whole < save.replicas:
        _note_lost(places, save, whole)
    if durable:
        places.append(_verify_stored(pool, save, manifest, on_progress))
    return places


def _note_lost(places: list[Place], save: SaveInfo, whole: int) -> None:
    """Fewer servers hold all of it than when it was committed, and storage doesn't yet."""
    lost = Place("pool")
    servers = "1 server holds" if whole == 1 else f"{whole} servers hold"
    lost.fault(
        "",
        None,
        IntegrityError(f"{servers} all of it; when it was committed {save.replicas} did", object=save.path),
    )
    places.append(lost)


def _verify_stored(
    pool: Pool, save: SaveInfo, manifest: Manifest, on_progress: Callable[[int, int], None]
) -> Place:
    uri = pool.uri(ObjectId(save.store, save.path, ""))
    with suppress(ConfigurationError):  # it is pinned, or this token may not
        pool.evict(uri)
    place = Place(STORAGE)
    pieces = _pieces(manifest, lambda file: _stored(pool, save, file, manifest.files[file]), place)
    absent = _verify(
        place,
        pieces,
        lambda extents: pool.read_each(extents, namespace=uri, timeout_s=_TIMEOUT_S),
        on_progress,
    )
    for piece, error in absent:
        place.fault(piece.item.file, piece.item.name, error)
    return place


def _verify(
    place: Place,
    pieces: Iterator[Piece],
    read: Read,
    on_progress: Callable[[int, int], None],
) -> list[tuple[Piece, TorchCacheError]]:
    """Checks what a place holds of `pieces`, and returns what it doesn't; of an item that it lacks a part of only that.

    A passing error, which says nothing of the bytes, is raised.
    """
    absent: list[tuple[Piece, TorchCacheError]] = []
    heads: dict[int, bytes] = {}
    broken: set[int] = set()  # items of which a part isn't there: their frames can't be checked
    for batch in _batches(pieces):
        outcomes = read([Extent(piece.object, piece.range.start, piece.range.length) for piece in batch])
        for piece, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, TransientError):
                raise outcome
            if isinstance(outcome, NotResident):
                absent.append((piece, outcome))
                broken.add(id(piece.item))
                place.missing_bytes += piece.range.length
            else:
                place.held_bytes += piece.range.length
                try:
                    if isinstance(outcome, TorchCacheError):
                        broken.add(id(piece.item))
                        raise outcome
                    _check(piece, outcome, heads, frame=id(piece.item) not in broken)
                except TorchCacheError as error:
                    place.fault(piece.item.file, piece.item.name, error)
            last = piece.range.end == piece.item.start + piece.item.length
            on_progress(int(last), piece.range.length)
    return absent


def _pieces(manifest: Manifest, object_of: Callable[[str], ObjectInfo], place: Place) -> Iterator[Piece]:
    for file, items in by_file(manifest.items):
        try:
            object = object_of(file)
        except TransientError:
            raise
        except TorchCacheError as error:
            place.fault(file, None, error)
            continue
        for item in items:
            for part in _parts(item):
                yield Piece(object, item, part)


def _stored(pool: Pool, save: SaveInfo, name: str, size: int) -> ObjectInfo:
    """A file of the save in the under-store. Raises IntegrityError if its size is wrong."""
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


def _check(piece: Piece, data: memoryview, heads: dict[int, bytes], *, frame: bool) -> None:
    """Checks a piece, and with the last of an item its `frame`.

    `heads` keeps the bytes before a large item's payload until those behind it come.
    """
    item, payload = piece.item, piece.item.payload
    inner = ByteRange(max(piece.range.start, payload.start), min(piece.range.end, payload.end))
    if inner.start < inner.end:
        at = piece.range.start
        part = ByteRange(inner.start - payload.start, inner.end - payload.start)
        item.verify(part, data[inner.start - at : inner.end - at])
    if piece.range.start == item.start:
        heads[id(item)] = bytes(data[: item.payload_start])
    if frame and piece.range.end == item.start + item.length:
        tail = data[len(data) - (piece.range.end - max(payload.end, piece.range.start)) :]
        if frame_digest(heads.pop(id(item), b""), tail) != item.frame_digest:
            raise IntegrityError(
                f"the frame of {item.name!r} in file {item.file} does not match its checksum"
            )
