"""The store's folder: whose it is, who uses it, and what lies in it."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from torchcache_server.store import OS, Store, folder, opening
from torchcache_server.store.identity import read_identity

from tests.unit.store_parts import CAPACITY, FailingDisk, chunk, fill, flip_bit, held
from torchcache.errors import ConfigurationError, TorchCacheError

IDENTITIES = ("store.json", "store-copy.json")


def open_store(path: Path) -> Store:
    return Store(path, capacity_bytes=CAPACITY)


def test_made_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    store = open_store(path)
    fill(store, "n", range(3))
    store.put_record(b"k", b"v")
    store.close()
    assert (path.stat().st_mode & 0o777) == 0o700
    for found in path.rglob("*"):
        assert found.stat().st_mode & 0o077 == 0, found


def test_in_use(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ConfigurationError, match=f"{tmp_path} is in use by another server"):
        open_store(tmp_path)
    fill(store, "n", range(1))
    store.close()
    open_store(tmp_path).close()


@pytest.mark.hostile("folders")
def test_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is not a folder"):
        open_store(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="can't be opened"):
        open_store(tmp_path / "file" / "below")


@pytest.mark.hostile("folders")
def test_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the id that the process sees is another: chown would need root."""
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigurationError, match="belongs to user"):
        open_store(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.hostile("folders")
def test_open_to_everyone(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigurationError, match="everyone may write"):
        open_store(tmp_path)


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("name", ["store.lock", "store.json", "store-copy.json", "clean", "index/data.mdb"])
def test_symlinks_are_not_followed(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    path = tmp_path / "store"
    (path / name).parent.mkdir(parents=True)
    (path / name).symlink_to(outside)
    with pytest.raises(ConfigurationError, match=str(path)):
        open_store(path)
    assert outside.read_text() == "untouched"


@pytest.mark.hostile("folders")
def test_a_symlinked_store_is_refused(tmp_path: Path) -> None:
    """F15: where it leads to can be changed while the store is open."""
    (tmp_path / "real").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigurationError, match=f"is a symlink: give the folder .* {tmp_path / 'real'}$"):
        open_store(tmp_path / "store")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="is a symlink"):
        open_store(tmp_path / "dangling")
    assert list((tmp_path / "real").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("name", ["segments", "records", "flags", "index", "spares", "damaged"])
def test_symlinked_folders_of_a_store_are_refused(tmp_path: Path, name: str) -> None:
    """F15: nothing behind the symlink is touched, neither by a new store nor by one that is to be emptied."""
    path, outside = tmp_path / "store", tmp_path / "outside"
    open_store(path).close()
    outside.mkdir()
    (outside / "kept").write_text("mine")
    if (path / name).exists():
        shutil.rmtree(path / name)
    (path / name).symlink_to(outside)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"{path / name} is a symlink, not a folder"):
            open_store(path)
        for identity in path.glob("store*.json"):
            identity.unlink()
    assert [file.name for file in outside.iterdir()] == ["kept"]


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("kind", ["folder", "fifo", "symlink"])
@pytest.mark.parametrize(
    "victim",
    [
        "store.json",
        "clean",
        "index/data.mdb",
        "flags/*",
        "records/*",
        "segments/*/*",
        "segments/*",
        "spares/x",
    ],
)
def test_what_is_no_file_is_refused(tmp_path: Path, victim: str, kind: str) -> None:
    """F15: with its name, and without hanging."""
    store = open_store(tmp_path / "store")
    fill(store, "n", range(3))
    store.pin("n", True)
    store.put_record(b"k", b"v")
    store.close()
    (tmp_path / "store" / "spares" / "x").touch()
    (path,) = (tmp_path / "store").glob(victim)
    moved = path.rename(tmp_path / path.name)
    match kind:
        case "folder" if victim == "segments/*":
            path.touch()
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "symlink":
            path.symlink_to(moved)
    with pytest.raises(ConfigurationError, match=f"{path} is a .*, not a f"):
        open_store(tmp_path / "store")
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    moved.rename(path)
    store = open_store(tmp_path / "store")
    assert held(store, 1)
    store.close()


