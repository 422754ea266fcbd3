"""What a hostile review found: flags that come while segments move, room refused or miscounted, a dead disk."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.store import DiskCalls, Policy, Store, compaction
from torchcache_server.store.writing import commit, draft, give_back, release, reserve, write

from tests.unit.store_parts import (
    SMALL_SEGMENT,
    FailingDisk,
    chunk,
    fill,
    find_payload,
    flip_bit,
    held,
    overwrite,
    payload,
    segment_files,
    small_store,
)
from torchcache.errors import OutOfSpace, TorchCacheError

_CAPACITY = 1 << 20


@pytest.fixture
def folder() -> Iterator[Path]:
    with small_store() as found:
        yield found


def _store(folder: Path, disk: DiskCalls | None = None) -> Store:
    return Store(
        folder / "s",
        capacity_bytes=_CAPACITY,
        segment_bytes=SMALL_SEGMENT,
        min_free_bytes=0,
        disk=disk or DiskCalls(),
    )


@pytest.mark.parametrize("call", ["keep", "pin"])
def test_a_flag_that_comes_while_a_segment_is_emptied_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """I2, I6, F38: once it is kept or pinned nothing goes, and nothing is moved behind a sync's back."""
    store = _store(folder)
    fill(store, "a", range(30))
    core = store._core
    [segment] = core.space.segments.values()
    really = compaction._move
    flagged = threading.Event()

    def flag() -> None:
        getattr(store, call)("a", True)
        flagged.set()

    thread = threading.Thread(target=flag)
    seen: list[bool] = []

    def moving(*arguments: Any) -> bool:
        thread.start()
        flagged.wait(0.2)
        seen.append(flagged.is_set())
        return really(*arguments)

    monkeypatch.setattr(compaction, "_move", moving)
    compaction.compact(core, segment, lambda _: True)
    thread.join(60)
    assert seen == [False] and flagged.is_set()
    assert all(held(store, n) for n in range(30))
    store.close()


def test_a_sync_while_a_segment_is_emptied_is_of_what_was_moved_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I2: it syncs the file that is there; what goes from there must be durable where it went."""
    store = _store(folder)
    fill(store, "a", range(30))
    [segment] = store._core.space.segments.values()
    really = compaction._move

    def moving(*arguments: Any) -> bool:
        store.sync("a")
        return really(*arguments)

    monkeypatch.setattr(compaction, "_move", moving)
    compaction.compact(store._core, segment, lambda _: True)
    [now] = store._core.space.segments.values()
    assert now is not segment and not now.unsynced
    assert not store._core.space.namespaces["a"].names_unsynced
    store.close()


def test_a_dataset_is_moved_without_a_sync(folder: Path) -> None:
    """Nobody was promised anything, and storage has it."""
    store = _store(folder)
    fill(store, "a", range(30))
    [segment] = store._core.space.segments.values()
    compaction.compact(store._core, segment, lambda _: True)
    [now] = store._core.space.segments.values()
    assert now is not segment and now.unsynced
    store.close()


def test_what_was_pinned_since_is_moved_whole(folder: Path) -> None:
    """I6: who chose the segment to yield may have looked before the pin."""
    store = _store(folder)
    fill(store, "a", range(30))
    [segment] = store._core.space.segments.values()
    store.pin("a", True)
    compaction.compact(store._core, segment, lambda _: False)
    assert all(held(store, n) for n in range(30))
    store.close()


def test_a_checkpoint_is_not_refused_for_a_priority(folder: Path) -> None:
    """I2, F11: no dataset's priority stands above what exists nowhere else."""
    store = _store(folder)
    store.set_policy("data", Policy(priority=1))
    with pytest.raises(OutOfSpace):
        for first in range(0, 2000, 10):
            fill(store, "data", range(first, first + 10))
    with pytest.raises(OutOfSpace):
        fill(store, "other", range(4000, 4010))
    store.keep("save", True)
    fill(store, "save", range(5000, 5010))
    assert all(held(store, n) for n in range(5000, 5010))
    store.close()


def test_a_miss_in_a_full_store_looks_at_no_segment_that_cannot_yield(
    folder: Path,
) -> None:
    """I4: a terabyte of one dataset has 16384 segments, and every chunk beyond them is such a miss."""
    store = _store(folder)
    fill(store, "a", range(300))
    store.pin("b", True)
    fill(store, "b", range(1000, 1100))
    seen = list(store._core.space.candidates("a", 0))
    assert seen == []
    fill(store, "c", range(2000, 2010))
    assert {one.namespace for one in store._core.space.candidates("a", 0)} == {"c"}
    assert list(store._core.space.candidates("a", -1)) == []
    store.close()


