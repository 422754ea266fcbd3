"""What every under-store must do. A subclass gives the fixture `under_store`; a second base says what else holds."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from torchcache_server.understore import UnderStore, s3_upload

from torchcache.errors import AlreadyExists, ConfigurationError, ObjectChanged, ObjectNotFound
from torchcache.model import ByteRange, ObjectInfo
from torchcache.pool.folder_listing import FolderListing, FolderPart

DATA = b"the quick brown fox jumps over the lazy dog"


def soon() -> float:
    return time.monotonic() + 60


def put(under_store: UnderStore, key: str, data: bytes, *, replaces: str | None = "") -> ObjectInfo:
    return under_store.write(key, iter([memoryview(data)]), len(data), replaces=replaces, deadline=soon())


def get(under_store: UnderStore, info: ObjectInfo) -> bytes:
    return bytes(under_store.read(info, ByteRange(0, info.size), deadline=soon()))


def list_all(
    under_store: UnderStore, prefix: str, *, limit: int = 1000, start_after: str = ""
) -> list[ObjectInfo]:
    found: list[ObjectInfo] = []
    while True:
        page = under_store.list(prefix, start_after=start_after, limit=limit, deadline=soon())
        assert len(page.objects) <= limit
        found += page.objects
        if not page.truncated:
            return found
        start_after = page.objects[-1].id.key


class UnderStoreConformance:
    """The contract of `torchcache_server.understore.base.UnderStore`."""

    _folders = itertools.count()
    copies_itself = True  # large objects, without their bytes passing through here

    @pytest.fixture
    def folder(self) -> str:
        """A prefix, with a slash at its end, under which nothing is."""
        return f"folder-{next(self._folders)}/"

    @pytest.fixture
    def rootless(self) -> tuple[UnderStore, str]:
        """An under-store, and a prefix in it whose bucket or root folder doesn't exist."""
        raise NotImplementedError

    def test_lists_folder_by_folder(self, under_store: UnderStore, folder: str) -> None:
        """If at all: then, all together, what a plain listing gives."""
        for key in ("a", "b/1", "b/2", "b/c/3", "b-", "ü/x"):
            put(under_store, f"{folder}{key}", DATA)
        found, folders = [], [(folder, "")]
        while folders:
            page = under_store.list_folder(folders[-1][0], token=folders[-1][1], deadline=soon())
            if page is None:
                return
            prefix, _ = folders.pop()
            assert all("/" not in info.id.key.removeprefix(prefix) for info in page.objects)
            found += page.objects
            folders += [(below, "") for below in page.folders]
            if page.token:
                folders.append((prefix, page.token))
        assert sorted(found, key=str) == sorted(list_all(under_store, folder), key=str)
        assert len(found) == 6

    def test_lists_a_folder_from_any_key_on(
        self, under_store: UnderStore, folder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If at all: the objects behind the key, by key, part after part; no folder behind it is missing."""
        monkeypatch.setattr("torchcache_server.understore.s3._PAGE", 4)
        if under_store.list_folder(folder, token="", deadline=soon()) is None:
            return
        names = [*(f"{n:02d}" for n in range(10)), "05-", "b-", "ü"]
        for name in (*names, "05.d/x", "b/1", "c/1"):
            put(under_store, f"{folder}{name}", DATA)
        for start in ("0", "03", "04x", "05", "05-", "b", "b-", "b.", "zz", "ü", "."):
            found, folders, token, behind = list[str](), set[str](), "", folder + start
            while True:
                page = under_store.list_folder(folder, token=token, start_after=behind, deadline=soon())
                assert page is not None
                found += [info.id.key.removeprefix(folder) for info in page.objects]
                folders |= {below.removeprefix(folder) for below in page.folders}
                if not page.token:
                    break
                token, behind = page.token, ""
            assert found == sorted(name for name in names if name > start), start
            behind_it = {below for below in ("05.d/", "b/", "c/") if below.removesuffix("/") > start}
            assert behind_it <= folders <= {"05.d/", "b/", "c/"}, start

    def test_lists_a_folder_from_several_keys_on_at_once(
        self, under_store: UnderStore, folder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torchcache_server.understore.s3._PAGE", 3)
        keys = [f"{folder}{name}" for n in range(16) for name in (f"{n:03d}", f"{n:03d}-x")]
        keys += [f"{folder}{n:03d}.d/{m}" for n in range(0, 16, 5) for m in range(2)]
        for key in keys:
            put(under_store, key, DATA)

        def ask(prefix: str, token: str, behind: str) -> FolderPart | None:
            page = under_store.list_folder(prefix, token=token, start_after=behind, deadline=soon())
            return page and FolderPart(page.objects, page.folders, page.token, behind=True)

        found = FolderListing(ask, lambda prefix: iter(list_all(under_store, prefix))).objects(folder)
        assert sorted(info.id.key for info in found) == sorted(keys)

    def test_gives_back_what_was_written(self, under_store: UnderStore, folder: str) -> None:
        info = put(under_store, f"{folder}a", DATA)
        assert info.id.store == under_store.name
        assert info.id.key == f"{folder}a"
        assert info.size == len(DATA)
        assert get(under_store, info) == DATA

    @pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 42), (7, 20), (42, 43), (20, 20)])
    def test_reads_ranges(self, under_store: UnderStore, folder: str, start: int, end: int) -> None:
        info = put(under_store, f"{folder}a", DATA)
        assert under_store.read(info, ByteRange(start, end), deadline=soon()) == DATA[start:end]

    @pytest.mark.parametrize(("start", "end"), [(0, 44), (-1, 3), (9, 8)])
    def test_refuses_ranges_outside(self, under_store: UnderStore, folder: str, start: int, end: int) -> None:
        info = put(under_store, f"{folder}a", DATA)
        with pytest.raises(ConfigurationError, match="has 43 bytes"):
            under_store.read(info, ByteRange(start, end), deadline=soon())

    def test_stat_list_and_write_agree(self, under_store: UnderStore, folder: str) -> None:
        info = put(under_store, f"{folder}a", DATA)
        assert under_store.stat(f"{folder}a", deadline=soon()) == info
        assert list_all(under_store, folder) == [info]

    def test_holds_empty_objects(self, under_store: UnderStore, folder: str) -> None:
        info = put(under_store, f"{folder}empty", b"")
        assert info.size == 0
        assert get(under_store, info) == b""

    def test_joins_the_pieces_of_a_large_object(self, under_store: UnderStore, folder: str) -> None:
        data = os.urandom(17 * 1024 * 1024 + 3)
        cuts = [0, 1, 5_000_000, 5_000_000, 16_000_000, len(data)]
        pieces = (memoryview(data)[a:b] for a, b in itertools.pairwise(cuts))
        info = under_store.write(f"{folder}large", pieces, len(data), replaces="", deadline=soon())
        assert under_store.stat(f"{folder}large", deadline=soon()) == info
        assert get(under_store, info) == data
        middle = ByteRange(8_388_607, 8_388_700)
        assert under_store.read(info, middle, deadline=soon()) == data[middle.start : middle.end]

    def test_a_copy_is_conditional_on_both_ends_or_none(
        self, under_store: UnderStore, folder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = os.urandom(9 * 1024 * 1024 + 3)
        old = put(under_store, f"{folder}a", data[::-1])
        info = put(under_store, f"{folder}a", data, replaces=old.id.version)
        assert under_store.copy(old, f"{folder}b", replaces="", deadline=soon()) is None, "it was overwritten"
        copied = under_store.copy(info, f"{folder}b", replaces="", deadline=soon())
        assert (copied is not None) == self.copies_itself
        if copied is not None:
            assert under_store.stat(f"{folder}b", deadline=soon()) == copied
            assert get(under_store, copied) == data
            with pytest.raises(AlreadyExists, match=f"{folder}b exists already"):
                under_store.copy(info, f"{folder}b", replaces="", deadline=soon())
            again = under_store.copy(info, f"{folder}b", replaces=copied.id.version, deadline=soon())
            assert again is not None
            assert get(under_store, again) == data
        monkeypatch.setattr(s3_upload, "COPIED_PART_BYTES", 5 * 1024 * 1024)
        in_parts = under_store.copy(info, f"{folder}d", replaces="", deadline=soon())
        assert (in_parts is not None) == self.copies_itself
        if in_parts is not None:
            assert get(under_store, in_parts) == data
        under_store.delete(f"{folder}a", deadline=soon())
        assert under_store.copy(info, f"{folder}c", replaces="", deadline=soon()) is None, "it is gone"
        assert [found.id.key for found in list_all(under_store, f"{folder}c")] == []

    def test_an_overwritten_object_has_changed(self, under_store: UnderStore, folder: str) -> None:
        old = put(under_store, f"{folder}a", DATA)
        new = put(under_store, f"{folder}a", DATA[::-1], replaces=None)
        assert new.id.version != old.id.version
        for range in (ByteRange(0, 43), ByteRange(3, 5)):
            with pytest.raises(ObjectChanged, match=f"{folder}a was overwritten .* create the dataset again"):
                under_store.read(old, range, deadline=soon())
        assert get(under_store, new) == DATA[::-1]

    def test_a_deleted_object_is_not_found(self, under_store: UnderStore, folder: str) -> None:
        info = put(under_store, f"{folder}a", DATA)
        under_store.delete(f"{folder}a", deadline=soon())
        with pytest.raises(ObjectNotFound, match=f"{folder}a"):
            get(under_store, info)
        with pytest.raises(ObjectNotFound, match=f"{folder}a"):
            under_store.stat(f"{folder}a", deadline=soon())
        assert list_all(under_store, folder) == []

    def test_deletes_what_is_not_there(self, under_store: UnderStore, folder: str) -> None:
        under_store.delete(f"{folder}nothing/here", deadline=soon())

    def test_creates_only_once(self, under_store: UnderStore, folder: str) -> None:
        info = put(under_store, f"{folder}a", DATA)
        with pytest.raises(AlreadyExists, match=f"{folder}a exists already"):
            put(under_store, f"{folder}a", b"other")
        assert get(under_store, info) == DATA

    def test_replaces_only_the_version_named(self, under_store: UnderStore, folder: str) -> None:
        first = put(under_store, f"{folder}a", b"1")
        second = put(under_store, f"{folder}a", b"2", replaces=first.id.version)
        with pytest.raises(AlreadyExists, match="no longer at version"):
            put(under_store, f"{folder}a", b"3", replaces=first.id.version)
        assert get(under_store, second) == b"2"

    def test_replaces_nothing_where_nothing_is(self, under_store: UnderStore, folder: str) -> None:
        info = put(under_store, f"{folder}a", b"1")
        under_store.delete(f"{folder}a", deadline=soon())
        with pytest.raises(AlreadyExists, match="no longer at version"):
            put(under_store, f"{folder}a", b"2", replaces=info.id.version)
        assert list_all(under_store, folder) == []

    @pytest.mark.parametrize("said", [2, 9_000_000])
    def test_stores_nothing_that_does_not_add_up(
        self, under_store: UnderStore, folder: str, said: int
    ) -> None:
        with pytest.raises(ConfigurationError, match=r"\d+ bytes were given"):
            under_store.write(f"{folder}a", iter([memoryview(b"123")]), said, replaces="", deadline=soon())
        assert list_all(under_store, folder) == []

    def test_stores_nothing_of_a_source_that_fails(self, under_store: UnderStore, folder: str) -> None:
        def pieces() -> Iterator[memoryview]:
            yield memoryview(bytes(9_000_000))
            raise RuntimeError("the disk is on fire")

        with pytest.raises(RuntimeError, match="on fire"):
            under_store.write(f"{folder}a", pieces(), 20_000_000, replaces=None, deadline=soon())
        assert list_all(under_store, folder) == []

    def test_lists_what_has_the_prefix(self, under_store: UnderStore, folder: str) -> None:
        keys = {f"{folder}{name}" for name in ("a/x", "a/y/z", "a-b", "a.txt", "a0", "b", "c/d")}
        for key in keys:
            put(under_store, key, b"1")
        assert {info.id.key for info in list_all(under_store, folder)} == keys
        assert {info.id.key for info in list_all(under_store, f"{folder}a/")} == {
            f"{folder}a/x",
            f"{folder}a/y/z",
        }
        assert {info.id.key for info in list_all(under_store, f"{folder}a")} == keys - {
            f"{folder}b",
            f"{folder}c/d",
        }
        assert list_all(under_store, f"{folder}nothing/") == []

    @pytest.mark.parametrize("limit", [1, 2, 3])
    def test_pages_give_everything_once(self, under_store: UnderStore, folder: str, limit: int) -> None:
        names = ("a/x", "a/y/z", "a-b", "a.txt", "a0", "b", "c/d")
        infos = {put(under_store, f"{folder}{name}", name.encode()) for name in names}
        found = list_all(under_store, folder, limit=limit)
        assert len(found) == len(names)
        assert set(found) == infos
        rest = list_all(under_store, folder, start_after=found[3].id.key)
        assert rest == found[4:]

    def test_a_missing_root_is_not_found(self, rootless: tuple[UnderStore, str]) -> None:
        under_store, prefix = rootless
        with pytest.raises(ObjectNotFound, match=r"there is no (bucket|folder) .*; check"):
            list_all(under_store, prefix)

    @pytest.mark.parametrize("name", ["a b+c", "%41", "é/ü", "a&b=c?d#e", "..a", "~", "'\"", "日本"])
    def test_keys_are_taken_literally(self, under_store: UnderStore, folder: str, name: str) -> None:
        info = put(under_store, folder + name, name.encode())
        assert under_store.stat(folder + name, deadline=soon()) == info
        assert list_all(under_store, folder) == [info]
        assert get(under_store, info) == name.encode()

    @pytest.mark.parametrize("name", ["", "../a", "a/../../b", "a/./b", "..", "a\0b", "\ud800"])
    def test_refuses_keys_that_lead_astray(self, under_store: UnderStore, folder: str, name: str) -> None:
        key = folder + name if name else ""
        with pytest.raises(ConfigurationError):
            put(under_store, key, DATA)
        with pytest.raises(ConfigurationError):
            under_store.stat(key, deadline=soon())

    def test_counts_requests_and_bytes(self, under_store: UnderStore, folder: str) -> None:
        info = put(under_store, f"{folder}a", DATA)
        counters = under_store.counters
        assert (counters.write_requests, counters.write_bytes) == (1, 43)
        assert (counters.read_requests, counters.read_bytes, counters.meta_requests) == (0, 0, 0)
        get(under_store, info)
        under_store.read(info, ByteRange(0, 10), deadline=soon())
        assert (counters.read_requests, counters.read_bytes) == (2, 53)
        under_store.stat(f"{folder}a", deadline=soon())
        list_all(under_store, folder)
        under_store.delete(f"{folder}a", deadline=soon())
        assert counters.meta_requests == 3
        assert counters.retries == 0


class WritersExcludeEachOther:
    """For the under-stores whose conditions hold between writers at the same time."""

    exclusive_bytes = 9_000_000
    """Up to this size; claims and manifests, on which commits rest, are far smaller."""

    @pytest.mark.parametrize("size", [1000, 9_000_000])
    def test_one_of_many_creates(self, under_store: UnderStore, folder: str, size: int) -> None:
        size = min(size, self.exclusive_bytes)

        def create(number: int) -> bool:
            try:
                put(under_store, f"{folder}a", bytes([number]) * size)
            except AlreadyExists:
                return False
            return True

        with ThreadPoolExecutor(4) as threads:
            won = list(threads.map(create, range(4)))
        assert won.count(True) == 1
        found = get(under_store, under_store.stat(f"{folder}a", deadline=soon()))
        assert found == bytes([won.index(True)]) * size

    def test_no_replacement_is_lost(self, under_store: UnderStore, folder: str) -> None:
        put(under_store, f"{folder}count", b"0")

        def count_up(_: int) -> None:
            for _ in range(5):
                while True:
                    now = under_store.stat(f"{folder}count", deadline=soon())
                    try:
                        value = int(get(under_store, now))
                        put(under_store, f"{folder}count", b"%d" % (value + 1), replaces=now.id.version)
                    except (AlreadyExists, ObjectChanged):
                        continue
                    break

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(count_up, range(4)))
        assert get(under_store, under_store.stat(f"{folder}count", deadline=soon())) == b"20"

    def test_a_large_object_replaces_only_the_version_named(
        self, under_store: UnderStore, folder: str
    ) -> None:
        first = put(under_store, f"{folder}a", b"1")
        second = put(under_store, f"{folder}a", b"2", replaces=None)
        large = bytes(9_000_000)
        with pytest.raises(AlreadyExists, match="no longer at version"):
            put(under_store, f"{folder}a", large, replaces=first.id.version)
        assert get(under_store, second) == b"2"
        third = put(under_store, f"{folder}a", large, replaces=second.id.version)
        assert get(under_store, third) == large


class RootsAreNotMade:
    """For the under-stores that don't make a missing root by themselves (SeaweedFS does)."""

    def test_nothing_is_written_without_a_root(self, rootless: tuple[UnderStore, str]) -> None:
        under_store, prefix = rootless
        with pytest.raises(ObjectNotFound, match=r"there is no (bucket|folder) .*; check"):
            put(under_store, f"{prefix}a", DATA)
