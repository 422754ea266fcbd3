"""What the index holds for clients that read the store's files themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from torchcache_server.store import Store

from tests.unit.store_parts import chunk, crash_image, fill, held, segment_files, small_store
from torchcache.records import FILES_TABLE, INDEX, SEGMENT_NUMBER, SegmentHeader, file_at

CAPACITY = 64 << 20
SEGMENT = 64 << 10


@pytest.fixture
def folder() -> Iterator[Path]:
    with small_store() as folder:
        yield folder


def listed(path: Path) -> dict[Path, tuple[int, int]]:
    """What the index of a closed store says: files, their numbers and nonces."""
    found = {}
    with (
        lmdb.open(str(path / INDEX), readonly=True, lock=False, max_dbs=4) as env,
        env.begin(env.open_db(FILES_TABLE, create=False)) as txn,
    ):
        for key, entry in txn.cursor():
            (number,) = SEGMENT_NUMBER.unpack(key)
            nonce, file = file_at(number, entry)
            found[path / file] = (number, nonce)
    return found


def there(path: Path) -> dict[Path, tuple[int, int]]:
    """What the files say."""
    found = {}
    for file in segment_files(path):
        header = SegmentHeader.decode(memoryview(file.read_bytes()))
        assert header is not None
        found[file] = (header.number, header.nonce)
    return found


def opened(path: Path) -> Store:
    return Store(path, capacity_bytes=CAPACITY, segment_bytes=SEGMENT, min_free_bytes=0)


def test_every_segments_file_is_found_by_its_number(folder: Path) -> None:
    store = opened(folder / "s")
    for number in range(5):
        fill(store, f"namespace {number % 2}", range(40 * number, 40 * number + 40))
    store.close()
    assert len(listed(folder / "s")) > 2
    assert listed(folder / "s") == there(folder / "s")


def test_what_is_evicted_is_listed_no_more(folder: Path) -> None:
    store = opened(folder / "s")
    fill(store, "a", range(100))
    fill(store, "b", range(100, 200))
    store.evict("a")
    store.close()
    assert listed(folder / "s") == there(folder / "s")
    assert listed(folder / "s")


@pytest.mark.parametrize("clean", [True, False])
def test_a_start_lists_the_files_that_are_there(folder: Path, clean: bool) -> None:
    """After a crash the index is a new one; after a stop in order a file may have gone all the same."""
    store = opened(folder / "s")
    fill(store, "a", range(100))
    if not clean:
        crash_image(folder / "s", folder / "image")
    store.close()
    path = folder / ("s" if clean else "image")
    segment_files(path)[0].unlink()
    again = opened(path)
    assert not held(again, 0)
    assert held(again, 99)
    again.close()
    assert listed(path) == there(path)
    assert listed(path)


def test_namespaces_that_clients_read_by_themselves_are_in_use(folder: Path) -> None:
    """Else the one that everybody reads would look idle, and yield first."""
    store = Store(folder / "s", capacity_bytes=6 * SEGMENT, segment_bytes=SEGMENT, min_free_bytes=0)
    fill(store, "a", range(100))
    fill(store, "b", range(100, 200))
    hits = store.usage().hits
    store.used(["a", "never heard of"], chunks=7)
    assert store.usage().hits == hits + 7
    for number in range(200, 1000):
        fill(store, "c", range(number, number + 1))
        if not store.contains(chunk(199)):
            break
    assert not store.contains(chunk(199)), "nothing was evicted"
    assert store.contains(chunk(99)), "b was used before a, and goes first"
    store.close()
