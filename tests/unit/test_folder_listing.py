"""Folders listed side by side: everything once, whatever tree and pages; errors come; nothing goes on behind."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache.errors import IntegrityError, ServerUnavailable
from torchcache.model import ObjectId, ObjectInfo
from torchcache.pool import folder_listing
from torchcache.pool.folder_listing import FLAT_OBJECTS, FolderListing, FolderPart
from torchcache.pool.key_space import KeySpace

KEYS = st.lists(st.text("ab/", min_size=1, max_size=8), max_size=60, unique=True)

Order = Callable[[str], str]


def by_key(entry: str) -> str:
    """AWS: a folder lies where its objects do."""
    return entry


def by_name(entry: str) -> str:
    """SeaweedFS: where its name does, without the slash."""
    return entry.removesuffix("/")


class Tree:
    """Answers as S3 does with a delimiter, `page` entries at a time; `cuts`: from behind any key."""

    def __init__(self, keys: list[str], page: int, *, order: Order = by_key, cuts: bool = False) -> None:
        self.keys, self.page, self.order, self.cuts = keys, page, order, cuts
        self.asked: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()

    def ask(self, prefix: str, token: str, behind: str) -> FolderPart:
        assert not (token and behind)
        assert self.cuts or not behind
        behind, _, at = token.partition("|") if token else (behind, "|", "0")
        with self.lock:
            self.asked[prefix, f"{behind}|{at}"] += 1
        entries = {prefix + cut(key.removeprefix(prefix)) for key in self.keys if key.startswith(prefix)}
        if self.order is by_key:
            # A folder is shown as long as anything in it lies behind the key.
            folders = {entry for entry in entries if entry.endswith("/")}
            last = {entry: max(k for k in self.keys if k.startswith(entry)) for entry in folders}
            entries = {entry for entry in entries if last.get(entry, entry) > behind}
        else:
            entries = {entry for entry in entries if by_name(entry) > behind}
        return self.part(prefix, sorted(entries, key=self.order), behind, int(at))

    def part(self, prefix: str, entries: list[str], behind: str, start: int) -> FolderPart:
        part, more = entries[start : start + self.page], len(entries) > start + self.page
        is_folder = {entry: entry.endswith("/") and entry != prefix for entry in part}
        return FolderPart(
            [info(entry) for entry in part if not entry.endswith("/")],  # markers of folders are left out
            [entry for entry in part if is_folder[entry]],
            f"{behind}|{start + self.page}" if more else "",
            behind=self.cuts,
        )


def cut(rest: str) -> str:
    first, slash, _ = rest.partition("/")
    return first + slash


def info(key: str) -> ObjectInfo:
    return ObjectInfo(ObjectId("s3", key, "v"), 1)


def large(prefix: str) -> Iterator[ObjectInfo]:
    """A flat listing that shows one folder, so that folders are listed each; it isn't gone through to its end."""
    yield from (info(f"{prefix}large/{number}") for number in range(FLAT_OBJECTS))
    raise AssertionError("folders are listed here")


@given(keys=KEYS, page=st.integers(1, 5))
def test_everything_comes_once(keys: list[str], page: int) -> None:
    below = ["root/" + key for key in keys]
    tree = Tree(below, page)
    found = Counter(o.id.key for o in FolderListing(tree.ask, large).objects("root/"))
    assert found == Counter(key for key in below if not key.endswith("/"))
    assert set(tree.asked.values()) == {1}


NAMES = st.one_of(
    st.text("ab-/0", min_size=1, max_size=6),
    st.integers(0, 400).map(lambda n: f"{n:06d}.jpg"),
    st.integers(0, 1 << 32).map(lambda n: f"{n:08x}"),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=3),
)


@given(
    keys=st.lists(NAMES, max_size=200, unique=True),
    page=st.integers(1, 5),
    order=st.sampled_from([by_key, by_name]),
)
def test_everything_comes_once_from_folders_that_are_cut(keys: list[str], page: int, order: Order) -> None:
    below = ["root/" + key for key in keys]
    tree = Tree(below, page, order=order, cuts=True)
    found = Counter(o.id.key for o in FolderListing(tree.ask, large).objects("root/"))
    assert found == Counter(key for key in below if not key.endswith("/"))


