"""A start that has to find everything again: many segments at once, an index that is only partly right, a bad disk."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
from torchcache_server.store import DiskCalls, Store, opening

from tests.unit.store_parts import (
    CAPACITY,
    MIB,
    chunk,
    crash_image,
    fill,
    find_payload,
    flip_bit,
    held,
    overwrite,
    payload,
    segment_files,
)
from torchcache.errors import ConfigurationError
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, ChunkId, ObjectId
from torchcache.records import ALIGN_BYTES

PAGE = 4096
SIZE = 40_000


def open_store(path: Path, disk: DiskCalls | None = None) -> Store:
    return Store(path, capacity_bytes=CAPACITY, disk=disk or DiskCalls())


def resident(store: Store, numbers: range, size: int = SIZE) -> list[int]:
    return [n for n in numbers if held(store, n, size)]


class BadSectors(DiskCalls):
    """The real disk, but some pages of one file can't be read, nor written: reads end before them, or say EIO."""

    def __init__(self, path: Path, *pages: int) -> None:
        self._file = path.stat().st_ino
        self._pages = sorted(pages)
        self.reads = self.read_bytes = 0

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == self._file:
            self.reads += 1
            bad = next((p * PAGE for p in self._pages if (p + 1) * PAGE > offset), None)
            if bad is not None and bad <= offset:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if bad is not None:
                size = min(size, bad - offset)
            self.read_bytes += size
        return super().pread(fd, size, offset)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Ten chunks of `SIZE` in one segment of a kept namespace, one in another; killed."""
    store = open_store(tmp_path / "live")
    store.keep("n", True)
    fill(store, "n", range(10), SIZE)
    fill(store, "other", range(50, 51), SIZE)
    copy = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    (file, _) = segment_files(copy)
    size = file.stat().st_size
    end = find_payload(file, payload(9, SIZE)) + SIZE
    os.truncate(file, end)  # copying made bytes of the hole behind it
    os.truncate(file, size)
    return copy


@pytest.fixture
def segment(image: Path) -> Path:
    return segment_files(image)[0]


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 32 * 1024, CHUNK_BYTES])
@pytest.mark.parametrize("key_bytes", [1, 700, 4000, 16_000])
def test_records_of_any_shape_are_found_again(tmp_path: Path, size: int, key_bytes: int) -> None:
    """F1: headers longer than what is read of one at first, payloads that are a gap in what is read."""
    store = open_store(tmp_path / "live")
    chunks = [ChunkId(ObjectId("s3", f"{n}" * key_bytes, "v"), n) for n in range(4)]
    store.put_many("n", [(c, size, payload(n, size)) for n, c in enumerate(chunks)])
    image = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    store = open_store(image)
    assert [bytes(found.payload) for c in chunks if (found := store.lookup(c))] == [
        payload(n, size) for n in range(4)
    ]
    store.close()


@pytest.mark.parametrize("size", [100, 3000, SIZE])
def test_what_a_file_held_as_another_segment_is_passed_over_in_one_go(tmp_path: Path, size: int) -> None:
    """F9, F1: behind the tail lie records of the segment that the file was before, each with a magic of its own."""
    donor = open_store(tmp_path / "donor")
    fill(donor, "n", range(100, 100 + 5 * MIB // (size + 200)), size)
    donor.close()
    store = open_store(tmp_path / "live")
    fill(store, "n", range(3), size)
    image = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    (old,), (file,) = segment_files(tmp_path / "donor"), segment_files(image)
    end = find_payload(file, payload(2, size)) + size
    overwrite(file, end, old.read_bytes()[end:])
    disk = BadSectors(file)
    store = open_store(image, disk)
    assert store.usage().chunks == 3
    assert resident(store, range(200), size) == [0, 1, 2]
    assert disk.read_bytes < 2 * file.stat().st_size
    store.close()


# ---- many segments ----


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Twelve namespaces with a segment each; six chunks of the first were damaged, and stored again in the last."""
    store = Store(tmp_path / "live", capacity_bytes=16 * CAPACITY)
    for n in range(12):
        fill(store, f"n{n}", range(10 * n, 10 * n + 10), SIZE)
    first = segment_files(tmp_path / "live")[0]
    content = first.read_bytes()
    for n in range(6):
        store.quarantine(chunk(n))
    fill(store, "n11", range(6), SIZE)
    copy = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    # As if none of the six could be marked as dead.
    overwrite(segment_files(copy)[0], 0, content)
    return copy


