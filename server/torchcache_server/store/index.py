"""Where each chunk lies: an LMDB database that other processes can read too.

It is derived: whatever it says can be found again by reading the segments, so nothing here is synced on the way. After
an unclean stop it is thrown away and rebuilt. After a clean one it is opened if it is byte for byte as it was left
(`folder.index_trust`), and trusted for the segments whose files have their length.

Tables: `chunks` (digest of the object, chunk index) -> (segment, offset); `members` (segment, offset) -> key in
`chunks`, so that a segment's records can be dropped together; `segments`: what a clean stop noted of each segment;
`files`: where the file of each segment is, for clients that map it themselves (`torchcache.records.file_at`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import lmdb
import numpy as np
import xxhash

from torchcache.errors import OutOfSpace
from torchcache.records import (
    CHUNKS_TABLE,
    FILES_TABLE,
    INDEX_FILES,
    LOCATION,
    MAX_READERS,
    MEMBERS_TABLE,
    NOTES_TABLE,
    SEGMENT_NUMBER,
    Location,
    SegmentHeader,
    file_entry,
)

_NOTE: Final = struct.Struct(">QQQQ")

_MIN_MAP_BYTES: Final = 1 << 32
_MAX_MAP_BYTES: Final = 1 << 44


class SegmentNote(NamedTuple):
    """What a clean stop knew of a segment: the end of its records, how many there are and what they take, in bytes, and
    its namespace's last use.
    """

    tail: int
    chunks: int
    live_bytes: int
    last_used: int


PLACE: Final = np.dtype([("key", "V20"), ("segment", ">u8"), ("offset", ">u8"), ("record_bytes", ">u4")])
"""A record that was found. As bytes, places sort by chunk, then by age."""

PlaceArray = np.ndarray[Any, np.dtype[np.void]]

_PLACE: Final = struct.Struct(">16sIQQI")


def pack_place(
    identity: bytes | memoryview, index: int, location: Location | tuple[int, int], size: int
) -> bytes:
    """A `PLACE`, from what a record's header says, and where it is. `size` in bytes, header included."""
    return _PLACE.pack(xxhash.xxh3_128_digest(identity), index, *location, size)


class _Tables(NamedTuple):
    chunks: Any  # lmdb's handle, whose class it doesn't export
    members: Any
    segments: Any
    files: Any


