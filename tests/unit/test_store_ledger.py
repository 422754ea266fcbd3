"""Durable records: the old value or the new one, whatever fails."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from torchcache_server.store import OS
from torchcache_server.store.ledger import Ledger

from tests.unit.store_parts import FailingDisk, flip_bit


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


def test_no_flipped_bit_is_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "records"
    Ledger(OS, str(path)).put(b"key", b"value")
    (file,) = path.iterdir()
    good = file.read_bytes()
    for bit in range(8 * len(good)):
        flip_bit(file, bit // 8, bit % 8)
        assert dict(Ledger(OS, str(path)).items(b"")) == {}, f"bit {bit}"
        file.write_bytes(good)
    for size in range(len(good)):
        file.write_bytes(good[:size])
        assert dict(Ledger(OS, str(path)).items(b"")) == {}, f"{size} bytes"
    assert "is damaged" in caplog.text


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