def test_spares_do_not_outlive_a_start(tmp_path: Path) -> None:
    """I5."""
    open_store(tmp_path).close()
    (tmp_path / "spares" / "0001.segment").write_bytes(bytes(4096))
    open_store(tmp_path).close()
    assert list((tmp_path / "spares").iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["make_dir", "unlink", "fsync_dir"])
def test_a_disk_that_takes_nothing_is_said(tmp_path: Path, call: str, code: int) -> None:
    """F15: the calls are made to fail; the tests run as root, whom no mode keeps out."""
    open_store(tmp_path).close()
    disk = FailingDisk()
    disk.fail(call, code)
    with pytest.raises(ConfigurationError, match=f"{tmp_path} can't be opened: .*{os.strerror(code)}"):
        Store(tmp_path, capacity_bytes=CAPACITY, disk=disk)
    open_store(tmp_path).close()


def test_the_folders_above_a_new_store_are_durable(tmp_path: Path) -> None:
    """F3, I2: else a power cut takes the store with all that was acknowledged since."""
    synced: list[str] = []

    class Recorder(FailingDisk):
        def _called(self, call: str, *arguments: object) -> None:
            if call in ("make_dir", "fsync_dir"):
                synced.append(f"{call} {arguments[0]}")

    Store(tmp_path / "a" / "b", capacity_bytes=CAPACITY, disk=Recorder()).close()
    assert synced[:5] == [
        f"fsync_dir {tmp_path.parent}",  # a server that was killed may have made it
        f"make_dir {tmp_path}/a",
        f"fsync_dir {tmp_path}",
        f"make_dir {tmp_path}/a/b",
        f"fsync_dir {tmp_path}/a",
    ]


# ---- whose it is, and of which format ----


def write_identities(path: Path, content: str | None) -> None:
    for name in IDENTITIES:
        (path / name).unlink(missing_ok=True)
        if content is not None:
            (path / name).write_text(content)