class Index:
    """The open database. Reading needs no lock; one writer at a time, others wait."""

    def __init__(self, path: str, *, capacity_bytes: int) -> None:
        """Opens or creates the database in folder `path`. Raises lmdb.Error if what lies there isn't one."""
        # The map is address space, not disk: the file is as large as its content. Twice the capacity holds the index
        # of records that are all payload-less, the most entries a byte of segment can ask for.
        map_bytes = min(max(2 * capacity_bytes, _MIN_MAP_BYTES), _MAX_MAP_BYTES)
        self._env = lmdb.open(
            path,
            map_size=map_bytes - map_bytes % (1 << 20),
            max_dbs=4,
            max_readers=MAX_READERS,
            max_spare_txns=64,
            mode=0o600,
            sync=False,
            metasync=False,
            meminit=False,
            readahead=False,
        )
        self.forget_dead_readers()
        names = (CHUNKS_TABLE, MEMBERS_TABLE, NOTES_TABLE, FILES_TABLE)
        self._tables = _Tables(*(self._env.open_db(name) for name in names))

    def get(self, key: bytes) -> Location | None:
        """The chunk's place, or None. A damaged index knows nothing."""
        try:
            with self._env.begin(self._tables.chunks) as txn:
                value = txn.get(key)
        except lmdb.Error:
            return None
        return None if value is None else Location(*LOCATION.unpack(value))

    def get_many(self, keys: Sequence[bytes]) -> list[Location | None]:
        """`get` for many keys, in one transaction."""
        unpack = LOCATION.unpack
        try:
            with self._env.begin(self._tables.chunks) as txn:
                values = [txn.get(key) for key in keys]
        except lmdb.Error:
            values = [None for _ in keys]
        return [None if value is None else Location(*unpack(value)) for value in values]

    def owns(self, key: bytes, location: Location) -> bool:
        """Whether both tables say that the chunk lies there. A damaged index says no."""
        try:
            with self._env.begin() as txn:
                return IndexWriter(txn, self._tables).owns(key, location)
        except lmdb.Error:
            return False

    def members(self, segment: int) -> list[tuple[bytes, int]]:
        """Keys and offsets of a segment's chunks, by rising offset. A damaged index knows nothing."""
        found: list[tuple[bytes, int]] = []
        try:
            with self._env.begin() as txn, txn.cursor(self._tables.members) as cursor:
                more = cursor.set_range(LOCATION.pack(segment, 0))
                while more and cursor.key()[:8] == SEGMENT_NUMBER.pack(segment):
                    place, key = cursor.item()
                    # A chunk stored again elsewhere after its old place could not be forgotten isn't this segment's.
                    if txn.get(key, db=self._tables.chunks) == place:
                        found.append((key, Location(*LOCATION.unpack(place)).offset))
                    more = cursor.next()
        except lmdb.Error:
            return []
        return found

    @contextmanager
    def writing(self) -> Iterator[IndexWriter]:
        """One transaction: all of it becomes visible at the end of the block, or nothing if that raises.

        Raises OutOfSpace if the disk takes no more of the index.
        """
        try:
            with self._env.begin(write=True) as txn:
                yield IndexWriter(txn, self._tables)
        except lmdb.Error as error:
            raise OutOfSpace(f"the store's index can't be written: {error}; free some disk space") from error

    def forget_dead_readers(self) -> None:
        """Lets pages be used again that processes held which died while they looked something up.

        Without it the file would grow with every write, as long as the server lives.
        """
        self._env.reader_check()

    def notes(self) -> dict[int, SegmentNote]:
        """What the last clean stop noted, by segment."""
        with self._env.begin(self._tables.segments) as txn:
            return {SEGMENT_NUMBER.unpack(k)[0]: SegmentNote(*_NOTE.unpack(v)) for k, v in txn.cursor()}

    def close(self, notes: dict[int, SegmentNote] | None) -> None:
        """Notes the segments' state and makes the whole index durable; with None it is just closed."""
        try:
            if notes is not None:
                with self.writing() as writer:
                    writer.replace_notes(notes)
                self._env.sync(True)
        except lmdb.Error as error:
            raise OutOfSpace(f"the store's index can't be synced: {error}") from error
        finally:
            self._env.close()


