"""What the store says it takes is what the file system gives it: cases that the model test found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torchcache_server.store import Store, core

from tests.unit.store_parts import SMALL_SEGMENT, chunk, descriptors, fill, held, small_store
from torchcache.errors import OutOfSpace

SEGMENTS = 4
CAPACITY = SEGMENTS * SMALL_SEGMENT


@pytest.fixture
def folder() -> Iterator[Path]:
    with small_store() as path:
        yield path / "store"


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    store = Store(folder, capacity_bytes=CAPACITY, segment_bytes=SMALL_SEGMENT, min_free_bytes=0)
    yield store
    store.close()


def taken(folder: Path, files: str = "segments/*/*") -> int:
    return sum(512 * path.stat().st_blocks for path in folder.glob(files))


def test_a_recycled_file_counts_whole_and_after_a_restart_as_what_it_holds(folder: Path) -> None:
    """I5: what it was before lies behind its tail, until the store stops."""
    with opened(folder) as store:
        fill(store, "a", range(3), 20_000)
        store.drop("a")
        fill(store, "b", range(1), 1000)
        assert store.usage().recycled_segments == 1
        assert store.usage().used_bytes == taken(folder) > 60_000
    with opened(folder) as store:
        assert store.usage().used_bytes == taken(folder) == 4096
        assert held(store, 0)


def test_a_spare_that_is_smaller_than_what_comes_into_it(folder: Path) -> None:
    """I5: it grows, and the capacity holds all the same."""
    with opened(folder) as store:
        fill(store, "small", range(1), 40_000)
        fill(store, "smaller", range(1, 2), 30_000)
        for n, name in enumerate("abc"):
            fill(store, name, range(10 + n, 11 + n), 60_000)
        store.drop("small")
        assert store.usage().spare_bytes == taken(folder, "spares/*") > 0
        fill(store, "d", range(20, 21), 60_000)
        usage = store.usage()
        assert usage.used_bytes == taken(folder)
        assert usage.used_bytes + usage.spare_bytes <= CAPACITY


def test_a_look_behind_the_last_record_takes_no_room(folder: Path) -> None:
    """I5: on a tmpfs a page of a hole that is looked at is there from then on."""
    with opened(folder) as store:
        fill(store, "a", range(1), 100)
        store._core.known = {}
        assert held(store, 0, 100)
        assert store.usage().used_bytes == taken(folder) == 4096


def test_who_finds_the_store_full_leaves_no_file_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F14, I5: every namespace that tries in vain opens the file it would have written to."""
    monkeypatch.setattr(core, "MAX_RESTING", 1)
    with opened(folder) as store:
        before = descriptors(folder)
        for n in range(SEGMENTS):
            store.keep(f"n{n}", True)
            fill(store, f"n{n}", range(n, n + 1), 50_000)
        for n in range(SEGMENTS):
            with pytest.raises(OutOfSpace):
                fill(store, f"n{n}", range(10 * n + 10, 10 * n + 13), 20_000)
        assert descriptors(folder) <= before + 1


def test_a_file_that_was_emptied_into_a_full_store_is_no_spare(folder: Path) -> None:
    """I5: while its records are moved it counts as gone already."""
    with opened(folder) as store:
        for name, numbers in (
            ("a", range(3)),
            ("b", range(10, 13)),
            ("c", range(20, 23)),
            ("d", range(30, 33)),
        ):
            fill(store, name, numbers, 19_000)
        for n in (30, 31):
            store.quarantine(chunk(n))
        store.tidy()
        usage = store.usage()
        assert usage.compacted_bytes > 19_000 and held(store, 32, 19_000)
        assert usage.used_bytes == taken(folder)
        assert usage.used_bytes + usage.spare_bytes <= CAPACITY
