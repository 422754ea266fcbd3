"""Folders listed side by side: everything once, whatever tree and pages; errors come; nothing goes on behind."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache.errors import ServerUnavailable
from torchcache.model import ObjectId, ObjectInfo
from torchcache.pool.folder_listing import FolderListing, FolderPart

KEYS = st.lists(st.text("ab/", min_size=1, max_size=8), max_size=60, unique=True)


class Tree:
    """Answers as S3 does with a delimiter, `page` entries at a time."""

    def __init__(self, keys: list[str], page: int) -> None:
        self.keys, self.page = keys, page
        self.asked: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()

    def ask(self, prefix: str, token: str) -> FolderPart:
        with self.lock:
            self.asked[prefix, token] += 1
        entries = sorted(
            {prefix + cut(key.removeprefix(prefix)) for key in self.keys if key.startswith(prefix)}
        )
        start = int(token or 0)
        part, more = entries[start : start + self.page], len(entries) > start + self.page
        is_folder = {entry: entry.endswith("/") and entry != prefix for entry in part}
        return FolderPart(
            [info(entry) for entry in part if not entry.endswith("/")],  # markers of folders are left out
            [entry for entry in part if is_folder[entry]],
            str(start + self.page) if more else "",
        )


def cut(rest: str) -> str:
    first, slash, _ = rest.partition("/")
    return first + slash


def info(key: str) -> ObjectInfo:
    return ObjectInfo(ObjectId("s3", key, "v"), 1)


def no_list() -> Iterator[ObjectInfo]:
    raise AssertionError("folders can be listed here")


@given(keys=KEYS, page=st.integers(1, 5))
def test_everything_comes_once(keys: list[str], page: int) -> None:
    below = ["root/" + key for key in keys]
    tree = Tree(below, page)
    found = Counter(o.id.key for o in FolderListing(tree.ask).objects("root/", otherwise=no_list))
    assert found == Counter(key for key in below if not key.endswith("/"))
    assert set(tree.asked.values()) == {1}


def test_what_can_not_be_listed_so_is_listed_as_ever() -> None:
    listing = FolderListing(lambda prefix, token: None)
    assert list(listing.objects("root/", otherwise=lambda: iter([info("x")]))) == [info("x")]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("torchcache-listing")]


def test_an_error_comes_and_ends_it() -> None:
    tree = Tree([f"root/{folder}/{n}" for folder in range(20) for n in range(3)], 100)

    def ask(prefix: str, token: str) -> FolderPart:
        if prefix == "root/7/":
            raise ServerUnavailable("S3 is away")
        return tree.ask(prefix, token)

    with pytest.raises(ServerUnavailable, match="S3 is away"):
        list(FolderListing(ask).objects("root/", otherwise=no_list))
    assert threads() == []


def test_a_reader_who_has_enough_ends_it() -> None:
    tree = Tree([f"root/{folder}/{n}" for folder in range(300) for n in range(2)], 1000)
    objects = FolderListing(tree.ask).objects("root/", otherwise=no_list)
    assert next(objects)
    objects.close()  # type: ignore[attr-defined]
    assert threads() == []
    assert len(tree.asked) < 301
