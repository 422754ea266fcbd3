"""Another process's index: grown beyond its map, made anew, in use already."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import lmdb
import pytest

from torchcache.lanes.local_index import LocalIndex
from torchcache.lanes.local_store import LocalStore
from torchcache.records import CHUNKS_TABLE, FILES_TABLE, IDENTITY, INDEX, INDEX_FILES, MAX_READERS

OWNER = f"""
import sys, lmdb
path, size, first, last = sys.argv[1], *map(int, sys.argv[2:])
with lmdb.open(path, map_size=size, max_dbs=4, max_readers={MAX_READERS}, sync=False) as env:
    chunks, files = env.open_db({CHUNKS_TABLE!r}), env.open_db({FILES_TABLE!r})
    with env.begin(write=True) as txn:
        for number in range(first, last):
            txn.put(b"%20d" % number, b"%16d" % number, db=chunks)
"""

MIB = 1 << 20


def write(store: Path, numbers: range, *, map_bytes: int) -> None:
    """As the owner of the index, which is another process."""
    (store / INDEX).mkdir(exist_ok=True)
    arguments = [str(store / INDEX), *map(str, (map_bytes, numbers.start, numbers.stop))]
    subprocess.run([sys.executable, "-c", OWNER, *arguments], check=True)


def place(index: LocalIndex, number: int) -> bytes | None:
    with index.begin() as txn:
        found: bytes | None = txn.get(b"%20d" % number)
        return found


def opened(store: Path) -> LocalStore:
    (store / IDENTITY).write_text("{}")
    found = (store / IDENTITY).stat()
    return LocalStore(str(store), (found.st_dev, found.st_ino))


def test_what_the_owner_writes_is_seen(tmp_path: Path) -> None:
    write(tmp_path, range(10), map_bytes=MIB)
    with closing(LocalIndex(str(tmp_path))) as index:
        assert place(index, 3) == b"%16d" % 3
        assert place(index, 30) is None
        write(tmp_path, range(30, 31), map_bytes=MIB)
        assert place(index, 30) == b"%16d" % 30
        assert index.is_current()


def test_an_owner_that_was_given_more_room_is_followed(tmp_path: Path) -> None:
    """The client's map is as large as the owner's was: beyond it nothing can be seen."""
    write(tmp_path, range(10), map_bytes=MIB)
    with closing(LocalIndex(str(tmp_path))) as index:
        write(tmp_path, range(10, 60_000), map_bytes=8 * MIB)
        with pytest.raises(lmdb.MapResizedError):
            place(index, 3)
    write(tmp_path, range(60_000, 60_001), map_bytes=8 * MIB)
    store = opened(tmp_path)
    assert store.look_up([b"%20d" % 3]).places == [b"%16d" % 3]
    write(tmp_path, range(100_000, 300_000), map_bytes=64 * MIB)
    assert store.look_up([b"%20d" % 299_999]).places == [b"%16d" % 299_999]
    store.close()


def test_an_index_that_is_made_anew_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, range(10), map_bytes=MIB)
    with closing(LocalIndex(str(tmp_path))) as index:
        for name in INDEX_FILES:
            (tmp_path / INDEX / name).unlink()
        assert not index.is_current()
        write(tmp_path, range(20, 30), map_bytes=MIB)
        assert not index.is_current()
        assert place(index, 3) is not None, "what is open stays what it was"


def test_a_store_without_an_index_knows_nothing_until_there_is_one(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.look_up([b"%20d" % 3, b"x"]).places == [None, None]
    write(tmp_path, range(10), map_bytes=MIB)
    assert store.look_up([b"%20d" % 3]).places == [b"%16d" % 3]
    store.close()


def test_a_store_that_is_another_now_is_not_read_on(tmp_path: Path) -> None:
    write(tmp_path, range(10), map_bytes=MIB)
    store = opened(tmp_path)
    (tmp_path / "new").write_text("{}")
    (tmp_path / "new").rename(tmp_path / IDENTITY)
    assert store.look_up([b"%20d" % 3]).places == [None]
    with pytest.raises(FileNotFoundError, match="another store"):
        store.open()


def test_an_index_that_is_open_in_this_process_is_refused(tmp_path: Path) -> None:
    """LMDB's locks would be gone with whichever is closed first."""
    write(tmp_path, range(10), map_bytes=MIB)
    with closing(LocalIndex(str(tmp_path))), pytest.raises(lmdb.Error, match="already open"):
        LocalIndex(str(tmp_path))


def test_a_folder_without_all_tables_is_no_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).mkdir()
    with pytest.raises(FileNotFoundError):
        LocalIndex(str(tmp_path))
    assert not list((tmp_path / INDEX).iterdir()), "nothing is made there"
    with lmdb.open(str(tmp_path / INDEX)):
        pass
    with pytest.raises(lmdb.Error):
        LocalIndex(str(tmp_path))
    write(tmp_path, range(10), map_bytes=MIB)
    with closing(LocalIndex(str(tmp_path))) as index:
        assert place(index, 3) is not None
