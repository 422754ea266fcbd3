"""fsspec's contract over a pool in memory. The real pool is met in tests/integration."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import fsspec
import pytest
from fsspec.utils import get_protocol

from tests.collected import until_collected
from tests.unit.memory_pool import MemoryPool
from torchcache.errors import ConfigurationError, ObjectChanged, ObjectNotFound, ServerUnavailable
from torchcache.filesystem import TorchCacheFileSystem
from torchcache.filesystem.reading import FIRST_READ_BYTES, READ_AHEAD_BYTES
from torchcache.filesystem.writing import SPOOL_MEMORY_BYTES

KEYS = ["a.txt", "d/x.bin", "d/e/y.bin", "zz/1", "zz/2"]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> MemoryPool:
    pool = MemoryPool()
    for key in KEYS:
        pool.put(f"s3://b/{key}", key.encode() * 10)
    monkeypatch.setattr(TorchCacheFileSystem, "pool", property(lambda self: self._address))
    return pool


@pytest.fixture
def fs(pool: MemoryPool) -> TorchCacheFileSystem:
    return TorchCacheFileSystem(pool)


class TestWhatIsThere:
    def test_ls_shows_under_stores_then_folders_and_files(self, fs: TorchCacheFileSystem) -> None:
        assert fs.ls("torchcache://", detail=False) == ["file", "s3"]
        assert fs.ls("torchcache://s3/b/", detail=False) == ["s3/b/a.txt", "s3/b/d", "s3/b/zz"]
        assert {e["name"]: e["type"] for e in fs.ls("s3/b")} == {
            "s3/b/a.txt": "file",
            "s3/b/d": "directory",
            "s3/b/zz": "directory",
        }

    def test_ls_of_a_file_is_the_file(self, fs: TorchCacheFileSystem) -> None:
        assert fs.ls("s3/b/a.txt", detail=False) == ["s3/b/a.txt"]

    def test_ls_of_nothing_raises(self, fs: TorchCacheFileSystem) -> None:
        with pytest.raises(FileNotFoundError, match="torchcache://s3/b/nothing"):
            fs.ls("s3/b/nothing")

    def test_info_tells_size_and_version(self, fs: TorchCacheFileSystem, pool: MemoryPool) -> None:
        info = fs.info("torchcache://s3/b/d/x.bin")
        assert (info["size"], info["type"]) == (70, "file")
        assert info["version"] == pool.stat("s3://b/d/x.bin").id.version
        assert (
            fs.info("s3/b/d")["type"]
            == fs.info("s3/b")["type"]
            == fs.info("s3")["type"]
            == fs.info("")["type"]
            == "directory"
        )

    def test_exists_is_false_only_where_nothing_is(self, fs: TorchCacheFileSystem, pool: MemoryPool) -> None:
        assert [fs.exists(p) for p in ("s3/b/d", "s3/b/a.txt", "s3/b/q", "s3/other/q")] == [
            True,
            True,
            False,
            False,
        ]
        assert (fs.isfile("s3/b/a.txt"), fs.isfile("s3/b/d"), fs.isdir("s3/b/d")) == (True, False, True)

        def unreachable(uri: str) -> None:
            raise ServerUnavailable("the server is gone")

        pool.stat = unreachable  # type: ignore[method-assign, assignment]
        with pytest.raises(ServerUnavailable):
            fs.exists("s3/b/a.txt")

    def test_an_unknown_under_store_is_named(self, fs: TorchCacheFileSystem) -> None:
        with pytest.raises(ConfigurationError, match="gcs"):
            fs.exists("gcs/b/a.txt")

    def test_find_and_glob_and_walk(self, fs: TorchCacheFileSystem) -> None:
        assert fs.find("s3/b") == sorted(f"s3/b/{key}" for key in KEYS)
        assert fs.find("s3/b", maxdepth=1) == ["s3/b/a.txt"]
        assert fs.find("s3/b/d", withdirs=True) == ["s3/b/d", "s3/b/d/e", "s3/b/d/e/y.bin", "s3/b/d/x.bin"]
        assert fs.find("s3/b/a.txt") == ["s3/b/a.txt"]
        assert fs.find("s3/none/at/all") == []
        assert fs.glob("torchcache://s3/b/**/*.bin") == ["s3/b/d/e/y.bin", "s3/b/d/x.bin"]
        assert fs.glob("s3/b/z?") == ["s3/b/zz"]
        assert [folder for folder, _, _ in fs.walk("s3/b")] == ["s3/b", "s3/b/d", "s3/b/d/e", "s3/b/zz"]
        assert fs.du("s3/b/zz") == 80

    def test_an_object_that_marks_a_folder_is_a_folder(
        self, fs: TorchCacheFileSystem, pool: MemoryPool
    ) -> None:
        pool.put("s3://b/empty/", b"")
        pool.put("s3://b/d/", b"")
        assert fs.isdir("s3/b/empty")
        assert fs.ls("s3/b/empty") == []
        assert fs.ls("s3/b/d", detail=False) == ["s3/b/d/e", "s3/b/d/x.bin"]

    def test_a_more_particular_under_store_keeps_the_paths_asked_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TorchCacheFileSystem, "pool", property(lambda self: self._address))
        pool = MemoryPool({"s3": "s3://", "data": "s3://b/data"})
        pool.put("s3://b/data/x/1", b"one")
        fs = TorchCacheFileSystem(pool)
        assert fs.find("s3/b/data") == ["s3/b/data/x/1"]
        assert fs.find("data/x") == ["data/x/1"]
        assert fs.cat("s3/b/data/x/1") == fs.cat("data/x/1") == b"one"


class TestReading:
    def test_cat_and_slices(self, fs: TorchCacheFileSystem) -> None:
        assert fs.cat("torchcache://s3/b/zz/1") == b"zz/1" * 10
        assert fs.cat_file("s3/b/zz/1", 2, 6) == b"/1zz"
        assert fs.cat_file("s3/b/zz/1", -3) == b"z/1"
        assert fs.cat_file("s3/b/zz/1", 30, 10) == b""
        assert fs.cat("s3/b/*/?") == {"s3/b/zz/1": b"zz/1" * 10, "s3/b/zz/2": b"zz/2" * 10}
        assert list(fs.cat("s3/b/d", recursive=True)) == ["s3/b/d/e/y.bin", "s3/b/d/x.bin"]

    def test_cat_ranges_is_one_call(self, fs: TorchCacheFileSystem, pool: MemoryPool) -> None:
        paths = ["s3/b/zz/1", "torchcache://s3/b/zz/2", "s3/b/zz/1", "s3/b/none"]
        first, second, third, missing = fs.cat_ranges(paths, [0, 1, -2, 0], [4, 3, None, 9])
        assert (first, second, third) == (b"zz/1", b"z/", b"/1")
        assert isinstance(missing, ObjectNotFound)
        assert len(pool.reads) == 1
        with pytest.raises(ObjectNotFound):
            fs.cat_ranges(paths, 0, 1, on_error="raise")

    @pytest.mark.parametrize("size", [0, 1, FIRST_READ_BYTES + 1, READ_AHEAD_BYTES + 3])
    def test_a_file_reads_like_a_file(self, fs: TorchCacheFileSystem, pool: MemoryPool, size: int) -> None:
        data = bytes(range(256)) * (size // 256 + 1)
        data = data[:size]
        pool.put("s3://b/big", data)
        local = io.BytesIO(data)
        with fs.open("torchcache://s3/b/big") as file:
            assert file.size == size
            for offset, length in [
                (0, 10),
                (size // 2, 70_000),
                (size - 1, 5),
                (3, -1),
                (size + 5, 3),
                (0, size),
            ]:
                assert file.seek(max(0, offset)) == local.seek(max(0, offset))
                assert file.read(length) == local.read(length)
            assert file.seek(-min(size, 7), io.SEEK_END) == max(0, size - 7)
            assert file.read() == data[-7:]
            assert file.readline() == b""
            file.seek(0)
            buffer = bytearray(size)
            assert file.readinto(buffer) == size
            assert buffer == data

    def test_read_ahead_is_bounded_and_grows_only_going_straight(
        self, fs: TorchCacheFileSystem, pool: MemoryPool
    ) -> None:
        pool.put("s3://b/big", bytes(8 * READ_AHEAD_BYTES))
        with fs.open("s3/b/big") as file:
            for _ in range(4 * READ_AHEAD_BYTES // 65536):
                file.read(65536)
            ahead = [extent.length for [extent] in pool.reads]
            assert ahead[0] == FIRST_READ_BYTES
            assert max(ahead) == READ_AHEAD_BYTES
            assert len(ahead) < 10
            pool.reads.clear()
            file.seek(6 * READ_AHEAD_BYTES)
            file.read(10)
            assert [extent.length for [extent] in pool.reads] == [FIRST_READ_BYTES]

    def test_an_open_file_keeps_its_version(self, fs: TorchCacheFileSystem, pool: MemoryPool) -> None:
        with fs.open("s3/b/a.txt") as file:
            pool.put("s3://b/a.txt", b"another")
            with pytest.raises(ObjectChanged):
                file.read()
        assert fs.cat("s3/b/a.txt") == b"another"

    def test_a_missing_file_raises_on_open(self, fs: TorchCacheFileSystem) -> None:
        with pytest.raises(FileNotFoundError):
            fs.open("s3/b/none")

    def test_text_and_compression(self, fs: TorchCacheFileSystem) -> None:
        with fs.open("s3/b/t.txt.gz", "wt", compression="infer", encoding="utf-8") as file:
            file.write("grüße\n")
        assert fs.cat("s3/b/t.txt.gz")[:2] == b"\x1f\x8b"
        with fs.open("s3/b/t.txt.gz", "rt", compression="infer", encoding="utf-8") as file:
            assert file.read() == "grüße\n"


class TestWriting:
    @pytest.mark.parametrize("size", [0, 10, SPOOL_MEMORY_BYTES + 1])
    def test_is_visible_whole_on_close_and_not_before(self, fs: TorchCacheFileSystem, size: int) -> None:
        data = b"\x07" * size
        with fs.open("torchcache://s3/b/new", "wb") as file:
            file.write(data)
            assert not fs.exists("s3/b/new")
        assert fs.cat("s3/b/new") == data

    def test_an_exception_discards(self, fs: TorchCacheFileSystem) -> None:
        for mode, data, compression in [
            ("wb", b"1", None),
            ("wt", "1", None),
            ("wb", b"1", "gzip"),
            ("w", "1", "xz"),
        ]:
            with (
                pytest.raises(RuntimeError, match="in the middle"),
                fs.open("s3/b/new", mode, compression=compression) as file,
            ):
                file.write(data)
                raise RuntimeError("in the middle")
            assert not fs.exists("s3/b/new")

    def test_a_file_that_was_lost_is_discarded_with_a_warning(self, fs: TorchCacheFileSystem) -> None:
        file = fs.open("s3/b/new", "wb")
        file.write(b"1")
        with pytest.warns(ResourceWarning, match="not closed") as warned:
            del file
            assert until_collected(lambda: bool(warned.list))
        assert not fs.exists("s3/b/new")

    def test_closing_twice_publishes_once(self, fs: TorchCacheFileSystem, pool: MemoryPool) -> None:
        file = fs.open("s3/b/new", "wb")
        file.write(b"1")
        file.close()
        pool.delete("s3://b/new")
        file.close()
        assert not fs.exists("s3/b/new")
        with pytest.raises(ValueError, match="closed"):
            file.write(b"2")

    def test_a_written_file_can_be_sought_and_has_a_descriptor(self, fs: TorchCacheFileSystem) -> None:
        with fs.open("s3/b/new", "wb") as file:
            file.write(b"0123456789")
            file.seek(2)
            file.write(b"xx")
            assert file.tell() == 4
            assert file.fileno() >= 0
            file.truncate(6)
        assert fs.cat("s3/b/new") == b"01xx45"

    def test_create_only(self, fs: TorchCacheFileSystem, pool: MemoryPool) -> None:
        with pytest.raises(FileExistsError):
            fs.open("s3/b/a.txt", "xb")
        file = fs.open("s3/b/new", "xb")
        file.write(b"mine")
        pool.put("s3://b/new", b"another writer's")
        with pytest.raises(FileExistsError):
            file.close()
        assert fs.cat("s3/b/new") == b"another writer's"
        with pytest.raises(FileExistsError):
            fs.pipe_file("s3/b/new", b"mine", mode="create")

    def test_append_is_refused(self, fs: TorchCacheFileSystem) -> None:
        with pytest.raises(io.UnsupportedOperation, match=r"'ab'.*written whole"):
            fs.open("s3/b/a.txt", "ab")

    def test_transactions(self, fs: TorchCacheFileSystem) -> None:
        with fs.transaction:
            with fs.open("s3/b/t1", "wb") as file:
                file.write(b"1")
            assert not fs.exists("s3/b/t1")
        assert fs.cat("s3/b/t1") == b"1"
        with pytest.raises(RuntimeError), fs.transaction:
            with fs.open("s3/b/t2", "wb") as file:
                file.write(b"2")
            raise RuntimeError
        assert not fs.exists("s3/b/t2")

    def test_pipe_cp_mv_rm(self, fs: TorchCacheFileSystem) -> None:
        fs.pipe({"torchcache://s3/b/p": b"piped"})
        fs.cp("s3/b/p", "s3/b/q")
        assert fs.cat("s3/b/q") == b"piped"
        fs.mv("torchcache://s3/b/d", "torchcache://s3/b/moved", recursive=True)
        assert fs.find("s3/b/d") == []
        assert fs.cat("s3/b/moved/e/y.bin") == b"d/e/y.bin" * 10
        fs.rename("s3/b/q", "s3/b/r")
        assert not fs.exists("s3/b/q")
        with pytest.raises(IsADirectoryError):
            fs.rm("s3/b/zz")
        with pytest.raises(FileNotFoundError):
            fs.rm("s3/b/none")
        fs.rm(["s3/b/zz", "torchcache://s3/b/moved"], recursive=True)
        assert fs.find("s3/b") == ["s3/b/a.txt", "s3/b/p", "s3/b/r"]

    def test_folders_need_not_be_made(self, fs: TorchCacheFileSystem) -> None:
        fs.makedirs("s3/b/new/folder", exist_ok=True)
        fs.mkdir("s3/b/new")
        assert not fs.exists("s3/b/new")
        fs.pipe("s3/b/new/folder/x", b"")
        assert fs.isdir("s3/b/new/folder")
        fs.rmdir("s3/b/new/folder")

    def test_put_and_get(self, fs: TorchCacheFileSystem, tmp_path: Path) -> None:
        (tmp_path / "up").write_bytes(b"up")
        fs.put(str(tmp_path / "up"), "s3/b/up")
        fs.get("s3/b/up", str(tmp_path / "down"))
        assert (tmp_path / "down").read_bytes() == b"up"


def test_it_is_registered_and_pickles_without_connecting() -> None:
    fs = fsspec.filesystem("torchcache", pool="127.0.0.1:1")
    assert isinstance(fs, TorchCacheFileSystem)
    assert get_protocol("torchcache://s3/b/x") == "torchcache"
    again = pickle.loads(pickle.dumps(fs))
    assert again == fs
    assert again.storage_options == {"pool": "127.0.0.1:1"}
