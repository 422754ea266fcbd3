"""What is POSIX's alone: paths, symlinks and special files; the rest is in the conformance suite."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchcache_server.understore import create, posix, posix_files
from torchcache_server.understore.posix import PosixUnderStore
from torchcache_server.understore.posix_files import TEMPORARY_PREFIX, Root, locked
from torchcache_server.understore.posix_walk import walk

from torchcache.errors import ConfigurationError, DeadlineExceeded, ObjectChanged, ObjectNotFound, OutOfSpace
from torchcache.model import ByteRange, ObjectInfo
from torchcache.save_names import CLAIM_NAME


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def files(root: Path) -> PosixUnderStore:
    return PosixUnderStore("files", f"file://{root}")


def soon() -> float:
    return time.monotonic() + 60


def put(files: PosixUnderStore, key: str, data: bytes, replaces: str | None = None) -> ObjectInfo:
    return files.write(key, iter([memoryview(data)]), len(data), replaces=replaces, deadline=soon())


def get(files: PosixUnderStore, key: str) -> bytes:
    info = files.stat(key, deadline=soon())
    return bytes(files.read(info, ByteRange(0, info.size), deadline=soon()))


def keys(files: PosixUnderStore, prefix: str = "", start_after: str = "", limit: int = 1000) -> list[str]:
    page = files.list(prefix, start_after=start_after, limit=limit, deadline=soon())
    return [info.id.key for info in page.objects]


@pytest.mark.parametrize(
    "uri", ["file://", "file://host/a", "file:///a/../b", "file://a", "/a", "file:///a//b"]
)
def test_refuses_what_is_no_folder(uri: str) -> None:
    with pytest.raises(ConfigurationError, match=r"write file:///absolute/path"):
        PosixUnderStore("files", uri)


@pytest.mark.parametrize(
    ("name", "uri"), [("samples", "s3://"), ("a/b", "s3://"), ("", "s3://"), ("x", "gs://b"), ("x", "b")]
)
def test_create_refuses_what_can_not_be_meant(name: str, uri: str) -> None:
    with pytest.raises(ConfigurationError):
        create(name, uri)


def test_the_root_may_be_the_file_system(root: Path) -> None:
    files = PosixUnderStore("files", "file:///")
    (root / "a").write_bytes(b"data")
    assert files.uri == "file:///"
    assert get(files, f"{root}/a".lstrip("/")) == b"data"
    assert keys(files, f"{root}/".lstrip("/")) == [f"{root}/a".lstrip("/")]


@pytest.mark.parametrize("key", ["/etc/passwd", "a//b", "a/", "//"])
def test_keys_are_plain_relative_paths(files: PosixUnderStore, key: str) -> None:
    for call in (lambda: files.stat(key, deadline=soon()), lambda: put(files, key, b"x")):
        with pytest.raises(ConfigurationError, match="empty segment"):
            call()


def test_symlinks_within_the_root_are_followed(files: PosixUnderStore, root: Path) -> None:
    (root / "real").mkdir()
    (root / "real" / "a").write_bytes(b"data")
    (root / "folder").symlink_to("real")
    (root / "file").symlink_to(root / "real" / "a")
    (root / "real" / "loop").symlink_to("..")
    (root / "dangling").symlink_to("nowhere")
    assert get(files, "folder/a") == get(files, "file") == b"data"
    assert keys(files) == ["file", "folder/a", "real/a"]


@pytest.mark.hostile("folders")
def test_symlinks_out_of_the_root_are_refused(files: PosixUnderStore, root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "rootless").mkdir()  # Its path begins as the root's does.
    (root / "file").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    (root / "neighbour").symlink_to(tmp_path / "rootless")
    for call in (
        lambda: files.stat("file", deadline=soon()),
        lambda: files.stat("folder/secret", deadline=soon()),
        lambda: put(files, "folder/new", b"x"),
        lambda: put(files, "neighbour/new", b"x"),
        lambda: put(files, "neighbour/deeper/new", b"x"),
        lambda: files.delete("folder/secret", deadline=soon()),
    ):
        with pytest.raises(
            ConfigurationError, match=r"leads out of file:.* configure an under-store for the place"
        ):
            call()
    assert keys(files) == keys(files, "folder/") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "rootless", "secret"]
    assert list((tmp_path / "rootless").iterdir()) == []


@pytest.mark.hostile("folders")
def test_a_symlink_is_replaced_and_not_written_through(
    files: PosixUnderStore, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (root / "a").symlink_to(tmp_path / "precious")
    put(files, "a", b"data")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert get(files, "a") == b"data"


def test_what_a_killed_writer_left_goes_with_the_next_write(
    files: PosixUnderStore, root: Path, tmp_path: Path
) -> None:
    """F1, I5. A writer that lives keeps its file, and nobody's else is touched."""
    (root / "run").mkdir()
    left = root / "run" / f"{TEMPORARY_PREFIX}left"
    left.write_bytes(b"half")
    (root / "run" / ".torchcache-other").write_bytes(b"a user's")
    (tmp_path / "precious").write_bytes(b"precious")
    (root / "run" / f"{TEMPORARY_PREFIX}link").symlink_to(tmp_path / "precious")
    os.mkfifo(root / "run" / f"{TEMPORARY_PREFIX}fifo")

    def parts() -> Iterator[memoryview]:
        (writing,) = (
            p for p in (root / "run").glob(f"{TEMPORARY_PREFIX}*") if p.is_file() and not p.is_symlink()
        )
        put(PosixUnderStore("other", f"file://{root}"), "run/b", b"b")
        assert writing.exists(), "swept by another server while it was written"
        yield memoryview(b"a")

    files.write("run/a", parts(), 1, replaces=None, deadline=soon())
    assert not left.exists()
    assert (get(files, "run/a"), get(files, "run/b")) == (b"a", b"b")
    assert (root / "run" / ".torchcache-other").exists()
    assert (tmp_path / "precious").read_bytes() == b"precious"


