"""Durable records: the old value or the new one, whatever fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from torchcache_server.store import OS, DiskCalls
from torchcache_server.store.ledger import Ledger, read_record

from tests.unit.store_parts import FailingDisk, flip_bit
from torchcache.errors import ConfigurationError, IntegrityError


def test_values_are_there_for_the_next_one(tmp_path: Path) -> None:
    path = str(tmp_path / "records")
    ledger = Ledger(OS, path)
    ledger.put(b"a", b"1")
    ledger.put(b"b", b"2" * 100_000)
    ledger.put(b"a", b"3")
    ledger.delete(b"gone")
    assert dict(Ledger(OS, path).items(b"")) == {b"a": b"3", b"b": b"2" * 100_000}


@pytest.mark.parametrize("call", ["create", "pwritev", "fsync", "rename", "fsync_dir"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_put_that_fails_leaves_a_whole_value(tmp_path: Path, call: str, code: int) -> None:
    disk = FailingDisk()
    path = str(tmp_path / "records")
    ledger = Ledger(disk, path)
    ledger.put(b"a", b"old")
    disk.fail(call, code)
    with pytest.raises(OSError):
        ledger.put(b"a", b"new")
    with pytest.raises(OSError):
        ledger.put(b"other", b"new")
    disk.mend()
    # Once renamed, the new value is in place, though not known to be durable.
    values = {b"old"} if call != "fsync_dir" else {b"new"}
    assert ledger.get(b"a") in values
    after = dict(Ledger(OS, path).items(b""))
    assert after[b"a"] in values
    assert not list((tmp_path / "records").glob("*.tmp"))
    ledger.put(b"a", b"newer")
    assert ledger.get(b"a") == b"newer"


def test_a_half_written_file_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "records"
    Ledger(OS, str(path)).put(b"a", b"1")
    (path / "0123.record.tmp").write_bytes(b"half")
    assert dict(Ledger(OS, str(path)).items(b"")) == {b"a": b"1"}
    assert len(list(path.iterdir())) == 1


def both_copies(file: Path) -> list[int]:
    """Where the copies of a record start."""
    return [0, file.read_bytes().rindex(b"tcLEDGR2")]


def spoil_both(file: Path) -> None:
    for at in both_copies(file):
        flip_bit(file, at + 24, 3)


def test_no_flipped_bit_is_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """F6, I2: any bit of either copy: the value is read from the other, and doubled again."""
    path = tmp_path / "records"
    Ledger(OS, str(path)).put(b"key", b"value")
    (file,) = path.iterdir()
    good = file.read_bytes()
    copies = both_copies(file)
    length = len(good) - copies[1]
    for copy in copies:
        for bit in range(8 * length):
            flip_bit(file, copy + bit // 8, bit % 8)
            assert read_record(OS, str(file)).sound_copies == 1, f"bit {bit} at {copy}"
            assert dict(Ledger(OS, str(path)).items(b"")) == {b"key": b"value"}, f"bit {bit} at {copy}"
            assert file.read_bytes() == good
    assert "mended from the other" in caplog.text


@pytest.mark.parametrize("size", [0, 1, 4063, 4064, 4065, 20_000])
def test_one_bad_page_never_takes_both_copies(tmp_path: Path, size: int) -> None:
    """F8, F12, I2: zeros where a page was, at every page."""
    path = tmp_path / "records"
    Ledger(OS, str(path)).put(b"k" * 8, b"v" * size)
    (file,) = path.iterdir()
    good = file.read_bytes()
    assert len(good) % 4096 == (32 + size) % 4096
    for at in range(0, len(good), 4096):
        file.write_bytes(good[:at] + bytes(len(good[at : at + 4096])) + good[at + 4096 :])
        assert dict(Ledger(OS, str(path)).items(b"")) == {b"k" * 8: b"v" * size}, f"page at {at}"
        assert file.read_bytes() == good


def test_a_page_that_cannot_be_read_never_takes_both_copies(tmp_path: Path) -> None:
    """F12, I2: as `test_one_bad_page_never_takes_both_copies`, but the disk says so."""

    class BadPage(DiskCalls):
        bad = 0

        def pread(self, fd: int, size: int, offset: int) -> bytes:
            if offset <= self.bad < offset + size:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().pread(fd, size, offset)

    disk = BadPage()
    Ledger(OS, str(tmp_path / "records")).put(b"key", b"v" * 9000)
    (file,) = (tmp_path / "records").iterdir()
    for disk.bad in range(0, file.stat().st_size, 4096):
        reading = read_record(disk, str(file))
        assert (reading.value, reading.sound_copies) == (b"v" * 9000, 1)


def test_truncation_of_every_length(tmp_path: Path) -> None:
    """F7: as long as the first copy is whole, so is the value; below that the store says what it lost."""
    path = tmp_path / "records"
    Ledger(OS, str(path)).put(b"key", b"value")
    (file,) = path.iterdir()
    good = file.read_bytes()
    length = len(good) - both_copies(file)[1]
    for size in (*range(length), *range(length, 4096, 97), *range(4096, len(good))):
        file.write_bytes(good[:size])
        if size < length:
            with pytest.raises(ConfigurationError, match="is damaged"):
                Ledger(OS, str(path))
        else:
            assert dict(Ledger(OS, str(path)).items(b"")) == {b"key": b"value"}, f"{size} bytes"
            assert file.read_bytes() == good


def test_a_record_without_a_sound_copy_is_no_start(tmp_path: Path) -> None:
    """F6, I2, I6: leaving it out would drop the checkpoint it speaks of."""
    path = tmp_path / "records"
    ledger = Ledger(OS, str(path))
    ledger.put(b"a", b"1")
    ledger.put(b"b", b"2")
    for file in path.iterdir():
        spoil_both(file)
    before = {file: file.read_bytes() for file in path.iterdir()}
    first = min(before)
    with pytest.raises(ConfigurationError) as refused:
        Ledger(OS, str(path))
    assert f"{first} is damaged, and 1 more are" in str(refused.value)
    assert f"torchcache doctor --store {tmp_path} --repair" in str(refused.value)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


def test_a_record_that_turns_bad_in_service_is_an_error(tmp_path: Path) -> None:
    """F6: not None, which would mean that there never was one."""
    path = tmp_path / "records"
    ledger = Ledger(OS, str(path))
    ledger.put(b"a", b"1")
    (file,) = path.iterdir()
    flip_bit(file, 3)
    assert ledger.get(b"a") == b"1"
    assert read_record(OS, str(file)).sound_copies == 2, "mended on the way"
    spoil_both(file)
    with pytest.raises(IntegrityError, match=file.name):
        ledger.get(b"a")
    with pytest.raises(IntegrityError, match=file.name):
        list(ledger.items(b""))
    ledger.put(b"a", b"2")
    assert ledger.get(b"a") == b"2"


def test_a_record_under_another_name_is_damaged(tmp_path: Path) -> None:
    """F9."""
    path = tmp_path / "records"
    ledger = Ledger(OS, str(path))
    ledger.put(b"a", b"1")
    ledger.put(b"b", b"2")
    one, two = path.iterdir()
    two.write_bytes(one.read_bytes())
    with pytest.raises(ConfigurationError, match=two.name):
        Ledger(OS, str(path))


@pytest.mark.parametrize("other", ["folder", "fifo", "symlink", "empty"])
def test_what_is_no_file_is_damaged(tmp_path: Path, other: str) -> None:
    """F15: and never hangs."""
    path = tmp_path / "records"
    Ledger(OS, str(path)).put(b"a", b"1")
    (file,) = path.iterdir()
    moved = file.rename(tmp_path / file.name)
    match other:
        case "folder":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
        case "symlink":
            file.symlink_to(moved)
        case "empty":
            file.touch()
    with pytest.raises(ConfigurationError, match=f"{file.name} is damaged"):
        Ledger(OS, str(path))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_copy_that_cannot_be_mended_is_no_loss(
    tmp_path: Path, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """F10, F15: a full disk must not keep a store from starting."""
    path = tmp_path / "records"
    Ledger(OS, str(path)).put(b"a", b"1")
    (file,) = path.iterdir()
    flip_bit(file, 20)
    disk = FailingDisk()
    disk.fail("create", code)
    ledger = Ledger(disk, str(path))
    assert ledger.get(b"a") == b"1"
    assert "one sound copy left" in caplog.text


def test_writes_in_the_order_that_makes_them_durable(tmp_path: Path) -> None:
    """Bytes, fsync, name, fsync of the folder: each before the next."""
    order: list[str] = []

    class Recorder(FailingDisk):
        def _called(self, call: str, *arguments: object) -> None:
            if call in ("pwritev", "fsync", "rename", "fsync_dir", "unlink"):
                order.append(call)

    ledger = Ledger(Recorder(), str(tmp_path / "records"))
    order.clear()
    ledger.put(b"a", b"1")
    assert order == ["unlink", "pwritev", "fsync", "rename", "fsync_dir"]
    order.clear()
    ledger.delete(b"a")
    assert order == ["unlink", "fsync_dir"]