class IndexWriter:
    """What can be done in a transaction of `Index.writing`."""

    def __init__(self, txn: lmdb.Transaction, tables: _Tables) -> None:
        self._txn = txn
        self._chunks = tables.chunks
        self._members = tables.members
        self._segments = tables.segments
        self._files = tables.files

    def get(self, key: bytes) -> Location | None:
        """The chunk's place as this transaction sees it."""
        value = self._txn.get(key, db=self._chunks)
        return None if value is None else Location(*LOCATION.unpack(value))

    def owns(self, key: bytes, location: Location) -> bool:
        """Whether both tables say that the chunk lies there."""
        packed = LOCATION.pack(*location)
        return bool(
            self._txn.get(key, db=self._chunks) == packed and self._txn.get(packed, db=self._members) == key
        )

    def put(self, key: bytes, location: Location) -> Location | None:
        """Places a chunk; returns the place it had before, which is forgotten."""
        before = self.get(key)
        if before is not None:
            self._forget_place(key, before)
        packed = LOCATION.pack(*location)
        self._txn.put(key, packed, db=self._chunks)
        self._txn.put(packed, key, db=self._members)
        return before

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Location]:
        """The places of those chunks that have one."""
        if not self._txn.stat(self._chunks)["entries"]:
            return {}
        with self._txn.cursor(self._chunks) as cursor:
            found = cursor.getmulti(keys)
        return {bytes(key): Location(*LOCATION.unpack(place)) for key, place in found}

    def put_all(self, places: PlaceArray) -> None:
        """Places many chunks that have no place yet, given in order of their keys.

        Into an empty index that is ten times faster than `put` one by one, and makes it half as large.
        """
        rows = places.tobytes()
        steps = range(0, len(rows), PLACE.itemsize)
        self._put_sorted(self._chunks, ((rows[at : at + 20], rows[at + 20 : at + 36]) for at in steps))
        rows = places[np.lexsort((places["offset"], places["segment"]))].tobytes()
        self._put_sorted(self._members, ((rows[at + 20 : at + 36], rows[at : at + 20]) for at in steps))

    def _put_sorted(self, table: Any, rows: Iterable[tuple[bytes, bytes]]) -> None:
        append = not self._txn.stat(table)["entries"]
        with self._txn.cursor(table) as cursor:
            cursor.putmulti(rows, append=append)

    def delete(self, key: bytes) -> Location | None:
        """Forgets a chunk; returns the place it had."""
        before = self.get(key)
        if before is not None:
            self._forget_place(key, before)
            self._txn.delete(key, db=self._chunks)
        return before

    def _forget_place(self, key: bytes, location: Location) -> None:
        packed = LOCATION.pack(*location)
        if (
            self._txn.get(packed, db=self._members) == key
        ):  # else the chunk's entry was wrong: another lies there
            self._txn.delete(packed, db=self._members)

    def delete_segment(self, number: int) -> int:
        """Forgets all chunks of a segment; returns how many there were."""
        count = 0
        with self._txn.cursor(self._members) as cursor:
            found = cursor.set_range(LOCATION.pack(number, 0))
            while found and cursor.key()[:8] == SEGMENT_NUMBER.pack(number):
                place, key = cursor.item()
                # A chunk stored again elsewhere after its old place could not be forgotten isn't this segment's.
                if self._txn.get(key, db=self._chunks) == place:
                    self._txn.delete(key, db=self._chunks)
                    count += 1
                found = cursor.delete()
        self._txn.delete(SEGMENT_NUMBER.pack(number), db=self._files)
        return count

    def put_file(self, header: SegmentHeader) -> None:
        """Says where a segment's file is."""
        entry = file_entry(header.nonce, header.namespace)
        self._txn.put(SEGMENT_NUMBER.pack(header.number), entry, db=self._files)

    def replace_files(self, headers: Iterable[SegmentHeader]) -> None:
        """Says where these segments' files are, and forgets all others."""
        self._txn.drop(self._files, delete=False)
        for header in headers:
            self.put_file(header)

    def replace_notes(self, notes: dict[int, SegmentNote]) -> None:
        """Puts `notes` in the place of all earlier ones."""
        self._txn.drop(self._segments, delete=False)
        for number, note in notes.items():
            self._txn.put(SEGMENT_NUMBER.pack(number), _NOTE.pack(*note), db=self._segments)


def remove_index(path: str) -> None:
    """Throws the database away; it must not be open."""
    for name in INDEX_FILES:
        try:
            os.unlink(os.path.join(path, name))
        except FileNotFoundError:
            pass


class IndexReader:
    """An index that nobody has open, to be read only: not even its lock file is touched. Methods raise lmdb.Error.

    For one that is known to be as it was left: LMDB may end the process over any other.
    """

    def __init__(self, path: str) -> None:
        self._env = lmdb.open(path, readonly=True, lock=False, create=False, max_dbs=3, readahead=False)
        try:
            self._chunks = self._env.open_db(CHUNKS_TABLE, create=False)
            self._members = self._env.open_db(MEMBERS_TABLE, create=False)
        except lmdb.Error:
            self._env.close()
            raise

    def place(self, key: bytes) -> Location | None:
        """The chunk's place, or None."""
        with self._env.begin(self._chunks) as txn:
            value = txn.get(key)
        return None if value is None else Location(*LOCATION.unpack(value))

    def members(self, number: int) -> dict[int, bytes]:
        """Offsets of a segment's records, and the keys of their chunks."""
        found = {}
        with self._env.begin(self._members) as txn, txn.cursor() as cursor:
            there = cursor.set_range(LOCATION.pack(number, 0))
            while there and cursor.key()[:8] == SEGMENT_NUMBER.pack(number):
                found[Location(*LOCATION.unpack(cursor.key())).offset] = cursor.value()
                there = cursor.next()
        return found

    def segments(self) -> list[int]:
        """Numbers of the segments that have records, rising."""
        numbers = []
        with self._env.begin(self._members) as txn, txn.cursor() as cursor:
            there = cursor.first()
            while there:
                [number] = SEGMENT_NUMBER.unpack(cursor.key()[:8])
                numbers.append(number)
                there = cursor.set_range(LOCATION.pack(number + 1, 0))
        return numbers

    def close(self) -> None:
        self._env.close()
