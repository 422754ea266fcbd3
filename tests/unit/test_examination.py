"""What `torchcache doctor` finds in a store, what it repairs, and what it must never do."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from torchcache_server.cache.save_records import encode_save
from torchcache_server.cache.slots import Slots
from torchcache_server.process.examination import Advance, Report, examine
from torchcache_server.store import OS, Store
from torchcache_server.store.reading_disk import ReadingDisk

from tests.unit.damaged_store import (
    BEYOND_REPAIR,
    DATASET,
    KEY,
    NAMESPACE,
    REPAIRABLE,
    SAVE_ID,
    SHARD_BYTES,
    SIZE,
    Damage,
    both_copies_of_a_flag,
    both_copies_of_a_pin,
    both_copies_of_a_record,
    build,
    checkpoint_is_whole,
    cut_index,
    flipped_index,
    header_of_a_checkpoint,
    header_of_a_segment,
    loose_modes,
    one_identity,
    payload_of_a_checkpoint,
    payload_of_a_dataset,
    save,
    segment_of,
    shard_chunk,
    shard_payload,
    snapshot,
)
from tests.unit.store_parts import CAPACITY, FailingDisk, fill, find_payload, held
from torchcache.errors import ConfigurationError


@contextlib.contextmanager
def silent(_: str, __: int) -> Iterator[Advance]:
    yield lambda _: None


def check(path: Path) -> Report:
    """Without repair: nothing at all may change."""
    before = snapshot(path)
    report = examine(path, repair=False, progress=silent)
    assert snapshot(path) == before
    return report


def repair(path: Path) -> Report:
    report = examine(path, repair=True, progress=silent)
    assert not report.errors
    return report


def kinds(report: Report) -> set[str]:
    """Of what is damage and still there."""
    return {finding.kind for finding in report.left}


@pytest.mark.parametrize("clean", [True, False])
def test_a_sound_store_is_sound(tmp_path: Path, clean: bool) -> None:
    path = tmp_path / "store"
    build(path, clean=clean)
    report = check(path)
    assert report.unusable == ""
    assert [finding.kind for finding in report.findings] == ([] if clean else ["index"])
    assert not report.left
    assert (report.segments, report.records) == (3, 17)
    assert report.bytes >= 15 * SIZE


@pytest.mark.parametrize("damage", REPAIRABLE, ids=str)
def test_damage_is_found_and_repaired(tmp_path: Path, damage: Damage) -> None:
    """F6, F15, I2: found without a write; repaired for good; and then a server starts, and has all it can."""
    path = tmp_path / "store"
    build(path)
    damage.inflict(path)
    report = check(path)
    assert kinds(report) == damage.kinds
    assert all(finding.consequence and finding.repair for finding in report.left)
    assert kinds(repair(path)) == set()
    assert kinds(check(path)) == set()
    after = snapshot(path)
    assert repair(path).repaired == set(), "a second repair finds nothing to do"
    assert snapshot(path) == after
    store = Store(path, capacity_bytes=CAPACITY)
    slots = Slots(store)
    assert checkpoint_is_whole(store)
    assert [n for n in range(15) if not held(store, n, SIZE)] == list(damage.loses)
    slot = slots.find(KEY)
    assert slot is None or slot.save in (None, save())
    assert {usage.name: (usage.kept, usage.pinned) for usage in store.namespaces()}[NAMESPACE][0]
    store.close()


@pytest.mark.parametrize("damage", BEYOND_REPAIR, ids=str)
def test_what_cannot_be_repaired_is_left(tmp_path: Path, damage: Damage) -> None:
    """I2, I6: what is left of a checkpoint may be worth more than a store without findings."""
    path = tmp_path / "store"
    build(path)
    damage.inflict(path)
    segment = segment_of(path, NAMESPACE).read_bytes()
    assert kinds(check(path)) == damage.kinds
    left = kinds(repair(path))
    assert left == damage.kinds - {"index"}
    assert kinds(check(path)) == left
    assert segment_of(path, NAMESPACE).read_bytes() == segment


@pytest.mark.parametrize("seed", range(6))
def test_all_at_once(tmp_path: Path, seed: int) -> None:
    """Damages that don't exclude each other, in any order."""
    path = tmp_path / "store"
    build(path)
    apart = [
        both_copies_of_a_flag,
        both_copies_of_a_pin,
        both_copies_of_a_record,
        one_identity,
        payload_of_a_dataset,
        cut_index,
        flipped_index,
        loose_modes,
    ]
    damages = [damage for damage in REPAIRABLE if damage.inflict in apart]
    Random(seed).shuffle(damages)
    for damage in damages:
        damage.inflict(path)
    assert kinds(check(path)) == set().union(*(damage.kinds for damage in damages))
    assert kinds(repair(path)) == set()
    store = Store(path, capacity_bytes=CAPACITY)
    Slots(store)
    assert checkpoint_is_whole(store)
    store.close()