class Patient:
    """Asks `tree`, but of its first range not for the tenth part before somebody has cut it."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.cut = threading.Event()

    def __call__(self, prefix: str, token: str, behind: str) -> FolderPart:
        if behind:
            self.cut.set()
        elif token == f"|{10 * self.tree.page}":
            assert self.cut.wait(60)
        return self.tree.ask(prefix, token, behind)


@pytest.mark.parametrize("name", ["{:06d}.jpg", "image-{:d}", "{:x}"])
def test_a_long_folder_is_listed_from_other_keys_on_too(name: str) -> None:
    keys = [f"root/{name.format(n)}" for n in range(1000)]
    ask = Patient(Tree(keys, 20, cuts=True))
    found = Counter(o.id.key for o in FolderListing(ask, large).objects("root/"))
    assert found == Counter(keys)
    assert ask.cut.is_set()


def test_a_storage_that_loses_its_order_is_an_error() -> None:
    patient = Patient(Tree([f"root/{n:06d}" for n in range(1000)], 20, cuts=True))

    def ask(prefix: str, token: str, behind: str) -> FolderPart:
        part = patient(prefix, token, behind)
        return replace(part, objects=[info("root/1"), info("root/0")]) if behind else part

    with pytest.raises(IntegrityError, match="root/"):
        list(FolderListing(ask, large).objects("root/"))
    assert threads() == []


def test_one_without_order_is_never_cut() -> None:
    keys = [f"root/{n:06d}" for n in range(2000)]
    tree = Tree(keys, 20, cuts=True, order=lambda entry: entry[::-1])

    def ask(prefix: str, token: str, behind: str) -> FolderPart:
        assert not behind
        return tree.ask(prefix, token, behind)

    found = Counter(o.id.key for o in FolderListing(ask, large).objects("root/"))
    assert found == Counter(keys)


@given(names=st.lists(NAMES, min_size=2, unique=True), shown=st.lists(NAMES, max_size=5), data=st.data())
def test_a_cut_lies_between(names: list[str], shown: list[str], data: st.DataObject) -> None:
    low, high = sorted(data.draw(st.sampled_from(names)) for _ in range(2))
    space = KeySpace(shown)
    for end in (high, None):
        middle = space.middle(low, end)
        assert middle is None or (low < middle and (end is None or middle < end))


def test_cuts_halve() -> None:
    space = KeySpace(["0123456789"])
    assert space.middle("000999", "9") == "4"
    assert space.middle("4", "5") == "45"
    assert space.middle("000999", None) == "5"
    assert space.middle("9", "9") is None


def test_what_can_not_be_listed_so_is_listed_as_ever() -> None:
    listing = FolderListing(lambda prefix, token, behind: None, lambda prefix: iter([info("x")]))
    assert list(listing.objects("root/")) == [info("x")]


class Flat:
    """Lists the keys of a tree as S3 does without a delimiter, and counts the answers."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.answers = 0

    def __call__(self, prefix: str) -> Iterator[ObjectInfo]:
        keys = sorted(key for key in self.tree.keys if key.startswith(prefix))
        page = folder_listing.FLAT_OBJECTS
        for start in range(0, len(keys), page):
            self.answers += 1
            yield from map(info, keys[start : start + page])


def listed(keys: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Tree, Flat]:
    """Who was asked for them, once all have been listed, each once."""
    monkeypatch.setattr(folder_listing, "FLAT_OBJECTS", 100)
    tree = Tree(keys, 1000)
    flat = Flat(tree)
    found = Counter(o.id.key for o in FolderListing(tree.ask, flat).objects("root/"))
    assert found == Counter(keys)
    return tree, flat


@pytest.mark.parametrize("above", ["", "train/"])
def test_many_small_folders_take_a_call_an_answer(above: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"root/{above}{folder:04d}/{number}.tar" for folder in range(250) for number in range(2)]
    tree, flat = listed(keys, monkeypatch)
    assert flat.answers == 5
    assert sum(tree.asked.values()) == len(above.split("/"))  # the root, and the folder that has them


def test_large_folders_are_listed_side_by_side_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"root/{folder:02d}/{number:04d}.jpg" for folder in range(12) for number in range(40)]
    tree, flat = listed(keys, monkeypatch)
    assert flat.answers == 1  # by which that shows
    assert set(tree.asked) == {("root/", "|0"), *((f"root/{folder:02d}/", "|0") for folder in range(12))}


@given(keys=KEYS, page=st.integers(1, 5), shown=st.integers(1, 8), threads=st.integers(1, 3))
def test_everything_comes_once_partly_flat(keys: list[str], page: int, shown: int, threads: int) -> None:
    below = ["root/" + key for key in keys if not key.endswith("/")]
    tree = Tree(below, page)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_listing, "FLAT_OBJECTS", shown)
        patch.setattr(folder_listing, "THREADS", threads)
        found = Counter(o.id.key for o in FolderListing(tree.ask, Flat(tree)).objects("root/"))
    assert found == Counter(below)


def test_a_reader_who_has_enough_ends_a_flat_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_listing, "FLAT_OBJECTS", 10)
    # Below a folder of its own: the listing's threads have it.
    tree = Tree([f"root/x/{folder:05d}/0" for folder in range(500)], 1000)
    flat = Flat(tree)
    objects = FolderListing(tree.ask, flat).objects("root/")
    assert next(objects)
    objects.close()
    assert threads() == []
    assert flat.answers < 50


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("torchcache-listing")]


def test_an_error_comes_and_ends_it() -> None:
    tree = Tree([f"root/{folder}/{n}" for folder in range(20) for n in range(3)], 100)

    def ask(prefix: str, token: str, behind: str) -> FolderPart:
        if prefix == "root/7/":
            raise ServerUnavailable("S3 is away")
        return tree.ask(prefix, token, behind)

    with pytest.raises(ServerUnavailable, match="S3 is away"):
        list(FolderListing(ask, large).objects("root/"))
    assert threads() == []


def test_a_reader_who_has_enough_ends_it() -> None:
    tree = Tree([f"root/{folder}/{n}" for folder in range(300) for n in range(2)], 1000)
    objects = FolderListing(tree.ask, large).objects("root/")
    assert next(objects)
    objects.close()
    assert threads() == []
    assert len(tree.asked) < 301
