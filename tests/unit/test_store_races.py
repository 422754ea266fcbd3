"""What happens while something else happens: forced, by acting from within a write, not hoped for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import pytest
from torchcache_server.store import DiskCalls, Store

from tests.collected import until_collected
from tests.unit.store_parts import (
    CAPACITY,
    MIB,
    FailingDisk,
    chunk,
    crash_image,
    descriptors,
    fill,
    held,
    payload,
    segment_files,
)
from torchcache.errors import OutOfSpace, ServerUnavailable, TorchCacheError


class Hooked(DiskCalls):
    """Calls `during_write` once, before or after the bytes of a large write reach the disk."""

    def __init__(self) -> None:
        self.before_write: Callable[[], object] | None = None
        self.after_write: Callable[[], object] | None = None
        self.before_fsync: Callable[[], object] | None = None

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        is_record = sum(memoryview(b).nbytes for b in buffers) > 500
        before, after = self.before_write, self.after_write
        if is_record:
            self.before_write = self.after_write = None
        if is_record and before is not None:
            before()
        written = super().pwritev(fd, buffers, offset)
        if is_record and after is not None:
            after()
        return written

    def fsync(self, fd: int) -> None:
        act, self.before_fsync = self.before_fsync, None
        if act is not None:
            act()
        super().fsync(fd)


@pytest.fixture
def disk() -> Hooked:
    return Hooked()


@pytest.fixture
def store(tmp_path: Path, disk: Hooked) -> Store:
    return Store(tmp_path / "s", capacity_bytes=CAPACITY, disk=disk)


def index_entries(path: Path) -> int:
    """What the closed store's index holds, read as another process would."""
    with lmdb.open(str(path / "index"), readonly=True, max_dbs=3) as env:
        table = env.open_db(b"chunks", create=False)
        with env.begin() as txn:
            return int(txn.stat(table)["entries"])


@pytest.mark.parametrize("when", ["before_write", "after_write"])
def test_nobody_sees_a_chunk_before_it_is_written(store: Store, disk: Hooked, when: str) -> None:
    seen: list[bool] = []
    setattr(disk, when, lambda: seen.append(store.contains(chunk(1)) or store.lookup(chunk(1)) is not None))
    fill(store, "a", range(3))
    assert seen == [False]
    assert held(store, 1)
    store.close()


@pytest.mark.parametrize("when", ["before_write", "after_write"])
def test_dropped_while_written(store: Store, disk: Hooked, tmp_path: Path, when: str) -> None:
    """The writer gets its chunk, as a view that lives; the store holds nothing of it, index included."""
    setattr(disk, when, lambda: store.drop("a"))
    put = store.put("a", chunk(1), 1000, payload(1))
    assert bytes(put.payload) == payload(1)
    assert not store.contains(chunk(1))
    usage = store.usage()
    assert (usage.chunks, usage.used_bytes, usage.segments) == (0, 0, 0)
    assert segment_files(tmp_path / "s") == []
    fill(store, "a", range(2, 4))
    assert held(store, 2)
    store.close()
    assert index_entries(tmp_path / "s") == 2


def test_stored_by_another_while_written(store: Store, disk: Hooked, tmp_path: Path) -> None:
    disk.after_write = lambda: store.put("b", chunk(1), 1000, payload(1))
    put = store.put("a", chunk(1), 1000, payload(1))
    assert bytes(put.payload) == payload(1)
    assert {n.name: n.chunks for n in store.namespaces()} == {"a": 0, "b": 1}
    store.quarantine(chunk(1))
    image = crash_image(tmp_path / "s", tmp_path / "image")
    store.close()
    store = Store(image, capacity_bytes=CAPACITY)
    assert not store.contains(chunk(1)), "the one that came too late doesn't come back for the other"
    store.close()


def test_a_chunk_twice_in_a_batch_is_written_once(store: Store) -> None:
    one = store.put_many("a", [(chunk(1), 1000, payload(1))])
    used = store.usage().used_bytes
    rows = [(chunk(n), 1000, payload(n)) for n in (2, 2, 1, 2)]
    assert [bytes(c.payload) for c in store.put_many("b", rows)] == [payload(n) for n in (2, 2, 1, 2)]
    assert bytes(one[0].payload) == payload(1)
    assert store.usage().used_bytes <= used + 4096
    store.close()


