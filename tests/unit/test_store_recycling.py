"""Files that become new segments: never under a reader, never with a word of their old content believed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torchcache_server.store import DiskCalls, Store

from tests.unit.store_parts import (
    CAPACITY,
    MIB,
    FailingDisk,
    chunk,
    crash_image,
    fill,
    held,
    payload,
    segment_files,
)

ENOUGH = 7  # records of a MiB fill a segment of 8 MiB


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "s", capacity_bytes=CAPACITY)


def spare_files(store_path: Path) -> list[Path]:
    return sorted((store_path / "spares").iterdir())


def on_disk(store_path: Path) -> int:
    """What segments and spares take, asked of the file system."""
    return sum(512 * f.stat().st_blocks for f in [*segment_files(store_path), *spare_files(store_path)])


def assert_books(store: Store, path: Path) -> None:
    usage = store.usage()
    assert on_disk(path) == usage.used_bytes + usage.spare_bytes <= CAPACITY


def test_a_dropped_segment_becomes_the_next_one(store: Store, tmp_path: Path) -> None:
    fill(store, "a", range(ENOUGH), MIB)
    inode = segment_files(tmp_path / "s")[0].stat().st_ino
    store.drop("a")
    assert [f.stat().st_ino for f in spare_files(tmp_path / "s")] == [inode]
    assert store.usage().used_bytes == 0 < store.usage().spare_bytes
    fill(store, "b", range(100, 103), MIB)
    assert [f.stat().st_ino for f in segment_files(tmp_path / "s")] == [inode]
    assert store.usage().recycled_segments == 1
    assert all(held(store, n, MIB) for n in range(100, 103))
    assert not any(store.contains(chunk(n)) for n in range(ENOUGH))
    assert_books(store, tmp_path / "s")
    store.close()


def test_not_while_somebody_looks(store: Store, tmp_path: Path) -> None:
    """I1: a view stays what it is, whatever comes after."""
    fill(store, "a", range(ENOUGH), MIB)
    view = store.lookup(chunk(3))
    assert view is not None
    store.drop("a")
    fill(store, "b", range(100, 107), MIB)
    assert store.usage().recycled_segments == 0
    assert bytes(view.payload) == payload(3, MIB)
    del view
    fill(store, "b", range(107, 110), MIB)
    assert store.usage().recycled_segments == 1
    assert all(held(store, n, MIB) for n in range(100, 110))
    assert_books(store, tmp_path / "s")
    store.close()


READER = """
import fcntl, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(fd, fcntl.LOCK_SH)
mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
before = mapped[:]
print("mapped", flush=True)
sys.stdin.readline()
print(mapped[:] == before, flush=True)
"""


def test_not_while_another_process_holds_it(store: Store, tmp_path: Path) -> None:
    """I1: the lock of a reader that maps a segment by itself; once it is killed, its lock is gone."""
    fill(store, "a", range(ENOUGH), MIB)
    file = segment_files(tmp_path / "s")[0]
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None and reader.stdin is not None
        assert reader.stdout.readline() == "mapped\n"
        store.drop("a")
        fill(store, "b", range(100, 103), MIB)
        assert store.usage().recycled_segments == 0
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "True\n"
        reader.kill()
    fill(store, "b", range(103, 112), MIB)
    assert store.usage().recycled_segments == 1
    assert all(held(store, n, MIB) for n in range(100, 112))
    store.close()


def test_a_reader_may_lock_the_new_segment(store: Store, tmp_path: Path) -> None:
    fill(store, "a", range(ENOUGH), MIB)
    store.drop("a")
    fill(store, "b", range(100, 103), MIB)
    assert store.usage().recycled_segments
    fd = os.open(segment_files(tmp_path / "s")[0], os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(fd)
    store.close()


def test_not_while_somebody_writes(tmp_path: Path) -> None:
    """A write under way ends in the old file, which nobody uses again."""
    acts = []

    class Dropping(DiskCalls):
        def pwritev(self, fd: int, buffers: object, offset: int) -> int:
            while acts:
                acts.pop()()
            return super().pwritev(fd, buffers, offset)  # type: ignore[arg-type]

    store = Store(tmp_path / "s", capacity_bytes=CAPACITY, disk=Dropping())
    fill(store, "a", range(6), MIB)
    acts.append(lambda: store.drop("a"))
    fill(store, "a", range(6, 7), MIB)
    assert spare_files(tmp_path / "s") == []
    fill(store, "b", range(100, 103), MIB)
    assert store.usage().recycled_segments == 0
    assert all(held(store, n, MIB) for n in range(100, 103))
    store.close()


def test_nothing_of_the_old_segment_comes_back(store: Store, tmp_path: Path) -> None:
    """F9: behind the new records lie sound looking old ones, of another nonce; a rebuilt index knows them not."""
    fill(store, "a", range(ENOUGH), MIB)
    store.drop("a")
    fill(store, "b", range(100, 102), MIB)
    assert store.usage().recycled_segments == 1
    found = Store(crash_image(tmp_path / "s", tmp_path / "image"), capacity_bytes=CAPACITY)
    assert all(held(found, n, MIB) for n in range(100, 102))
    assert found.usage().chunks == 2
    assert not any(found.contains(chunk(n)) for n in range(ENOUGH))
    assert_books(found, tmp_path / "image")
    found.close()
    store.close()


def test_spares_go_before_anybody_else(store: Store, tmp_path: Path) -> None:
    fill(store, "a", range(28), MIB)
    fill(store, "b", range(100, 128), MIB)
    view = store.lookup(chunk(0))  # so that none of these can be used again
    store.drop("a")
    fill(store, "c", range(200, 228), MIB)
    assert all(store.contains(chunk(n)) for n in range(100, 128))
    assert store.usage().evicted_chunks == 0
    assert_books(store, tmp_path / "s")
    del view
    store.close()


def test_an_eviction_feeds_the_next_segment(store: Store, tmp_path: Path) -> None:
    """A full store writes into the pages of what it evicts."""
    fill(store, "a", range(56), MIB)
    for n in range(100, 128):
        fill(store, "b", range(n, n + 1), MIB)
        assert_books(store, tmp_path / "s")
    assert store.usage().recycled_segments >= 3
    assert all(held(store, n, MIB) for n in range(100, 128))
    store.close()


def test_a_small_remainder_is_no_spare(store: Store, tmp_path: Path) -> None:
    fill(store, "a", range(2), MIB)
    store.drop("a")
    assert spare_files(tmp_path / "s") == []
    store.close()


def test_unused_room_of_a_recycled_segment_is_given_back(store: Store, tmp_path: Path) -> None:
    fill(store, "a", range(ENOUGH), MIB)
    store.drop("a")
    fill(store, "b", range(100, 101), 3 * MIB)
    assert store.usage().used_bytes >= ENOUGH * MIB
    fill(store, "b", range(101, 104), 4 * MIB - 100)  # does not fit behind it: the first is sealed
    assert_books(store, tmp_path / "s")
    assert store.usage().used_bytes < 16 * MIB
    store.close()


@pytest.mark.parametrize("call", ["rename", "open", "lock_alone", "size", "unlock", "deallocate"])
def test_a_disk_that_will_not_recycle_makes_new_files(tmp_path: Path, call: str) -> None:
    disk = FailingDisk()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY, disk=disk)
    fill(store, "a", range(ENOUGH), MIB)
    store.drop("a") if call != "rename" else None
    disk.fail(call, 28)  # ENOSPC: no fault of the disk's
    if call == "rename":
        store.drop("a")
    fill(store, "b", range(100, 103), MIB) if call != "unlock" else None
    disk.mend()
    fill(store, "b", range(103, 110), MIB)
    assert all(held(store, n, MIB) for n in range(103, 110))
    usage = store.usage()
    assert usage.used_bytes == sum(n.bytes for n in store.namespaces())
    store.close()


def test_spares_do_not_outlive_a_restart(store: Store, tmp_path: Path) -> None:
    """I5."""
    fill(store, "a", range(ENOUGH), MIB)
    store.drop("a")
    assert spare_files(tmp_path / "s")
    store.close()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY)
    assert spare_files(tmp_path / "s") == []
    assert store.usage().chunks == store.usage().spare_bytes == 0
    store.close()
