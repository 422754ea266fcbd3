"""Each call to the disk fails in turn: an error of ours that says so, and nothing that was good is lost."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest
from torchcache_server.store import DiskCalls, Store, index, room
from torchcache_server.store.core import MAX_RESTING
from torchcache_server.store.index import Index

from tests.unit.store_parts import (
    CAPACITY,
    MIB,
    SEAM,
    FailingDisk,
    FullDisk,
    ShortWrites,
    chunk,
    crash_image,
    descriptors,
    fill,
    find_payload,
    held,
    payload,
    segment_files,
)
from torchcache.errors import ConfigurationError, OutOfSpace, TorchCacheError
from torchcache.records import chunk_key

CODES = [errno.EIO, errno.ENOSPC]  # what the store tells apart: full, and all else


def open_store(path: Path, disk: DiskCalls, capacity: int = CAPACITY) -> Store:
    return Store(path, capacity_bytes=capacity, disk=disk)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("call", SEAM)
def test_every_call_may_fail_while_running(tmp_path: Path, call: str, code: int) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path / "s", disk, 24 * MIB)
    fill(store, "a", range(8), MIB)
    store.keep("a", True)
    fill(store, "b", range(20, 26), MIB)
    disk.fail(call, code)
    for step in (
        lambda: fill(store, "c", range(30, 42), MIB),  # makes segments, evicts b
        lambda: fill(store, "a", range(100, 106), MIB),
        lambda: store.sync("a"),
        lambda: store.pin("a", True),
        lambda: store.put_record(b"k", b"v"),
        lambda: store.get_record(b"k"),
        lambda: store.delete_record(b"k"),
        lambda: store.quarantine(chunk(25)),
        lambda: store.drop("c"),
    ):
        try:
            step()
        except TorchCacheError as error:
            assert error.message
    if call != "populate":
        assert all(held(store, n, MIB) for n in range(8)), "what is kept is untouched"
    disk.mend()
    assert all(held(store, n, MIB) for n in range(8)), "what is kept is untouched"
    if store.health().out_of_service:
        store.close()
        store = open_store(tmp_path / "s", disk, 24 * MIB)
    fill(store, "d", range(200, 203), MIB)
    assert all(held(store, n, MIB) for n in range(200, 203)), "it works again once the disk does"
    assert store.usage().used_bytes == sum(n.bytes for n in store.namespaces())
    store.close()
    store = open_store(tmp_path / "s", disk, 24 * MIB)
    assert all(held(store, n, MIB) for n in range(8))
    store.close()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("call", SEAM)
def test_every_call_may_fail_while_opening(tmp_path: Path, call: str, code: int) -> None:
    store = open_store(tmp_path / "live", DiskCalls())
    fill(store, "a", range(20))
    store.keep("a", True)
    store.put_record(b"k", b"v")
    image = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    disk = FailingDisk()
    disk.fail(call, code)
    try:
        open_store(image, disk).close()
    except ConfigurationError as error:
        assert str(image) in str(error)
    disk.mend()
    store = open_store(image, disk)
    assert all(held(store, n) for n in range(20))
    assert store.get_record(b"k") == b"v"
    assert [(n.name, n.kept) for n in store.namespaces()] == [("a", True)]
    store.close()


def test_short_writes_are_continued(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", ShortWrites())
    fill(store, "a", range(3), 50_000)
    store.put_record(b"k", b"v" * 5000)
    image = crash_image(tmp_path / "s", tmp_path / "image")
    store.close()
    store = open_store(image, DiskCalls())
    assert all(held(store, n, 50_000) for n in range(3))
    assert store.get_record(b"k") == b"v" * 5000
    store.close()


def test_a_disk_that_takes_nothing_is_not_asked_for_ever(tmp_path: Path) -> None:
    """I4."""

    class Deaf(DiskCalls):
        deaf = False

        def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
            return 0 if self.deaf else super().pwritev(fd, buffers, offset)

    disk = Deaf()
    store = open_store(tmp_path, disk)
    disk.deaf = True
    with pytest.raises(OutOfSpace, match="took nothing"):
        fill(store, "a", range(1))
    disk.deaf = False
    store.close()


# ---- a full disk ----


def test_a_full_disk_evicts_others_and_goes_on(tmp_path: Path) -> None:
    """F10: the disk is smaller than the capacity said."""
    store = open_store(tmp_path, FullDisk(30 * MIB), capacity=256 * MIB)
    fill(store, "a", range(10), MIB)
    for n in range(100, 125):
        fill(store, "b", range(n, n + 1), MIB)
    assert all(held(store, n, MIB) for n in range(100, 125))
    assert not any(store.contains(chunk(n)) for n in range(10))
    assert store.usage().evicted_chunks == 10
    store.close()


def test_a_full_disk_with_nothing_to_evict_says_so(tmp_path: Path) -> None:
    """F10, F11: nothing is half stored, and what was there is there."""
    store = open_store(tmp_path, FullDisk(12 * MIB), capacity=256 * MIB)
    store.keep("a", True)
    fill(store, "a", range(10), MIB)
    before = store.usage()
    with pytest.raises(OutOfSpace, match="takes no more"):
        fill(store, "b", range(100, 103), MIB)
    after = store.usage()
    assert after.chunks == 10
    assert after.used_bytes - before.used_bytes <= 4096, "the room it took is given back"
    assert not any(store.contains(chunk(n)) for n in range(100, 103))
    fill(store, "b", range(100, 101), MIB)
    assert held(store, 100, MIB)
    store.close()


# ---- sync ----


def test_sync_orders_files_before_names(tmp_path: Path) -> None:
    """I2: bytes, then the file, then its folder and the folder's name; once, and nothing twice."""
    order: list[str] = []

    class Recorder(FailingDisk):
        def _called(self, call: str, *arguments: object) -> None:
            if call in ("pwritev", "fsync", "fsync_dir"):
                order.append(call)

    store = open_store(tmp_path, Recorder())
    fill(store, "a", range(3))
    order.clear()
    store.sync("a")
    assert order == ["fsync", "fsync_dir", "fsync_dir"]
    store.sync("a")
    store.sync("unknown")
    assert order == ["fsync", "fsync_dir", "fsync_dir"]
    fill(store, "a", range(3, 4))
    store.sync("a")
    assert order[3:] == ["pwritev", "fsync"]
    store.close()