def test_a_segment_that_is_written_to_does_not_yield(store: Store, disk: Hooked) -> None:
    """F38."""

    def crowd() -> None:
        with pytest.raises(OutOfSpace):
            for n in range(100, 170):
                fill(store, "b", range(n, n + 1), MIB)

    disk.before_write = crowd
    fill(store, "a", range(2), MIB)
    assert held(store, 1, MIB)
    store.close()


def test_who_is_written_to_is_passed_over_for_the_next(store: Store, disk: Hooked) -> None:
    def crowd() -> None:
        assert store.lookup(chunk(100)) is not None  # a is the one used longest ago, but busy
        for n in range(200, 230):
            fill(store, "c", range(n, n + 1), MIB)

    fill(store, "b", range(100, 140), MIB)
    disk.before_write = crowd
    fill(store, "a", range(2), MIB)
    assert held(store, 1, MIB)
    assert not all(store.contains(chunk(n)) for n in range(100, 140))
    store.close()


def test_kept_while_others_look_for_room(store: Store) -> None:
    """F38, I6: the flag counts from when `keep` returns, also for who has chosen victims before."""
    fill(store, "a", range(3))
    core = store._core
    victims = list(core.space.segments.values())
    store.keep("a", True)
    assert core.remove(victims, unless_in_use=True) == []
    assert held(store, 1)
    store.keep("a", False)
    assert core.remove(victims, unless_in_use=True) == victims
    assert not store.contains(chunk(1))
    store.close()


def test_a_sync_waits_for_the_one_under_way(store: Store, disk: Hooked) -> None:
    """Who comes while another syncs the same file must not return before that has happened."""
    fill(store, "a", range(3))
    order: list[str] = []
    second = threading.Thread(target=lambda: (store.sync("a"), order.append("second")))

    def meanwhile() -> None:
        second.start()
        second.join(0.2)
        order.append("first")

    disk.before_fsync = meanwhile
    store.sync("a")
    second.join()
    assert order == ["first", "second"]
    store.close()


def test_a_failed_sync_fails_for_all_who_wrote(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = Store(tmp_path, capacity_bytes=CAPACITY, disk=disk)
    disk.fail("fsync", 5, times=1)

    def write(n: int) -> str:
        fill(store, "a", range(n, n + 1))
        barrier.wait()
        try:
            store.sync("a")
        except TorchCacheError:
            return "failed"
        return "durable"

    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(write, range(4))) == {"failed"}
    store.close()


def test_close_waits_for_calls_under_way(store: Store, disk: Hooked, tmp_path: Path) -> None:
    closing = threading.Thread(target=store.close)

    def meanwhile() -> None:
        closing.start()
        deadline = time.monotonic() + 60
        with pytest.raises(ServerUnavailable):
            while time.monotonic() < deadline:  # until it has begun to close
                store.usage()
        closing.join(0.2)
        assert closing.is_alive()

    disk.before_write = meanwhile
    put = store.put("a", chunk(1), 1000, payload(1))
    closing.join()
    assert bytes(put.payload) == payload(1)
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY)
    assert held(store, 1)
    store.close()


def test_descriptors_and_mappings_return_to_baseline(tmp_path: Path) -> None:
    """I5: a segment costs no descriptor once it is full, and no mapping once it is gone and nobody looks."""

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(f"{tmp_path}/s")

    before = descriptors(tmp_path)
    for reopened in (False, True):
        store = Store(tmp_path, capacity_bytes=CAPACITY)
        idle = descriptors(tmp_path)
        if not reopened:
            for n in range(50):
                fill(store, "a", range(n, n + 1), MIB)
            assert descriptors(tmp_path) == idle + 1
        assert mappings() == store.usage().segments >= 6
        if not reopened:
            store.close()
    view = store.lookup(chunk(0))
    store.drop("a")
    assert until_collected(lambda: (descriptors(tmp_path), mappings()) == (idle, 1))
    del view
    assert mappings() == 0
    store.close()
    assert descriptors(tmp_path) == before