CLAIM = f"run/step/{CLAIM_NAME}"


def delete(files: PosixUnderStore, key: str) -> None:
    files.delete(key, deadline=soon())


def test_the_folder_of_a_deleted_checkpoint_goes_with_its_claim(files: PosixUnderStore, root: Path) -> None:
    """Not the folder above, nor what isn't empty; nor a folder for any other file."""
    for key in (CLAIM, "run/step/__0_0.distcp", f"run/other/{CLAIM_NAME}", "run/other/a", "data/a"):
        put(files, key, b"1")
    delete(files, "run/step/__0_0.distcp")
    delete(files, "data/a")
    delete(files, f"run/other/{CLAIM_NAME}")
    assert {path.name for path in root.rglob("*")} == {"a", "data", "other", "run", "step", CLAIM_NAME}
    delete(files, CLAIM)
    delete(files, CLAIM)  # gone with its folder: that is fine
    assert not (root / "run/step").exists()
    assert (root / "run/other/a").exists()
    put(files, CLAIM, b"1")
    assert get(files, CLAIM) == b"1"


def test_the_root_and_what_a_symlink_leads_to_stay(files: PosixUnderStore, root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "linked").symlink_to("elsewhere")
    for key in (CLAIM_NAME, f"linked/{CLAIM_NAME}"):
        put(files, key, b"1")
        delete(files, key)
    assert sorted(path.name for path in root.iterdir()) == ["elsewhere", "linked"]