def test_a_segment_that_may_be_anybodys_stays(tmp_path: Path) -> None:
    """I6: its flag, its record and its header are damaged: nobody can say that it needn't be kept."""
    path = tmp_path / "store"
    build(path)
    for inflict in (both_copies_of_a_flag, both_copies_of_a_record, header_of_a_checkpoint):
        inflict(path)
    segment = segment_of(path, NAMESPACE).read_bytes()
    assert kinds(repair(path)) == kinds(check(path)) == {"header"}
    store = Store(path, capacity_bytes=CAPACITY)
    Slots(store)
    fill(store, NAMESPACE, range(100, 103))
    store.close()
    assert segment in [file.read_bytes() for file in path.glob("segments/*/*.segment")]


def test_the_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "store"
    build(path)
    payload_of_a_checkpoint(path)
    said = {finding.kind: finding.what + finding.consequence for finding in check(path).left}
    assert f"the checkpoint {KEY} (save {SAVE_ID}) isn't whole: of __0_0.distcp 1 of 2 chunks" in said["save"]
    assert "chunk 1 of s3/run/step-1/__0_0.distcp@save:" in said["payload"]


def test_a_durable_checkpoint_may_be_missed(tmp_path: Path) -> None:
    """It lies in the under-store: its chunks are like any others."""
    path = tmp_path / "store"
    build(path)
    store = Store(path, capacity_bytes=CAPACITY)
    store.put_record(b"save/" + KEY.digest, encode_save(save("durable")))
    store.keep(NAMESPACE, False)
    store.close()
    payload_of_a_checkpoint(path)
    assert kinds(check(path)) == {"payload"}
    assert kinds(repair(path)) == set()
    assert kinds(check(path)) == set()


def test_a_damaged_copy_of_a_chunk_that_is_there_again_is_no_loss(tmp_path: Path) -> None:
    """F5: the first could not be marked as dead when it was found; without an index both are seen."""
    path, live = tmp_path / "store", tmp_path / "live"
    build(live)
    payload_of_a_checkpoint(live)
    disk = FailingDisk()
    store = Store(live, capacity_bytes=CAPACITY, disk=disk)
    disk.fail("open", errno.EIO)
    store.quarantine(shard_chunk(1))
    disk.mend()
    store.put(NAMESPACE, shard_chunk(1), SHARD_BYTES, shard_payload(1))
    shutil.copytree(live, path)
    store.close()
    report = check(path)
    assert [(f.kind, f.is_damage) for f in report.findings if f.kind == "payload"] == [("payload", False)]
    repair(path)
    assert "payload" not in {finding.kind for finding in check(path).findings}
    store = Store(path, capacity_bytes=CAPACITY)
    assert checkpoint_is_whole(store)
    store.close()


# ---- records that are set aside ----


def test_a_flag_that_was_set_aside_keeps_its_namespace(tmp_path: Path) -> None:
    """I6: kept if it may be a checkpoint, else pinned, which a user can undo."""
    path = tmp_path / "store"
    build(path)
    both_copies_of_a_flag(path)
    both_copies_of_a_pin(path)
    with pytest.raises(ConfigurationError, match=f"doctor --store {path} --repair"):
        Store(path, capacity_bytes=CAPACITY)
    repair(path)
    store = Store(path, capacity_bytes=CAPACITY)
    found = {usage.name: (usage.kept, usage.pinned) for usage in store.namespaces()}
    assert (found[NAMESPACE], found[DATASET]) == ((True, False), (False, True))
    store.close()


def test_a_record_that_was_set_aside_drops_no_save_until_it_is_removed(tmp_path: Path) -> None:
    """I2, I6."""
    path = tmp_path / "store"
    build(path)
    both_copies_of_a_record(path)
    with pytest.raises(ConfigurationError, match="is damaged"):
        Store(path, capacity_bytes=CAPACITY)
    repair(path)
    for _ in range(2):
        store = Store(path, capacity_bytes=CAPACITY)
        assert Slots(store).guarded == {NAMESPACE}
        assert checkpoint_is_whole(store)
        store.close()
    assert "set-aside" in {finding.kind for finding in check(path).findings}
    shutil.rmtree(path / "damaged")
    store = Store(path, capacity_bytes=CAPACITY)
    assert Slots(store).guarded == frozenset()
    assert NAMESPACE not in {usage.name for usage in store.namespaces()}
    store.close()


def test_a_record_set_aside_twice_takes_no_other_place(tmp_path: Path) -> None:
    path = tmp_path / "store"
    build(path)
    for number in range(3):
        both_copies_of_a_flag(path)
        repair(path)
        assert len(list((path / "damaged").iterdir())) == number + 1


