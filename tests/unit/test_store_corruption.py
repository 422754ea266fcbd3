"""What lies on the disk changes, one way or another: whatever the store serves then is right, or says that it isn't."""

from __future__ import annotations

import logging
import mmap
import os
import random
import shutil
import struct
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from torchcache_server.store import Store
from torchcache_server.store.chunk import StoredChunk, byte_view
from torchcache_server.store.index import Index
from torchcache_server.store.segments import Segment, new_header

from tests.proofs import proof
from tests.unit.store_parts import SMALL_SEGMENT, chunk, crash_image, payload, segment_files, small_store
from torchcache.model import BLOCK_BYTES, block_digests
from torchcache.records import Location, SegmentHeader, chunk_key

SEED = 3
SIZES = (0, 1, 63, 64, 65, 300, 4096, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 40_000)
CAPACITY = 20 * SMALL_SEGMENT


@dataclass(frozen=True)
class Placed:
    """A chunk and its record: [start, body) is the header, [body, end) payload and padding."""

    number: int
    payload: bytes
    segment: Segment
    start: int
    body: int
    end: int

    @property
    def location(self) -> Location:
        return Location(self.segment.number, self.start)


class Damaged:
    """An open store whose files are changed under its feet, and mended again."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.core = store._core
        self.segments = sorted(self.core.space.segments.values(), key=lambda s: s.number)
        self.files = {s.number: _mapped(s) for s in self.segments}
        self.sound = {s.number: bytes(self.files[s.number][: s.tail]) for s in self.segments}
        self.chunks = {s.number: s.chunks for s in self.segments}
        self.placed = {n: self._place(n, size) for n, size in _content()}
        self.by_segment = {
            s.number: sorted((p for p in self.placed.values() if p.segment is s), key=lambda p: p.start)
            for s in self.segments
        }
        self.verdicts: Counter[str] = Counter()

    def _place(self, number: int, size: int) -> Placed:
        where = self.core.index.get(chunk_key(chunk(number)))
        assert where is not None
        segment = self.core.space.segments[where.segment]
        record = segment.record(where.offset)
        assert record is not None
        body, end = where.offset + record.length, where.offset + record.record_bytes
        return Placed(number, payload(number, size), segment, where.offset, body, end)

    def touched(self, segment: int, start: int, end: int) -> list[Placed]:
        """The records that [start, end) of a segment overlaps."""
        placed = self.by_segment[segment]
        first = max(0, bisect(placed, start, key=lambda p: p.start) - 1)
        return [p for p in placed[first : first + 1 + end - start] if p.start < end and start < p.end]

    def change(self, segment: int, start: int, content: bytes) -> None:
        self.files[segment][start : start + len(content)] = content

    def mend(self, segment: int, start: int, end: int) -> None:
        self.files[segment][start:end] = self.sound[segment][start:end]

    def judge(self, placed: Placed, where: int = 0) -> str:
        """Looks a chunk up; fails if what is served is wrong and passes for good. `where`: a byte of the payload."""
        found = self.store.lookup(chunk(placed.number))
        verdict = judged(found, placed.number, placed.payload, where)
        if verdict == "missed":  # it was forgotten, and marked as dead
            self.mend(placed.segment.number, placed.start, placed.body)
            with self.core.index.writing() as writer:
                writer.put(chunk_key(chunk(placed.number)), placed.location)
            placed.segment.chunks = self.chunks[placed.segment.number]
        self.verdicts[verdict] += 1
        return verdict

    def forget_headers(self) -> None:
        """So that the next look-up reads the record's header."""
        self.core.known = {}

    def all_is_well(self) -> bool:
        self.forget_headers()
        return all(self.judge(p) == "served" for p in self.placed.values())