@pytest.mark.parametrize("moment", ["opened", "entered"])
def test_a_writer_whose_folder_is_removed_makes_it_anew(
    files: PosixUnderStore, root: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Between its look into the folder and its own file there, or right after it made the folder."""
    removals = iter([*range(3)])

    def remove(*_: object) -> None:
        if next(removals, None) is not None:
            (root / "run/step").rmdir()

    if moment == "opened":
        checks = PosixUnderStore._check_replaces
        monkeypatch.setattr(PosixUnderStore, "_check_replaces", lambda *given: (checks(*given), remove())[0])
    else:
        monkeypatch.setattr(posix_files, "_open_up_folder", remove_named(remove))
    put(files, "run/step/a", b"data", replaces="")
    assert get(files, "run/step/a") == b"data"
    assert next(removals, None) is None
    assert [path.name for path in (root / "run/step").iterdir()] == ["a"]


def remove_named(remove: Callable[[], None]) -> Callable[[int, str, int | None], None]:
    """In the place of `_open_up_folder`: as if another removed the folder as soon as it is there."""
    return lambda _, name, __: remove() if name == "step" else None


def test_a_folder_that_goes_while_it_is_listed_has_nothing(files: PosixUnderStore, root: Path) -> None:
    for key in ("run/1/a", "run/2/a", "run/3/a"):
        put(files, key, b"1")
    listed = walk(Root(str(root)), "run/", "")
    assert next(listed)[0] == "run/1/a"
    shutil.rmtree(root / "run/2")
    assert [key for key, _ in listed] == ["run/3/a"]


def test_writers_and_deletions_of_one_folder_meet_no_error(root: Path) -> None:
    """Four threads that write and delete there, each by an under-store of its own, as servers have.

    A try of one fails only by a removal of another: of those there are fewer than tries.
    """
    rounds = posix._TRIES // 4

    def work(number: int) -> int:
        files = PosixUnderStore("files", f"file://{root}")
        name = f"run/step/{number}{CLAIM_NAME}"
        for _ in range(rounds):
            put(files, name, b"1", replaces="")
            keys(files, "run/")
            delete(files, name)
        return number

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [*range(4)]
    assert [path.name for path in root.rglob("*")] == ["run"]


@pytest.mark.hostile("folders")
def test_special_files_do_not_hang_anybody(files: PosixUnderStore, root: Path) -> None:
    os.mkfifo(root / "fifo")
    with pytest.raises(ObjectNotFound, match="fifo is not a file"):
        files.stat("fifo", deadline=soon())
    assert keys(files) == []


def test_a_folder_is_no_object(files: PosixUnderStore, root: Path) -> None:
    (root / "folder").mkdir()
    with pytest.raises(ObjectNotFound, match="folder is not a file"):
        files.stat("folder", deadline=soon())
    with pytest.raises(ConfigurationError, match="a folder is in the way"):
        put(files, "folder", b"x")
    put(files, "file", b"x")
    with pytest.raises(ConfigurationError, match="a file is in the way of a folder"):
        put(files, "file/a", b"x")
    with pytest.raises(ObjectNotFound, match="file/a"):
        files.stat("file/a", deadline=soon())


def test_a_rewrite_is_another_version_whatever_the_clock_says(
    files: PosixUnderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F22: size and clock are the same; the version must not be."""
    monkeypatch.setattr(posix.time, "time_ns", lambda: 1_700_000_000_000_000_000)
    versions = [put(files, "a", b"data").id.version for _ in range(4)]
    assert len(set(versions)) == 4
    assert files.stat("a", deadline=soon()).id.version == versions[-1]


def test_a_write_in_place_amid_a_read_is_noticed(
    files: PosixUnderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F26."""
    info = put(files, "a", b"data" * 100)
    read_into = posix._read_into

    def swap(*arguments: object) -> int:
        (root / "a").write_bytes(b"DATA" * 100)
        return read_into(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(posix, "_read_into", swap)
    with pytest.raises(ObjectChanged, match="a was overwritten"):
        files.read(info, ByteRange(0, 400), deadline=soon())


def test_a_failed_write_leaves_nothing(files: PosixUnderStore, root: Path) -> None:
    def pieces() -> Iterator[memoryview]:
        yield memoryview(b"12")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutOfSpace, match="make room in the under-store"):
        files.write("a", pieces(), 5, replaces=None, deadline=soon())
    assert list(root.iterdir()) == []


def test_what_is_being_written_is_not_listed(files: PosixUnderStore, root: Path) -> None:
    seen: list[int] = []

    def pieces() -> Iterator[memoryview]:
        yield memoryview(b"12")
        seen.extend([len(list(root.iterdir())), len(keys(files))])

    files.write("a", pieces(), 2, replaces=None, deadline=soon())
    assert seen == [1, 0]


def test_a_writer_waits_for_the_lock_up_to_its_deadline(files: PosixUnderStore, root: Path) -> None:
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with (
            locked(folder, "another", soon()),
            pytest.raises(DeadlineExceeded, match=r"locked up to the deadline|passed while"),
        ):
            files.write("a", iter([memoryview(b"1")]), 1, replaces=None, deadline=time.monotonic() + 0.1)
        assert list(root.iterdir()) == []
    finally:
        os.close(folder)


def test_a_name_that_is_not_unicode_is_told(files: PosixUnderStore, root: Path) -> None:
    (Path(os.fsdecode(os.fsencode(root) + b"/\xff"))).write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="is not UTF-8; rename the file"):
        keys(files)


_NAMES = st.sampled_from(["a", "a-", "a.b", "a0", "b", "B", "é", "日", "~", "!"])
_TREES = st.sets(st.lists(_NAMES, min_size=1, max_size=3).map(tuple), max_size=25)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
    max_examples=40,
)
@given(
    tree=_TREES, prefix=st.sampled_from(["", "a", "a/", "a-", "a/a/", "b/!", "é/"]), limit=st.integers(1, 5)
)
def test_listings_are_bytewise_complete_and_pageable(
    tmp_path_factory: pytest.TempPathFactory, tree: set[tuple[str, ...]], prefix: str, limit: int
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for parts in tree:
        root.joinpath(*(f"{part}_" for part in parts[:-1])).mkdir(parents=True, exist_ok=True)
        root.joinpath(*(f"{part}_" for part in parts[:-1]), parts[-1]).write_bytes(b"")
    wanted_prefix = prefix.replace("/", "_/")
    every = ["/".join([*(f"{part}_" for part in parts[:-1]), parts[-1]]) for parts in tree]
    expected = sorted((key for key in every if key.startswith(wanted_prefix)), key=str.encode)
    files = PosixUnderStore("files", f"file://{root}")
    assert keys(files, wanted_prefix) == expected
    found: list[str] = []
    while page := keys(files, wanted_prefix, found[-1] if found else "", limit):
        assert len(page) <= limit
        found += page
    assert found == expected