@pytest.mark.parametrize(
    "call", ["make_dir", "rename", "fsync", "fsync_dir", "create", "unlink", "pwritev", "open"]
)
def test_a_repair_that_is_cut_short_is_made_again(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F2, F10, I2: what could not be repaired is said, is damage still, and can be repaired later."""
    path = tmp_path / "store"
    build(path)
    for inflict in (
        both_copies_of_a_flag,
        both_copies_of_a_record,
        payload_of_a_dataset,
        header_of_a_segment,
    ):
        inflict(path)
    disk = FailingDisk()
    monkeypatch.setattr("torchcache_server.process.examination.OS", disk)
    for after in range(8):
        disk.mend()
        disk.fail(call, errno.ENOSPC)
        if after:
            allowed = [after]

            def rule(_: object, left: list[int] = allowed) -> OSError | None:
                left[0] -= 1
                return None if left[0] >= 0 else OSError(errno.ENOSPC, "No space left on device")

            disk._rules[call] = rule
        report = examine(path, repair=True, progress=silent)
        assert report.unusable or report.errors or not report.left
    disk.mend()
    assert kinds(repair(path)) == set()
    store = Store(path, capacity_bytes=CAPACITY)
    Slots(store)
    assert checkpoint_is_whole(store)
    store.close()


# ---- what keeps it from working ----


def test_a_store_in_use_is_said(tmp_path: Path) -> None:
    store = Store(tmp_path, capacity_bytes=CAPACITY)
    fill(store, "n", range(3))
    assert "in use by another server" in examine(tmp_path, repair=True, progress=silent).unusable
    store.close()
    assert check(tmp_path).unusable == ""


def test_no_server_starts_while_a_store_is_examined(tmp_path: Path) -> None:
    build(tmp_path / "store")

    @contextlib.contextmanager
    def meanwhile(_: str, __: int) -> Iterator[Advance]:
        with pytest.raises(ConfigurationError, match="in use"):
            Store(tmp_path / "store", capacity_bytes=CAPACITY)
        yield lambda _: None

    assert examine(tmp_path / "store", repair=False, progress=meanwhile).unusable == ""


@pytest.mark.parametrize("kind", ["nothing", "file", "symlink"])
def test_what_is_no_store(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "store"
    match kind:
        case "file":
            path.touch()
        case "symlink":
            path.symlink_to(tmp_path)
    assert str(path) in examine(path, repair=True, progress=silent).unusable


def test_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "store")
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert "belongs to user" in examine(tmp_path / "store", repair=True, progress=silent).unusable


def test_another_format_is_said_and_left(tmp_path: Path) -> None:
    """F40."""
    path = tmp_path / "store"
    build(path)
    for name in ("store.json", "store-copy.json"):
        (path / name).write_text('{"format": "torchcache store 1", "server_id": "x"}')
    before = snapshot(path)
    assert kinds(repair(path)) == {"format"}
    assert snapshot(path) == before


def test_strays_and_temporary_files(tmp_path: Path) -> None:
    """I5: what a killed write left goes; what isn't ours stays."""
    path = tmp_path / "store"
    build(path)
    left = [path / "clean.tmp", path / "flags" / "x.record.tmp"]
    mine = [path / "server.log", path / "records" / "notes.txt", path / "segments" / "x" / "y"]
    mine[-1].parent.mkdir(mode=0o700)
    for file in left + mine:
        file.touch(0o600)
    report = check(path)
    assert sorted(f.path for f in report.findings if f.kind == "temporary") == sorted(map(str, left))
    assert sorted(f.path for f in report.findings if f.kind == "stray") == sorted(map(str, mine[1:]))
    repair(path)
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in mine)


def test_pages_that_cannot_be_read_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F12: and the other records are checked all the same."""
    path = tmp_path / "store"
    build(path)
    file = segment_of(path, DATASET)
    bad = find_payload(file, bytes(held_payload(4))) + 10_000

    class BadPage(ReadingDisk):
        def pread(self, fd: int, size: int, offset: int) -> bytes:
            if offset <= bad < offset + size and Path(f"/proc/self/fd/{fd}").readlink() == file:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().pread(fd, size, offset)

    monkeypatch.setattr("torchcache_server.process.examination.ReadingDisk", BadPage)
    report = check(path)
    assert kinds(report) == {"unreadable", "payload"}
    assert report.records == 16
    said = next(finding.what for finding in report.left if finding.kind == "unreadable")
    assert "can't read 4,096 of" in said


def held_payload(number: int) -> bytes:
    from tests.unit.store_parts import payload

    return payload(number, SIZE)


def test_an_inspection_has_a_disk_that_writes_nothing(tmp_path: Path) -> None:
    disk = ReadingDisk()
    (tmp_path / "file").write_bytes(b"x")
    fd = disk.open(str(tmp_path / "file"))
    for call in (
        lambda: disk.make_dir(str(tmp_path / "d")),
        lambda: disk.create(str(tmp_path / "f")),
        lambda: disk.truncate(fd, 0),
        lambda: disk.pwritev(fd, [b"y"], 0),
        lambda: disk.deallocate(fd, 0, 1),
        lambda: disk.fsync(fd),
        lambda: disk.fsync_dir(str(tmp_path)),
        lambda: disk.rename(str(tmp_path / "file"), str(tmp_path / "g")),
        lambda: disk.unlink(str(tmp_path / "file")),
        lambda: disk.remove_dir(str(tmp_path)),
    ):
        with pytest.raises(OSError, match="changes nothing"):
            call()  # type: ignore[no-untyped-call]
    with pytest.raises(OSError, match="Bad file descriptor"):
        OS.pwritev(fd, [b"y"], 0)
    disk.close(fd)