def test_sync_covers_every_segment(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    fill(store, "a", range(20), MIB)
    disk.calls.clear()
    store.sync("a")
    assert disk.calls["fsync"] == store.usage().segments >= 3
    store.close()


def test_full_segments_of_what_is_kept_are_synced_on_the_way(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    store.keep("a", True)
    disk.calls.clear()
    fill(store, "a", range(20), MIB)
    assert disk.calls["fsync"] == store.usage().segments - 1
    store.sync("a")
    assert disk.calls["fsync"] == store.usage().segments
    store.close()


@pytest.mark.parametrize("kept", [False, True])
def test_a_failed_fsync_is_never_tried_again(tmp_path: Path, kept: bool) -> None:
    """F13: the namespace can't become durable any more, until it is dropped and written anew."""
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    if kept:
        store.keep("a", True)
    disk.fail("fsync", errno.EIO, times=1, path_has=".segment")
    fill(store, "a", range(20), MIB)
    for _ in range(2):
        with pytest.raises(TorchCacheError, match=r"can't make 'a' durable.*Input/output error"):
            store.sync("a")
    fsyncs = disk.calls["fsync"]
    with pytest.raises(TorchCacheError):
        store.sync("a")
    assert disk.calls["fsync"] == fsyncs
    fill(store, "b", range(100, 103))
    store.sync("b")
    store.drop("a")
    fill(store, "a", range(20), MIB)
    store.sync("a")
    assert held(store, 5, MIB)
    store.close()


def test_a_failed_fsync_for_lack_of_room_says_so(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    fill(store, "a", range(3))
    disk.fail("fsync", errno.ENOSPC)
    with pytest.raises(OutOfSpace, match="No space left"):
        store.sync("a")
    store.close()


def test_a_failed_fsync_of_the_folder_is_no_durability(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    fill(store, "a", range(3))
    disk.fail("fsync_dir", errno.EIO, times=1)
    with pytest.raises(TorchCacheError, match="durable"):
        store.sync("a")
    store.close()


def test_what_is_durable_stays_where_it_is_if_it_cannot_be_so_elsewhere(tmp_path: Path) -> None:
    """I2: a segment that is mostly dead is emptied, but where its rest went can't be synced."""
    disk = FailingDisk()
    store = open_store(tmp_path / "live", disk)
    fill(store, "a", range(7), MIB)
    store.sync("a")
    for number in range(6):
        store.quarantine(chunk(number))
    disk.fail("fsync", errno.EIO)
    store.tidy()
    assert store.usage().compacted_bytes
    disk.mend()
    store.tidy()
    assert held(store, 6, MIB)
    image = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    [_, *moved_to] = segment_files(image)
    for path in moved_to:
        path.unlink()
    store = open_store(image, DiskCalls())
    assert held(store, 6, MIB)
    store.close()


def test_a_flag_that_cannot_be_noted_does_not_hold(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    disk.fail("fsync", errno.EIO)
    with pytest.raises(TorchCacheError, match="what is to become of"):
        store.keep("a", True)
    assert store.namespaces() == []
    disk.mend()
    store.keep("a", True)
    assert [n.kept for n in store.namespaces()] == [True]
    store.close()


def test_after_a_restart_everything_kept_is_synced_again(tmp_path: Path) -> None:
    """The last server may have died before its sync: none may be taken for granted."""
    store = open_store(tmp_path / "live", DiskCalls())
    store.keep("a", True)
    fill(store, "a", range(20), MIB)
    image = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    disk = FailingDisk()
    store = open_store(image, disk)
    disk.calls.clear()
    store.sync("a")
    assert (disk.calls["fsync"], disk.calls["fsync_dir"]) == (store.usage().segments, 2)
    store.close()


def test_a_failed_stop_is_an_unclean_one(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)
    fill(store, "a", range(10))
    disk.fail("fsync", errno.EIO)
    store.close()
    assert not (tmp_path / "clean").exists()
    store = open_store(tmp_path, DiskCalls())
    assert [bytes(c.payload) for n in range(10) if (c := store.lookup(chunk(n)))] == [
        payload(n) for n in range(10)
    ]
    store.close()


# ---- the index, which is LMDB's and not behind the seam: its failures are scripted ----


def test_an_index_that_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise lmdb.DiskError("No space left on device")

    monkeypatch.setattr(lmdb, "open", refuse)
    with pytest.raises(ConfigurationError, match="its index can't be made: No space left"):
        open_store(tmp_path, DiskCalls())
    monkeypatch.undo()
    open_store(tmp_path, DiskCalls()).close()


def test_an_index_that_fails_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path, DiskCalls(), 24 * MIB)
    fill(store, "a", range(8), MIB)
    fill(store, "b", range(20, 26), MIB)
    before = store.usage()

    @contextmanager
    def full(_: Index) -> Iterator[None]:
        raise OutOfSpace("the store's index can't be written: MDB_MAP_FULL")
        yield

    monkeypatch.setattr(Index, "writing", full)
    with pytest.raises(OutOfSpace, match="MAP_FULL"):
        fill(store, "c", range(30, 32), MIB)
    assert store.usage().used_bytes - before.used_bytes <= 4096, "the room it took is given back"
    monkeypatch.undo()
    fill(store, "c", range(30, 40), MIB)
    assert all(held(store, n, MIB) for n in range(30, 40))
    store.close()


def test_a_damaged_chunk_that_the_index_cannot_forget_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted as gone each time somebody asks, it would take its segment, and the good chunks in it, along."""
    store = open_store(tmp_path, DiskCalls())
    fill(store, "a", range(4), 3 * MIB)  # two a segment; the first is full
    file = segment_files(tmp_path)[0]
    with file.open("r+b") as damaged:
        damaged.seek(find_payload(file, payload(0, 3 * MIB)) - 64)
        damaged.write(bytes(64))
    with monkeypatch.context() as failing:

        @contextmanager
        def full(_: Index) -> Iterator[None]:
            raise OutOfSpace("the store's index can't be written: No space left on device")
            yield

        failing.setattr(Index, "writing", full)
        assert not held(store, 0, 3 * MIB)
    assert not held(store, 0, 3 * MIB)
    assert all(held(store, n, 3 * MIB) for n in (1, 2, 3))
    assert store.usage().chunks == 3
    store.close()


def test_an_index_that_points_to_anothers_record_costs_no_other(tmp_path: Path) -> None:
    """As what could not be deleted does, once the number of its segment is given again."""
    store = open_store(tmp_path, DiskCalls())
    fill(store, "a", range(2))
    with store._core.index.writing() as writer:
        where = writer.get(chunk_key(chunk(0)))
        assert where is not None
        writer.put(chunk_key(chunk(9)), where)
    assert not held(store, 9)
    assert held(store, 0) and held(store, 1)
    found = open_store(crash_image(tmp_path, tmp_path.with_name("crashed")), DiskCalls())
    assert held(found, 0) and held(found, 1)
    found.close()
    store.close()


def test_many_namespaces_do_not_use_up_the_descriptors(tmp_path: Path) -> None:
    """F14: each has a file that takes its next record; a tree of many folders must not leave none for connections."""
    store = open_store(tmp_path, DiskCalls())
    before = descriptors(tmp_path)
    for n in range(300):
        fill(store, f"folder-{n}", range(2 * n, 2 * n + 1))
    assert descriptors(tmp_path) - before <= MAX_RESTING
    for n in range(300):
        fill(store, f"folder-{n}", range(2 * n + 1, 2 * n + 2))
    assert store.usage().segments == 300
    for n in range(150):
        store.drop(f"folder-{n}")
    assert descriptors(tmp_path) - before <= MAX_RESTING
    assert all(held(store, n) for n in range(300, 600))
    store.close()
    assert descriptors(tmp_path) < before


def test_a_small_map_is_no_trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real MDB_MAP_FULL: fills fail as a full disk does, and what is there can be read and dropped."""
    monkeypatch.setattr(index, "_MAX_MAP_BYTES", 1 << 20)
    store = open_store(tmp_path, DiskCalls())
    stored = 0
    with pytest.raises(OutOfSpace, match="MAP_FULL"):
        for n in range(0, 100_000, 1000):
            store.put_many("a", [(chunk(m), 1, b"x") for m in range(n, n + 1000)])
            stored += 1000
    assert stored >= 2000
    assert all(store.lookup(chunk(n)) for n in range(stored))
    assert not store.contains(chunk(stored))
    store.drop("a")
    assert store.usage().used_bytes == 0
    store.close()


# ---- readers of what was evicted ----


class TightDisk(DiskCalls):
    """A disk with room for anything, until `tight`: then for nothing more until somebody lets go."""

    def __init__(self) -> None:
        self.tight = False
        self.asked = threading.Event()

    def free_bytes(self, path: str) -> tuple[int, int]:
        if self.tight:
            self.asked.set()
        free, size = super().free_bytes(path)
        return (0 if self.tight else free), size


def test_a_checkpoint_waits_for_a_read_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F10, F11: the disk is full of what was evicted and is still being looked at; a cached chunk passes through."""
    disk = TightDisk()
    store = Store(tmp_path, capacity_bytes=CAPACITY, min_free_bytes=0, disk=disk)
    fill(store, "a", range(8), MIB)
    fill(store, "save", range(50, 51))
    store.keep("save", True)
    read = store.lookup(chunk(0))
    assert read is not None
    store.evict("a")
    with store._core.lock:
        store._core.spares.trim(1 << 60)  # what has gone is unlinked, for want of room
    disk.tight = True
    with pytest.raises(OutOfSpace, match="until readers let go"):
        fill(store, "b", range(20, 21), MIB)
    monkeypatch.setattr(room, "LET_GO_S", 60.0)
    disk.asked.clear()

    def end() -> None:
        nonlocal read
        assert disk.asked.wait(60)
        disk.tight = False
        read = None

    reader = threading.Thread(target=end)
    reader.start()
    fill(store, "save", range(60, 61), MIB)
    reader.join()
    assert held(store, 60, MIB)
    store.close()


def test_a_checkpoint_waits_for_no_read_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F10, F11."""
    monkeypatch.setattr(room, "LET_GO_S", 0.05)
    disk = TightDisk()
    store = Store(tmp_path, capacity_bytes=CAPACITY, min_free_bytes=0, disk=disk)
    fill(store, "a", range(8), MIB)
    fill(store, "save", range(50, 51))
    store.keep("save", True)
    read = store.lookup(chunk(0))
    store.evict("a")
    with store._core.lock:
        store._core.spares.trim(1 << 60)
    disk.tight = True
    with pytest.raises(OutOfSpace, match="until readers let go"):
        fill(store, "save", range(60, 61), MIB)
    assert read is not None
    disk.tight = False
    store.close()
