"""Records as a client writes them: byte for byte those that the server would write, wherever the payload lies."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from unittest import mock

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcache.lanes import flight, record_writing
from torchcache.lanes.base import Data, Scattered
from torchcache.lanes.record_writing import Bytes, FileCalls, Record, SegmentWriter
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, ObjectId, ObjectInfo, block_digests, chunk_digest
from torchcache.records import RecordHeader, encode_record, header_bytes, padding

PIECE = 2 * BLOCK_BYTES
NONCE = 77
START = 64

NEAR_BLOCKS = st.builds(
    lambda count, by: max(0, count * BLOCK_BYTES + by), st.integers(0, 5), st.integers(-2, 2)
)
PARTS = st.lists(st.one_of(NEAR_BLOCKS, st.integers(0, 200)), max_size=6)


class Memory(FileCalls):
    """One file, of which each write takes at most `most` bytes; it notes where they went."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.bytes = bytearray()
        self.offsets: list[int] = []
        self._most = most

    def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
        assert len(buffers) <= 1024
        data = b"".join(buffers)[: self._most]
        self.offsets.append(offset)
        self.bytes.extend(bytes(max(0, offset + len(data) - len(self.bytes))))
        self.bytes[offset : offset + len(data)] = data
        return len(data)


def info(number: int, size: int) -> ObjectInfo:
    return ObjectInfo(ObjectId("samples", f"key-{number}", "1"), size)


def expected(records: Sequence[Record]) -> bytes:
    """As `store.writing` writes them."""
    out = bytearray(START)
    for record in records:
        payload = bytes(record.data)
        identity = record.object.id.encoded
        length = header_bytes(len(identity), len(payload))
        digests = chunk_digest(payload), identity, block_digests(payload)
        header = RecordHeader(length, len(payload), record.number, record.object.size, *digests)
        assert len(out) == record.offset
        out += encode_record(header, NONCE, record.offset) + payload + padding(len(payload))
    return bytes(out)


def records_of(payloads: Sequence[Data]) -> list[Record]:
    records: list[Record] = []
    for number, data in enumerate(payloads):
        offset = records[-1].end if records else START
        records.append(Record(info(number, data.size), 0, data, offset))
    return records


def scattered(sizes: Sequence[int], seed: int) -> Scattered:
    rng = random.Random(seed)
    return Scattered([memoryview(rng.randbytes(size)) for size in sizes])


def write(records: Sequence[Record], files: Memory) -> bytes:
    with mock.patch.object(record_writing, "PIECE_BYTES", PIECE):
        writer = SegmentWriter(files, 0, NONCE)
        for record in records:
            writer.write(record)
        writer.flush()
    return bytes(files.bytes)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=4), st.sampled_from([1 << 30, 1000]))
def test_records_are_those_that_the_server_writes(parts: list[list[int]], most: int) -> None:
    records = records_of([scattered(sizes, seed) for seed, sizes in enumerate(parts)])
    assert write(records, Memory(most)) == expected(records)


def test_where_the_payload_lies_makes_no_difference() -> None:
    payload = random.Random(1).randbytes(7 * BLOCK_BYTES + 5)
    whole = records_of([pa.py_buffer(payload)])
    cuts = [0, 3, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES - 1, len(payload)]
    parts = Scattered([memoryview(payload)[a:b] for a, b in itertools.pairwise(cuts)])
    assert write(records_of([parts]), Memory()) == write(whole, Memory()) == expected(whole)


def test_the_header_of_a_large_record_comes_last() -> None:
    """Whoever is killed in between leaves nothing that looks whole."""
    files = Memory()
    write(records_of([pa.py_buffer(bytes(3 * PIECE))]), files)
    assert files.offsets[-1] == START
    assert min(files.offsets[:-1]) > START


def test_small_records_go_many_to_a_call() -> None:
    files = Memory()
    records = records_of([pa.py_buffer(bytes([i % 256]) * 100) for i in range(2000)])
    assert write(records, files) == expected(records)
    assert len(files.offsets) < 10


def test_each_piece_is_told_of_before_it_is_written() -> None:
    """With its place in the object, whatever the chunk's number; large records and small ones."""
    payload = random.Random(3).randbytes(3 * PIECE + 7)
    events: list[tuple[str, int, int]] = []

    class Noting(Memory):
        def pwritev(self, fd: int, buffers: Sequence[Bytes], offset: int) -> int:
            events.append(("written", offset, sum(map(len, buffers))))
            return super().pwritev(fd, buffers, offset)

    def told(offset: int, piece: memoryview) -> None:
        assert payload[offset - CHUNK_BYTES : offset - CHUNK_BYTES + len(piece)] == piece
        events.append(("told", offset - CHUNK_BYTES, len(piece)))

    for size in (len(payload), 100):
        events.clear()
        data = Scattered([memoryview(payload)[:5], memoryview(payload)[5:size]], told)
        record = Record(info(0, 2 * CHUNK_BYTES), 1, data, START)
        write([record], Noting())
        passed = [(at, length) for what, at, length in events if what == "told"]
        assert [at for at, _ in passed] == [
            sum(length for _, length in passed[:i]) for i in range(len(passed))
        ]
        assert sum(length for _, length in passed) == size
        payload_at = START + record.header_bytes
        for turn, (what, at, length) in enumerate(events):
            if what == "written":
                told_bytes = sum(n for w, _, n in events[:turn] if w == "told")
                assert min(at + length - payload_at, size) <= told_bytes


def test_the_flight_lane_tells_of_chunks_before_it_sends_them() -> None:
    parts = [memoryview(b"abc"), memoryview(b"de")]
    told: list[tuple[int, bytes]] = []
    data = Scattered(parts, lambda offset, piece: told.append((offset, bytes(piece))))
    [(batch, size)] = flight._batches([(0, 3, data)])
    assert (batch.num_rows, size) == (1, 5)
    assert told == [(3 * CHUNK_BYTES, b"abc"), (3 * CHUNK_BYTES + 3, b"de")]