def judged(found: StoredChunk | None, number: int, right: bytes, where: int = 0) -> str:
    """What became of a chunk: missed, refused by its checksums, or served, and then it is right."""
    if found is None:
        return "missed"
    view = byte_view(found.payload)
    block = min(max(where, 0), max(len(view) - 1, 0)) // BLOCK_BYTES
    for first, last in ((block, block + 1), (0, block), (block + 1, -(-len(view) // BLOCK_BYTES))):
        piece = slice(first * BLOCK_BYTES, last * BLOCK_BYTES)
        if block_digests(view[piece]) == found.block_digests[8 * first : 8 * last]:
            assert view[piece] == right[piece], f"chunk {number}: blocks {first} to {last} are wrong and pass"
    if not found.is_intact():
        return "refused"
    assert view == right, f"chunk {number} is wrong and passes"
    assert found.object_size == number, f"chunk {number} has another object's size"
    return "served"


def told(verdicts: Counter[str]) -> dict[str, int]:
    """The verdicts as figures. What is wrong and passes fails the test at once: so that is none."""
    return {"served_right" if verdict == "served" else verdict: n for verdict, n in verdicts.items()} | {
        "wrong": 0
    }


def _content() -> Iterator[tuple[int, int]]:
    """Numbers and sizes of the chunks: each size four times."""
    return enumerate(size for _ in range(4) for size in SIZES)


def _mapped(segment: Segment) -> mmap.mmap:
    with open(segment.path, "r+b") as file:
        return mmap.mmap(file.fileno(), segment.tail)


def make(path: Path) -> Store:
    store = reopen(path)
    for n, size in _content():
        store.put("abc"[n % 3], chunk(n), n, payload(n, size))  # the object's size is its number
    return store


def reopen(path: Path) -> Store:
    return Store(path, capacity_bytes=CAPACITY, segment_bytes=SMALL_SEGMENT)


@contextmanager
def damaged() -> Iterator[Damaged]:
    with small_store() as folder:
        store = make(folder / "store")
        subject = Damaged(store)
        try:
            yield subject
            assert subject.all_is_well(), "the test itself broke something"
        finally:
            for file in subject.files.values():
                file.close()
            store.close()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Damage is told of, each time."""
    caplog.set_level(logging.CRITICAL, "torchcache_server")


# ---- under a running store, whose mappings see it ----


@pytest.mark.parametrize("flips", [20_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_flipped_bits(flips: int) -> None:
    """F5, F6, I1: half of them anywhere, half in headers; a record's header may be remembered or not."""
    rng = random.Random(SEED)
    with proof("corruption") as figures, damaged() as subject:
        subject.store.keep("c", True)  # what is kept isn't forgotten for being damaged
        places = list(subject.placed.values())
        room = sum(s.tail for s in subject.segments)
        header_ends = {s.number: s.header.length for s in subject.segments}
        in_segment_headers = 0
        for _ in range(flips):
            placed = rng.choice(places)
            if rng.random() < 0.5:
                segment, at = placed.segment.number, rng.randrange(placed.start, placed.body)
            else:
                segment, at = _anywhere(subject, rng.randrange(room))
            if rng.random() < 0.5:
                subject.forget_headers()
            byte = subject.files[segment][at]
            subject.files[segment][at] = byte ^ 1 << rng.randrange(8)
            in_segment_headers += at < header_ends[segment]
            for one in subject.touched(segment, at, at + 1):
                inside = one.body <= at < one.body + len(one.payload)
                verdict = subject.judge(one, at - one.body)
                assert not inside or verdict == "refused", (
                    f"seed {SEED}: byte {at} of {one} is not in a checksum"
                )
            subject.files[segment][at] = byte
        figures.update(
            flips=flips, seed=SEED, **told(subject.verdicts), in_segment_headers=in_segment_headers
        )
        assert subject.verdicts.total() + in_segment_headers == flips, "each is judged once"
        assert subject.verdicts["missed"] > flips // 8 and subject.verdicts["refused"] > flips // 4


def _anywhere(subject: Damaged, at: int) -> tuple[int, int]:
    for segment in subject.segments:
        if at < segment.tail:
            return segment.number, at
        at -= segment.tail
    raise ValueError("behind the last segment")


def test_runs_of_zeros() -> None:
    """F4, F8, I1: as a lost or a torn write leaves them."""
    rng = random.Random(SEED)
    with proof("corruption-zeros") as figures, damaged() as subject:
        for n in range(3000):
            segment = rng.choice(subject.segments)
            length = rng.choice((1, 8, 64, 512, 4096, 20_000))
            start = rng.randrange(segment.tail)
            if length >= 512:
                start -= start % 512
            end = min(start + length, segment.tail)
            if n % 2:
                subject.forget_headers()
            subject.change(segment.number, start, bytes(end - start))
            for one in subject.touched(segment.number, start, end):
                subject.judge(one, start - one.body)
                subject.change(
                    segment.number, start, bytes(end - start)
                )  # what was mended for the next look-up
            subject.mend(segment.number, start, end)
        figures.update(zero_runs=3000, seed=SEED, **told(subject.verdicts))
        assert subject.verdicts["missed"] > 100 and subject.verdicts["refused"] > 100


@pytest.mark.parametrize("what", ["record", "header", "payload"])
def test_records_in_each_others_place(what: str) -> None:
    """F9, I1: sound records, headers and payloads, but not where they belong."""
    with proof("corruption-swaps") as figures, damaged() as subject:
        swaps = 0
        for one in subject.placed.values():
            for other in subject.placed.values():
                if one.number < other.number and len(one.payload) == len(other.payload) > 0:
                    _swap(subject, one, other, what)
                    swaps += 1
        figures.update({f"swapped_{what}s": swaps, **told(subject.verdicts)})
        assert swaps >= 60 and subject.verdicts["served"] == 0


def _swap(subject: Damaged, one: Placed, other: Placed, what: str) -> None:
    def part(placed: Placed) -> tuple[int, int]:
        if what == "record":
            return placed.start, placed.end
        return (placed.start, placed.body) if what == "header" else (placed.body, placed.end)

    subject.forget_headers()
    for source, target in ((one, other), (other, one)):
        start, end = part(source)
        subject.change(
            target.segment.number, part(target)[0], subject.sound[source.segment.number][start:end]
        )
    for placed in (one, other):
        subject.judge(placed)
    for placed in (one, other):
        subject.mend(placed.segment.number, placed.start, placed.end)


def test_index_entries_that_point_elsewhere() -> None:
    """F6, I1: to another's record, between records, into a payload, behind the file, to no segment."""
    with proof("corruption-index") as figures, damaged() as subject:
        entries = 0
        for one in subject.placed.values():
            number = one.segment.number
            wrong = [other.location for other in subject.placed.values() if other is not one]
            wrong += [
                Location(number, at) for at in (0, 1, 64, one.start + 1, one.start + 64, one.body, one.end)
            ]
            wrong += [Location(number, at) for at in (SMALL_SEGMENT - 8, SMALL_SEGMENT, 1 << 40, 1 << 62)]
            wrong += [Location(1 << 40, one.start)]
            for location in wrong:
                if location != one.location:
                    entries += 1
                    _point(subject, one, location)
        figures.update(index_entries=entries)
        assert entries > 2000


def _point(subject: Damaged, one: Placed, location: Location) -> None:
    """Makes the index say that a chunk lies there, and looks it up: it is missed, and no other chunk suffers."""
    key, before = chunk_key(chunk(one.number)), subject.store.usage().chunks
    point_to(subject.core.index, key, location)
    assert subject.store.lookup(chunk(one.number)) is None
    assert subject.store.usage().segments == len(subject.segments)
    assert before - 1 <= subject.store.usage().chunks <= before
    if location.segment in subject.files:
        sound = subject.sound[location.segment]
        assert subject.files[location.segment][: len(sound)] == sound, (
            f"{location}: a sound record was changed"
        )
    with subject.core.index.writing() as writer:
        writer.put(key, one.location)
    for segment in subject.segments:
        segment.chunks = subject.chunks[segment.number]


def point_to(index: Index, key: bytes, location: Location) -> None:
    """Damage in the index: a chunk's entry names another place."""
    with index._env.begin(write=True) as txn:
        txn.put(key, struct.pack(">QQ", *location), db=index._tables.chunks)


def test_a_wrong_index_entry_costs_no_kept_segment() -> None:
    """F6, I2, I6: it would count as a chunk less in the segment it names, which then seems empty."""
    with small_store() as folder:
        store = reopen(folder / "store")
        store.keep("kept", True)
        for n in range(2):  # one a segment; the first is full
            store.put("kept", chunk(n), n, payload(n, 60_000))
        store.put("a", chunk(2), 2, payload(2, 100))
        where = store._core.index.get(chunk_key(chunk(0)))
        assert where is not None
        point_to(store._core.index, chunk_key(chunk(2)), Location(where.segment, where.offset + 64))
        assert store.lookup(chunk(2)) is None
        assert judged(store.lookup(chunk(0)), 0, payload(0, 60_000)) == "served"
        store.close()


# ---- through a restart ----


def _small(folder: Path) -> tuple[Path, bytes, int, int]:
    """A store with one small record; its file, what it holds, and where the payload starts and ends."""
    store = reopen(folder)
    store.put("a", chunk(1), 1, payload(1, 200))
    subject = store._core.space.segments[1]
    record = subject.record(subject.header.length)
    assert record is not None
    start = subject.header.length + record.length
    content = Path(subject.path).read_bytes()[: subject.tail]
    store.close()
    return Path(subject.path), content, start, start + 200


def _start_with(folder: Path, file: Path, content: bytes, *, clean: bool = False) -> str:
    """Opens a store whose only segment file has been changed; what becomes of chunk 1."""
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    if not clean:
        (folder / "clean").unlink(missing_ok=True)
    store = reopen(folder)
    verdict = judged(store.lookup(chunk(1)), 1, payload(1, 200))
    store.close()
    return verdict


def test_a_damaged_segment_header_costs_nothing_that_is_kept() -> None:
    """F6, I2: every byte of it in turn; what it says is in the file's name too."""
    with proof("corruption-headers") as figures, small_store() as folder:
        file, content, _, _ = _small(folder / "store")
        store = reopen(folder / "store")
        store.keep("a", True)
        length = store._core.space.segments[1].header.length
        store.close()
        for at in range(length):
            damaged = bytearray(content)
            damaged[at] ^= 1 << at % 8
            assert _start_with(folder / "store", file, bytes(damaged), clean=at % 2 > 0) == "served"
        figures.update(damaged_headers=length)


def test_every_truncation_of_a_record() -> None:
    """F7, I1: a restart finds it only if its payload's last byte is there."""
    with proof("corruption-truncations") as figures, small_store() as folder:
        file, content, _, end = _small(folder / "store")
        for length in range(len(content) + 1):
            verdict = _start_with(folder / "store", file, content[:length])
            assert verdict == ("served" if length >= end else "missed"), f"cut to {length} bytes"
        figures.update(truncations=len(content) + 1)


def test_every_truncation_under_a_running_store() -> None:
    """F7, I1: what is gone is a miss, or refused, and no SIGBUS."""
    with proof("corruption-truncations-live") as figures, small_store() as folder:
        file, content, _, end = _small(folder / "store")
        for length in range(len(content) + 1):
            file.write_bytes(content.ljust(SMALL_SEGMENT, b"\0"))
            (folder / "store/clean").unlink()
            store = reopen(folder / "store")
            os.truncate(file, length)
            verdict = judged(store.lookup(chunk(1)), 1, payload(1, 200))
            assert verdict != "served" or length >= end, f"cut to {length} bytes"
            os.truncate(file, SMALL_SEGMENT)
            store.close()
        figures.update(truncations_under_a_running_store=len(content) + 1)


def test_who_reads_a_payload_that_was_cut_off_finds_nothing() -> None:
    """F7: also where the header is remembered; it isn't ended by SIGBUS."""
    with small_store() as folder:
        store = reopen(folder / "store")
        store.put("a", chunk(1), 1, payload(1, 40_000))
        assert store.verify(chunk(1))
        os.truncate(store._core.space.segments[1].path, 8192)
        assert store.read(chunk(1)) is None
        assert not store.verify(chunk(1))
        store.close()


Change = Callable[[random.Random, dict[Path, bytearray]], None]


def _flip_some(rng: random.Random, files: dict[Path, bytearray]) -> None:
    for _ in range(rng.choice((1, 1, 10, 100))):
        data = rng.choice(list(files.values()))
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _flip_headers(rng: random.Random, files: dict[Path, bytearray]) -> None:
    """The segments' own headers, and the first records'."""
    data = rng.choice(list(files.values()))
    data[rng.randrange(256)] ^= 1 << rng.randrange(8)


def _zero_some(rng: random.Random, files: dict[Path, bytearray]) -> None:
    data = rng.choice(list(files.values()))
    start = rng.randrange(0, len(data), 512)
    end = min(start + rng.choice((512, 4096, 40_000)), len(data))
    data[start:end] = bytes(end - start)


def _cut(rng: random.Random, files: dict[Path, bytearray]) -> None:
    data = rng.choice(list(files.values()))
    del data[rng.randrange(len(data)) :]


def _exchange_files(rng: random.Random, files: dict[Path, bytearray]) -> None:
    one, other = rng.sample(sorted(files), 2)
    files[one], files[other] = files[other], files[one]


def _new_generation(rng: random.Random, files: dict[Path, bytearray]) -> None:
    """A recycled file that got its new header, and nothing else that is new."""
    data = rng.choice(list(files.values()))
    old = SegmentHeader.decode(memoryview(data))
    assert old is not None
    fresh = new_header(old.namespace, old.number, old.file_bytes).encode()
    data[: len(fresh)] = fresh


@pytest.mark.parametrize(
    "change", [_flip_some, _flip_headers, _zero_some, _cut, _exchange_files, _new_generation]
)
def test_what_a_restart_finds(change: Change) -> None:
    """F3, F4, F5, F6, F7, F8, F9, I1: after an orderly stop, when the index is believed, and after a kill."""
    rng = random.Random(SEED)
    verdicts: Counter[str] = Counter()
    with proof("corruption-restarts") as figures, small_store() as folder:
        make(folder / "store").close()
        for turn in range(40):
            image = crash_image(folder / "store", folder / "image")
            if turn % 2:
                (image / "clean").unlink()
            files = {path: bytearray(path.read_bytes()) for path in segment_files(image)}
            change(rng, files)
            for path, data in files.items():
                path.write_bytes(data)
            verdicts.update(_read_all(image))
            shutil.rmtree(image)
        figures.update({f"restarts_after{change.__name__}": 40, "seed": SEED, **told(verdicts)})
    assert verdicts["served"] >= 40 and verdicts["missed"] + verdicts["refused"] >= 10


def _read_all(path: Path) -> Iterator[str]:
    """Opens a damaged store: what is served is right, and once the damaged is stored anew all is served."""
    store = reopen(path)
    for n, size in _content():
        found = store.lookup(chunk(n))
        verdict = judged(found, n, payload(n, size))
        if verdict == "refused":
            store.quarantine(chunk(n))
        yield verdict
        store.put("abc"[n % 3], chunk(n), n, payload(n, size))
    for n, size in _content():
        assert judged(store.lookup(chunk(n)), n, payload(n, size)) == "served"
    usage = store.usage()
    assert usage.used_bytes == sum(n.bytes for n in store.namespaces())
    assert usage.chunks == len(list(_content()))
    store.close()
