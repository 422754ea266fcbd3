"""What a store makes of folders that weren't closed, or were damaged: a miss at worst, never a wrong byte."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from torchcache_server.store import Store

from tests.unit.store_parts import (
    CAPACITY,
    FailingDisk,
    chunk,
    crash_image,
    fill,
    find_payload,
    flip_bit,
    held,
    overwrite,
    payload,
    segment_files,
)
from torchcache.model import BLOCK_BYTES, ChunkId, ObjectId

SIZE = 40_000  # three blocks


def open_store(path: Path) -> Store:
    return Store(path, capacity_bytes=CAPACITY)


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A store of ten chunks whose server was killed; the index is as good as none."""
    store = open_store(tmp_path / "live")
    fill(store, "n", range(10), SIZE)
    image = crash_image(tmp_path / "live", tmp_path / "crashed")
    store.close()
    return image


def resident(path: Path) -> list[int]:
    store = open_store(path)
    try:
        return [n for n in range(10) if held(store, n, SIZE)]
    finally:
        store.close()


def test_everything_written_is_found_again(crashed: Path) -> None:
    """F1."""
    store = open_store(crashed)
    assert store.usage().chunks == 10
    assert all(held(store, n, SIZE) for n in range(10))
    fill(store, "n", range(10, 20), SIZE)
    assert store.usage().segments == 1, "it goes on in the same segment"
    store.close()
    assert resident(crashed) == list(range(10))


def test_the_index_is_not_needed(crashed: Path) -> None:
    for file in (crashed / "index").iterdir():
        file.unlink()
    assert resident(crashed) == list(range(10))


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, bytes(8192)])
def test_an_index_that_is_none_is_rebuilt(tmp_path: Path, name: str, content: bytes) -> None:
    """F6: after a clean stop too."""
    store = open_store(tmp_path)
    fill(store, "n", range(10), SIZE)
    store.close()
    (tmp_path / "index" / name).write_bytes(content)
    assert resident(tmp_path) == list(range(10))


@pytest.mark.parametrize("clean", [True, False])
def test_flags_and_records_survive(tmp_path: Path, clean: bool) -> None:
    store = open_store(tmp_path / "live")
    fill(store, "n", range(3))
    store.keep("n", True)
    store.pin("p", True)
    store.put_record(b"save", b"7")
    identity = store.server_id
    if clean:
        store.close()
    image = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    store = open_store(image)
    assert [(n.name, n.kept, n.pinned) for n in store.namespaces()] == [
        ("n", True, False),
        ("p", False, True),
    ]
    assert store.get_record(b"save") == b"7"
    assert store.server_id == identity
    store.close()


# ---- one damaged record among ten, at each of its parts ----


def zero_payload(file: Path, at: int) -> None:
    overwrite(file, at, bytes(SIZE))


def zero_last_block(file: Path, at: int) -> None:
    overwrite(file, at + 2 * BLOCK_BYTES, bytes(SIZE - 2 * BLOCK_BYTES))