def test_a_lack_of_descriptors_does_not_end_a_namespaces_durability(folder: Path) -> None:
    """F14: only an fsync that failed is never tried again; a file that couldn't be opened lost nothing."""
    disk = FailingDisk()
    store = _store(folder, disk)
    fill(store, "a", range(3))
    [segment] = store._core.space.segments.values()
    segment.close(disk)
    disk.fail("open", errno.EMFILE)
    with pytest.raises(TorchCacheError):
        store.sync("a")
    disk.mend()
    before = disk.calls.get("fsync", 0)
    store.sync("a")
    assert disk.calls["fsync"] > before
    store.close()


def test_a_scrub_forgets_nothing_of_a_disk_that_is_out_of_service(folder: Path) -> None:
    """F12, F15: the disk may be back at the next start, with all that is on it."""
    disk = FailingDisk()
    store = _store(folder, disk)
    fill(store, "a", range(30))
    disk.fail("populate", errno.EIO)
    for _ in range(20):
        store.scrub(100_000)
    assert store.health().out_of_service
    disk.mend()
    store.close()
    store = _store(folder)
    assert store.usage().chunks == 27  # three were found bad before
    store.close()


def test_a_file_with_holes_is_no_spare(folder: Path) -> None:
    """I5, F10: the next segment would fill them, and the books not show it."""
    store = _store(folder)
    core = store._core
    first, second = draft(chunk(1), 20_000, payload(1, 20_000)), draft(chunk(2), 36_000, payload(2, 36_000))
    one, two = reserve(core, "a", [first]), reserve(core, "a", [second])
    assert isinstance(one, tuple) and isinstance(two, tuple)
    for got in (one, two):
        write(core, got.parts[0])  # type: ignore[union-attr]
    commit(core, [second])
    give_back(core, one, seal=False)  # type: ignore[arg-type]
    for got in (one, two):
        release(core, got)  # type: ignore[arg-type]
    [segment] = core.space.segments.values()
    assert segment.hole_bytes
    store.drop("a")
    del segment, one, two, got, first, second
    fill(store, "b", range(10, 20), 3000)
    [segment] = core.space.segments.values()
    assert Path(segment.path).stat().st_blocks * 512 == segment.held_bytes
    store.close()


def test_damage_of_what_was_dropped_is_not_counted_any_more(folder: Path) -> None:
    """I5: nor does a look at the header alone take damage of the payload back."""
    store = _store(folder)
    store.keep("a", True)
    fill(store, "a", range(3))
    [path] = segment_files(folder / "s")
    for n in range(3):
        flip_bit(path, find_payload(path, payload(n)))
    store.scrub(_CAPACITY)
    store._core.known = {}
    store.lookup_many([chunk(n) for n in range(3)])
    assert store.usage().damaged_kept == 3
    store.drop("a")
    assert store.usage().damaged_kept == 0
    store.close()


def test_what_is_saved_again_takes_the_place_of_a_damaged_record(folder: Path) -> None:
    """I2: the message says "save again"; then the good bytes count, also after a crash."""
    store = _store(folder)
    store.keep("a", True)
    fill(store, "a", range(3))
    [segment] = store._core.space.segments.values()
    _, offset = store._core.index.members(segment.number)[1]
    store._core.known = {}
    overwrite(Path(segment.path), offset + 20, b"\xff" * 8)
    assert not held(store, 1)
    fill(store, "a", range(1, 2))
    assert all(held(store, n) for n in range(3))
    assert store.usage().damaged_kept == 0 and store.usage().chunks == 3
    store.close()


def test_nobody_waits_for_a_sync_of_what_is_dropped(folder: Path) -> None:
    """I4: the store's lock isn't held while a disk syncs."""
    slow, began, go_on = threading.Event(), threading.Event(), threading.Event()

    class Slow(DiskCalls):
        def fsync(self, fd: int) -> None:
            if slow.is_set():
                began.set()
                go_on.wait(120)
            super().fsync(fd)

    store = _store(folder, Slow())
    fill(store, "a", range(40))
    slow.set()
    syncing = threading.Thread(target=store.sync, args=("a",))
    syncing.start()
    assert began.wait(60)
    dropping = threading.Thread(target=store.drop, args=("a",))
    dropping.start()
    until = time.monotonic() + 60
    while store._core.space.segments and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)
    assert store._core.lock.acquire(timeout=60)
    store._core.lock.release()
    go_on.set()
    syncing.join(60)
    dropping.join(60)
    store.close()