@pytest.mark.parametrize("name", IDENTITIES)
def test_either_identity_is_enough(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """F6, I2: a server that lost its id takes its own claims for another's, and gives up the saves under them."""
    store = open_store(tmp_path)
    identity = store.server_id
    fill(store, "n", range(3))
    store.close()
    good = (tmp_path / name).read_bytes()
    damage = [good[:size] for size in range(0, len(good), 7)] + [bytes(len(good)), b"[]", b"{}", b"3"]
    for content in [*damage, None]:
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        store = open_store(tmp_path)
        assert (store.server_id, held(store, 1)) == (identity, True), content
        store.close()
        assert (tmp_path / name).read_bytes() == good
    assert "written anew" in caplog.text


def test_no_flipped_bit_of_an_identity_is_believed(tmp_path: Path) -> None:
    """F6, I2."""
    open_store(tmp_path).close()
    before = read_identity(OS, str(tmp_path))
    for bit in range(8 * (tmp_path / "store.json").stat().st_size):
        flip_bit(tmp_path / "store.json", bit // 8, bit % 8)
        found = read_identity(OS, str(tmp_path))
        assert found.server_id == before.server_id, f"bit {bit}"
        flip_bit(tmp_path / "store.json", bit // 8, bit % 8)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"format": "torchcache store 1", "server_id": "x"}),
        json.dumps({"format": "torchcache store 2"}),
        "not json",
        "[]",
        "",
    ],
)
def test_another_format_is_emptied(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    """F40. What isn't the store's own stays."""
    store = open_store(tmp_path)
    identity = store.server_id
    fill(store, "n", range(3))
    store.keep("n", True)
    store.keep("n", False)
    store.put_record(b"k", b"v")
    store.close()
    write_identities(tmp_path, content)
    (tmp_path / "server.log").write_text("mine")
    store = open_store(tmp_path)
    assert "is emptied" in caplog.text
    assert store.server_id != identity
    assert store.usage().segments == 0
    assert store.namespaces() == []
    assert list(store.records(b"")) == []
    assert store.lookup(chunk(1)) is None
    assert (tmp_path / "server.log").read_text() == "mine"
    store.close()


def test_an_older_version_that_has_been_here_is_noticed(tmp_path: Path) -> None:
    """F40: it knows nothing of the second identity."""
    store = open_store(tmp_path)
    identity = store.server_id
    fill(store, "n", range(3))
    store.close()
    content = json.dumps({"format": "torchcache store 1", "server_id": "x"})
    (tmp_path / "store.json").write_text(content)
    store = open_store(tmp_path)
    assert store.server_id not in (identity, "x")
    assert store.namespaces() == []
    store.close()


@pytest.mark.parametrize("lost", ["", "flags", "damaged"])
@pytest.mark.parametrize("content", ["{", '{"format": "torchcache store 1", "server_id": "x"}', None])
def test_another_format_is_refused_while_it_holds_what_must_be_kept(
    tmp_path: Path, content: str | None, lost: str
) -> None:
    """F40, I2: a store that may hold an acknowledged checkpoint is never emptied."""
    store = open_store(tmp_path)
    fill(store, "n", range(3))
    store.keep("n", True)
    store.put_record(b"save/x", b"v")
    store.close()
    identity = (tmp_path / "store.json").read_text()
    aside = tmp_path / "aside"
    match lost:
        case "flags":  # nobody knows any more what was kept
            (tmp_path / "flags").rename(aside)
        case "damaged":
            (tmp_path / "damaged").mkdir()
            (flag,) = (tmp_path / "flags").iterdir()
            flag.rename(tmp_path / "damaged" / f"flags-{flag.name}")
    write_identities(tmp_path, content)
    with pytest.raises(ConfigurationError, match="not have been uploaded"):
        open_store(tmp_path)
    write_identities(tmp_path, identity)
    if lost == "flags":
        aside.rename(tmp_path / "flags")
    store = open_store(tmp_path)
    assert store.lookup(chunk(1)) is not None
    store.close()


@pytest.mark.parametrize("name", ["records", "flags"])
def test_a_folder_that_said_what_is_kept_is_missed(tmp_path: Path, name: str) -> None:
    """F15, I2: without `records` every checkpoint would pass for one that was never committed."""
    store = open_store(tmp_path)
    fill(store, "n", range(3))
    store.close()
    (tmp_path / name).rmdir()
    with pytest.raises(ConfigurationError, match=f"has lost its folder '{name}'"):
        open_store(tmp_path)
    (tmp_path / name).mkdir(0o700)
    store = open_store(tmp_path)
    assert held(store, 1)
    store.drop("n")
    store.close()
    (tmp_path / name).rmdir()
    open_store(tmp_path).close()


def test_a_folder_with_other_files_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text("mine")
    open_store(tmp_path).close()
    assert (tmp_path / "server.log").read_text() == "mine"


def test_a_smaller_capacity_evicts_at_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for namespace in range(6):
        fill(store, f"n{namespace}", range(namespace * 8, namespace * 8 + 8), size=1 << 20)
    store.keep("n0", True)
    store.close()
    store = Store(tmp_path, capacity_bytes=CAPACITY // 4)
    assert store.usage().used_bytes <= CAPACITY // 4
    assert store.usage().evicted_chunks > 0
    assert all(store.contains(chunk(n)) for n in range(8)), "n0 is kept"
    store.close()


@pytest.mark.parametrize("part", [1 / 2, 0.0, 1 / 4])
def test_an_index_that_was_cut_is_not_trusted(tmp_path: Path, part: float) -> None:
    """F7, I4: LMDB would end the process by SIGBUS at every start, before anybody could say why."""
    store = open_store(tmp_path)
    fill(store, "n", range(1000), 100)
    store.close()
    index = tmp_path / "index" / "data.mdb"
    os.truncate(index, int(index.stat().st_size * part))
    store = open_store(tmp_path)
    assert all(held(store, n, 100) for n in range(1000))
    store.close()


def test_no_flipped_bit_of_the_index_is_trusted(tmp_path: Path) -> None:
    """F6, I2: LMDB has no checksums: a chunk that must be kept would be gone, or the process."""
    store = open_store(tmp_path)
    fill(store, "n", range(300), 100)
    store.close()
    random = Random(5)
    index = tmp_path / "index" / "data.mdb"
    for _ in range(60):
        flip_bit(index, random.randrange(index.stat().st_size), random.randrange(8))
        store = open_store(tmp_path)
        assert all(held(store, n, 100) for n in range(300))
        store.close()


def test_an_index_as_it_was_left_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every start would read all segments."""
    store = open_store(tmp_path)
    fill(store, "n", range(300), 100)
    store.close()
    monkeypatch.setattr(folder, "remove_index", lambda _: pytest.fail("the index is thrown away"))
    monkeypatch.setattr(opening, "remove_index", lambda _: pytest.fail("the index is thrown away"))
    store = open_store(tmp_path)
    assert all(held(store, n, 100) for n in range(300))
    store.close()


@pytest.mark.hostile("folders")
@pytest.mark.parametrize("name", ["segments", "segments/*", "records", "flags", "spares"])
def test_a_symlink_in_the_place_of_a_folder_is_not_followed_by_an_open_store(
    tmp_path: Path, name: str
) -> None:
    """F15: not even one to a folder in which all names are there. What is held is served meanwhile, and after."""
    path, outside = tmp_path / "store", tmp_path / "outside"
    store = open_store(path)
    fill(store, "n", range(3))
    store.pin("n", True)
    store.put_record(b"k", b"v")
    (folder,) = path.glob(name)
    moved = folder.rename(tmp_path / "moved")
    shutil.copytree(moved, outside)
    (outside / "0000000000000001.segment").touch()
    folder.symlink_to(outside)
    before = everything_in(outside)
    for work in (
        lambda: fill(store, "n", range(3, 6)),
        lambda: fill(store, "other", range(6, 16), size=2 << 20),
        lambda: store.put_record(b"k", b"w"),
        lambda: store.delete_record(b"k"),
        lambda: store.pin("n", False),
        lambda: store.pin("other", True),
        lambda: store.sync("n"),
        lambda: store.evict("other"),
        store.tidy,
    ):
        with suppress(TorchCacheError):
            work()
    assert everything_in(outside) == before
    assert all(held(store, number) for number in range(3))
    folder.unlink()
    moved.rename(folder)
    fill(store, "n", range(16, 18))
    store.close()
    store = open_store(path)
    assert held(store, 0)
    store.close()


def test_without_a_descriptor_left_what_is_evicted_goes(tmp_path: Path) -> None:
    """F14, I5: else the store would think that it had the room, and a restart bring back what was dropped."""
    store = open_store(tmp_path / "store")
    fill(store, "n", range(4), size=3 << 20)
    segments = list((tmp_path / "store" / "segments").glob("*/*"))
    assert segments
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    taken = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        assert store.evict("n") > 0
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not any(segment.exists() for segment in segments)
    store.close()


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_store_that_is_moved_while_it_is_open_stays_the_one_that_is_meant(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    fill(store, "n", range(3))
    (tmp_path / "store").rename(tmp_path / "moved")
    (tmp_path / "store").mkdir()
    store.put_record(b"k", b"v")
    fill(store, "other", range(3, 6))
    store.close()
    assert not list((tmp_path / "store").iterdir())
    store = open_store(tmp_path / "moved")
    assert all(held(store, number) for number in range(6))
    assert store.get_record(b"k") == b"v"
    store.close()