def flip_payload(file: Path, at: int) -> None:
    flip_bit(file, at + SIZE // 2, 5)


def zero_header(file: Path, at: int) -> None:
    overwrite(file, at - 128, bytes(128))


def flip_length(file: Path, at: int) -> None:
    flip_bit(file, at - 128 + 24, 6)


def flip_identity(file: Path, at: int) -> None:
    flip_bit(file, at - 128 + 60, 1)


def tear(step: int) -> Callable[[Path, int], None]:
    def tear_at(file: Path, at: int) -> None:
        """The write stopped after `step` sectors of 512 bytes."""
        overwrite(file, at - 128 + 512 * step, bytes(SIZE + 128 - 512 * step))

    tear_at.__name__ = f"torn_after_{512 * step}"
    return tear_at


DAMAGE = [
    zero_payload,
    zero_last_block,
    flip_payload,
    zero_header,
    flip_length,
    flip_identity,
    *(tear(step) for step in (0, 1, 2, 33, 64, 77)),
]


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("victim", [0, 4, 9])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_a_damaged_record_is_a_miss_and_takes_no_other_along(
    crashed: Path, damage: Callable[[Path, int], None], victim: int, clean: bool
) -> None:
    """F4, F5, F6, F8, I1."""
    if clean:
        open_store(crashed).close()
    (file,) = segment_files(crashed)
    damage(file, find_payload(file, payload(victim, SIZE)))
    store = open_store(crashed)
    for n in range(10):
        assert held(store, n, SIZE) == (n != victim)
    # Whoever finds it so says so, and it can be stored again, for good.
    if not store.verify(chunk(victim)):
        store.quarantine(chunk(victim))
    assert store.lookup(chunk(victim)) is None
    store.put("n", chunk(victim), SIZE, payload(victim, SIZE))
    image = crash_image(crashed, crashed.parent / "again")
    store.close()
    assert resident(crashed) == list(range(10))
    assert resident(image) == list(range(10))


def test_a_torn_payload_is_left_out(crashed: Path) -> None:
    """F1, F4: without waiting for a reader to find it."""
    (file,) = segment_files(crashed)
    zero_last_block(file, find_payload(file, payload(4, SIZE)))
    store = open_store(crashed)
    assert not store.contains(chunk(4))
    assert (store.usage().chunks, store.usage().corrupt) == (9, 0)
    store.close()


@pytest.mark.parametrize("clean", [True, False])
def test_truncation_at_every_record(crashed: Path, clean: bool) -> None:
    """F7: what was cut off is a miss, what lies before it stays."""
    if clean:
        open_store(crashed).close()
    (file,) = segment_files(crashed)
    starts = [find_payload(file, payload(n, SIZE)) for n in range(10)]
    for n in reversed(range(10)):
        for cut in (starts[n] + SIZE, starts[n] + SIZE - 1, starts[n], starts[n] - 1):
            with file.open("r+b") as opened:
                opened.truncate(cut)
            left = n + (cut == starts[n] + SIZE)
            store = open_store(crashed)
            assert store.usage().chunks == left, f"{cut} bytes left"
            assert [m for m in range(10) if held(store, m, SIZE)] == list(range(left))
            store.close()


@pytest.mark.parametrize("size", [0, 1, 51, 63])
def test_a_segment_without_its_header_is_gone(crashed: Path, size: int) -> None:
    (file,) = segment_files(crashed)
    with file.open("r+b") as opened:
        opened.truncate(size)
    store = open_store(crashed)
    assert store.usage().segments == 0
    assert segment_files(crashed) == []
    store.close()


def test_a_segment_that_vanished_is_a_miss(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, "n", range(10), SIZE)
    store.close()
    (file,) = segment_files(tmp_path)
    file.unlink()
    store = open_store(tmp_path)
    assert (store.usage().chunks, store.usage().used_bytes) == (0, 0)
    assert store.lookup(chunk(1)) is None
    store.close()


def test_swapped_segments_are_misses(tmp_path: Path) -> None:
    """F9: sound records under another file's name."""
    store = open_store(tmp_path)
    fill(store, "a", range(5), SIZE)
    fill(store, "b", range(5, 10), SIZE)
    store.close()
    one, two = segment_files(tmp_path)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    assert resident(tmp_path) == []


def test_a_quarantined_chunk_does_not_come_back(tmp_path: Path) -> None:
    store = open_store(tmp_path / "live")
    fill(store, "n", range(10), SIZE)
    store.quarantine(chunk(3))
    image = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    assert resident(image) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("between", [0, 9], ids=["same segment", "another segment"])
def test_of_two_records_of_a_chunk_the_later_counts(tmp_path: Path, between: int) -> None:
    """The earlier was found damaged, but could not be marked as dead."""
    disk = FailingDisk()
    store = Store(tmp_path / "live", capacity_bytes=CAPACITY, disk=disk)
    fill(store, "n", range(10), SIZE)
    (file,) = segment_files(tmp_path / "live")
    flip_payload(file, find_payload(file, payload(3, SIZE)))
    disk.fail("open", errno.EIO)
    store.quarantine(chunk(3))
    disk.mend()
    fill(store, "n", range(100, 100 + between), 1 << 20)
    fill(store, "n", range(3, 4), SIZE)
    image = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    store = open_store(image)
    assert held(store, 3, SIZE)
    assert store.usage().chunks == 10 + between
    assert len(segment_files(image)) == 1 + bool(between)
    store.close()


def test_a_record_inside_a_payload_is_not_found(tmp_path: Path) -> None:
    """An object that is itself a segment, or forged to look like one, can't put chunks into the index."""
    donor = open_store(tmp_path / "donor")
    fill(donor, "n", range(10), SIZE)
    donor.close()
    (file,) = segment_files(tmp_path / "donor")
    inner = file.read_bytes()[: 10 * (SIZE + 256)]
    store = open_store(tmp_path / "live")
    for n in range(20, 25):
        store.put("n", chunk(n), len(inner), inner)
    store.quarantine(chunk(22))  # the scan has to look for the next record inside this one
    image = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    store = open_store(image)
    assert store.usage().chunks == 4
    assert not any(store.contains(chunk(n)) for n in range(10))
    store.close()


def test_the_tail_is_cut(crashed: Path) -> None:
    """Garbage behind the last record becomes a hole, and new records go there."""
    (file,) = segment_files(crashed)
    end = find_payload(file, payload(9, SIZE)) + SIZE
    overwrite(file, end + 100, b"garbage" * 10_000)
    open_store(crashed).close()
    assert not any(file.read_bytes()[end:])
    assert file.stat().st_size == CAPACITY // 8


def test_two_crashes_in_a_row(crashed: Path) -> None:
    store = open_store(crashed)
    fill(store, "n", range(10, 15), SIZE)
    image = crash_image(crashed, crashed.parent / "second")
    store.close()
    store = open_store(image)
    assert all(held(store, n, SIZE) for n in range(15))
    assert store.usage().chunks == 15
    store.close()


def test_what_was_dropped_stays_dropped(tmp_path: Path) -> None:
    store = open_store(tmp_path / "live")
    fill(store, "a", range(10), SIZE)
    fill(store, "b", range(10, 20), SIZE)
    store.drop("a")
    fill(store, "a", range(3), SIZE)
    image = crash_image(tmp_path / "live", tmp_path / "image")
    store.close()
    assert resident(image) == [0, 1, 2]


class Colliding(ObjectId):
    """Stands for a collision of xxh3-128, which can't be provoked."""

    @property
    def digest(self) -> bytes:
        return chunk(1).object.digest


def test_identity_bytes_decide_not_the_digest(tmp_path: Path) -> None:
    """F9: an index entry that leads to another chunk's record is a miss."""
    store = open_store(tmp_path)
    wanted = ChunkId(Colliding("s3", "wanted", "v"), 0)
    fill(store, "n", range(1, 2))
    assert store.contains(wanted)
    assert store.lookup(wanted) is None
    store.close()