@pytest.mark.parametrize("batch_bytes", [1, 2000, 1 << 20])
@pytest.mark.parametrize("few", [2, 100], ids=["threads", "one by one"])
def test_many_segments_are_found_again(
    many: Path, monkeypatch: pytest.MonkeyPatch, few: int, batch_bytes: int
) -> None:
    """F1: however many go into the index at a time, of two records of a chunk the later counts."""
    monkeypatch.setattr(opening, "_BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(opening, "_FEW_SEGMENTS", few)
    damaged = segment_files(many)[0]
    for n in range(6):
        flip_bit(damaged, find_payload(damaged, payload(n, SIZE)))
    store = open_store(many)
    assert resident(store, range(120)) == list(range(120))
    assert store.usage().chunks == 120
    assert {u.name: u.chunks for u in store.namespaces()} == {
        "n0": 4,
        **{f"n{n}": 10 for n in range(1, 11)},
        "n11": 16,
    }
    store.close()
    store = open_store(many)
    assert store.usage().chunks == 120
    store.close()


def test_an_index_that_misses_one_segment_gets_it_back(many: Path, tmp_path: Path) -> None:
    """After a clean stop a segment lost its end: what the others hold stays, and what is later in them wins."""
    open_store(many).close()
    first = segment_files(many)[0]
    for n in range(6):
        flip_bit(first, find_payload(first, payload(n, SIZE)))
    with first.open("r+b") as file:
        file.truncate(find_payload(first, payload(9, SIZE)) + SIZE)
    store = open_store(many)
    assert resident(store, range(120)) == list(range(120))
    assert store.usage().chunks == 120
    store.close()


def test_an_older_place_in_the_index_yields_to_a_later_record(many: Path) -> None:
    """After a clean stop the last segment lost its end: its chunks are counted once, there."""
    open_store(many).close()
    first, last = segment_files(many)[0], segment_files(many)[-1]
    with last.open("r+b") as file:
        file.truncate(find_payload(last, payload(5, SIZE)) + SIZE)
    for n in range(4):
        flip_bit(first, find_payload(first, payload(n, SIZE)))
    store = open_store(many)
    assert resident(store, range(120)) == list(range(120))
    assert store.usage().chunks == 120
    store.close()


def test_a_long_recovery_says_how_far_it_is(
    many: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "_FEW_SEGMENTS", 2)
    monkeypatch.setattr(opening, "_TELL_EVERY_S", 0)
    with caplog.at_level(logging.INFO):
        open_store(many).close()
    assert "recovering: 7 of 12 segments" in caplog.text


# ---- what can't be read ----


@pytest.mark.parametrize("victim", [0, 1], ids=["first", "last"])
def test_a_segment_whose_header_cant_be_read_is_left_out_and_left_there(image: Path, victim: int) -> None:
    """F12, I6: the rest serves. Once the disk reads it again, nothing was lost, though others were stored meanwhile."""
    chunks: list[list[int]] = [list(range(10)), [50]]
    store = open_store(image, BadSectors(segment_files(image)[victim], 0))
    assert resident(store, range(51)) == chunks[1 - victim]
    again = chunks[victim][:3]
    fill(store, "n", range(again[0], again[-1] + 1), SIZE)
    fill(store, "new", range(60, 61), SIZE)
    assert resident(store, range(61)) == sorted([*chunks[1 - victim], *again, 60])
    store.close()
    store = open_store(image)
    assert resident(store, range(61)) == [*range(10), 50, 60]
    assert store.usage().chunks == 12
    store.close()


@pytest.mark.parametrize("part", ["header", "first block", "last block"])
def test_only_what_cant_be_read_is_left_out(
    image: Path, segment: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """F12, I6: the records around it are found, nothing is cut or overwritten."""
    at = find_payload(segment, payload(4, SIZE))
    place = {"header": at - ALIGN_BYTES, "first block": at + PAGE, "last block": at + SIZE - PAGE}[part]
    before = segment.read_bytes()
    store = open_store(image, BadSectors(segment, place // PAGE))
    found = [n for n in range(10) if store.contains(chunk(n))]
    assert set(range(10)) - set(found) <= {3, 4}, "a page may hold one's end and the next one's header"
    assert (4 in found) == (part == "first block")
    assert ("can't be read" in caplog.text) == (part != "first block"), "payloads aren't read at a start"
    fill(store, "n", range(20, 22), SIZE)
    assert store.usage().segments == (2 if part == "first block" else 3)
    store.close()
    if part != "first block":
        assert segment.read_bytes() == before
    store = open_store(image)
    assert resident(store, range(22)) == [*range(10), 20, 21], "a disk that reads again is read again"
    store.close()


def test_what_couldnt_be_read_isnt_overwritten_later(image: Path, segment: Path) -> None:
    """F12, I6: the segment's last record is behind the last that was found."""
    at = find_payload(segment, payload(9, SIZE))
    open_store(image, BadSectors(segment, (at + SIZE - 1) // PAGE)).close()
    store = open_store(image)
    fill(store, "n", range(20, 22), SIZE)
    again = crash_image(image, image.parent / "again")
    store.close()
    store = open_store(again)
    assert resident(store, range(51)) == [*range(10), 20, 21, 50]
    store.close()


def test_a_segment_full_of_bad_sectors_is_given_up_after_some(image: Path, segment: Path) -> None:
    """F12: each of them may take a disk seconds."""
    disk = BadSectors(segment, *range(1, segment.stat().st_size // PAGE))
    store = open_store(image, disk)
    assert resident(store, range(50, 51)) == [50]
    assert disk.reads < 30
    store.close()


@pytest.mark.parametrize("call", ["open", "next_data", "truncate"])
def test_any_call_on_one_segment_may_say_that_it_cant_be_read(image: Path, segment: Path, call: str) -> None:
    """F12."""
    inode = segment.stat().st_ino

    class Bad(DiskCalls):
        def open(self, path: str) -> int:
            if call == "open" and path == str(segment):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().open(path)

        def next_data(self, fd: int, offset: int) -> int | None:
            if call == "next_data" and os.fstat(fd).st_ino == inode:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().next_data(fd, offset)

        def truncate(self, fd: int, size: int) -> None:
            if call == "truncate" and os.fstat(fd).st_ino == inode:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().truncate(fd, size)

    store = open_store(image, Bad())
    assert resident(store, range(51)) == ([*range(10), 50] if call == "truncate" else [50])
    assert store.usage().used_bytes == sum(n.bytes for n in store.namespaces())
    store.close()
    store = open_store(image)
    assert resident(store, range(51)) == [*range(10), 50]
    store.close()


@pytest.mark.parametrize("behind", [-1, 0], ids=["its header", "its records"])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM])
def test_a_process_at_its_limits_doesnt_open_half_a_store(
    image: Path, segment: Path, code: int, behind: int
) -> None:
    """F14: what is short here isn't the disk; the store is whole once there are descriptors again."""
    inode = segment.stat().st_ino

    class Short(DiskCalls):
        def pread(self, fd: int, size: int, offset: int) -> bytes:
            if offset > behind and os.fstat(fd).st_ino == inode:
                raise OSError(code, os.strerror(code))
            return super().pread(fd, size, offset)

    with pytest.raises(ConfigurationError, match="can't be opened"):
        open_store(image, Short())
    store = open_store(image)
    assert resident(store, range(51)) == [*range(10), 50]
    store.close()
