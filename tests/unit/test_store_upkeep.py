"""Policies, promised room, compaction, the scrub, and a disk that isn't trusted any more."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
from torchcache_server.store import DiskCalls, Policy, Store, room, tidying

from tests.unit.store_parts import (
    CAPACITY,
    MIB,
    FailingDisk,
    chunk,
    fill,
    find_payload,
    flip_bit,
    held,
    overwrite,
    payload,
    segment_files,
)
from torchcache.errors import ConfigurationError, OutOfSpace


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "s", capacity_bytes=CAPACITY)


# ---- policies ----


@pytest.mark.parametrize(
    "bad",
    [{"priority": 1001}, {"priority": -1001}, {"quota_bytes": 0}, {"ttl_s": 0.0}, {"ttl_s": float("nan")}],
)
def test_policies_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="give"):
        Policy(**bad)  # type: ignore[arg-type]


def test_a_policy_survives_a_restart_and_an_eviction(store: Store, tmp_path: Path) -> None:
    wanted = Policy(priority=3, quota_bytes=10 * MIB, ttl_s=60.0)
    store.set_policy("a", wanted)
    fill(store, "a", range(3), MIB)
    assert store.evict("a") >= 3 * MIB
    assert store.policy("a") == wanted
    store.close()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY)
    assert [(n.name, n.policy) for n in store.namespaces()] == [("a", wanted)]
    store.drop("a")
    assert store.policy("a") == Policy()
    assert store.namespaces() == []
    store.close()


def test_beyond_its_quota_a_dataset_takes_nothing(store: Store) -> None:
    store.set_policy("a", Policy(quota_bytes=5 * MIB))
    fill(store, "a", range(4), MIB)
    with pytest.raises(OutOfSpace, match="used up its quota"):
        fill(store, "a", range(4, 5), MIB)
    with pytest.raises(OutOfSpace, match="used up its quota"):
        store.reserve("a", chunk(4), MIB)
    fill(store, "b", range(100, 110), MIB)
    assert all(held(store, n, MIB) for n in (*range(4), *range(100, 110)))
    store.close()


def test_what_must_be_kept_has_no_quota(store: Store) -> None:
    """I2, I6: a checkpoint isn't refused for a dataset's limit."""
    store.set_policy("a", Policy(quota_bytes=MIB))
    store.keep("a", True)
    fill(store, "a", range(4), MIB)
    store.close()


def test_lower_priorities_yield_first_and_never_take(store: Store) -> None:
    store.set_policy("precious", Policy(priority=5))
    store.set_policy("cheap", Policy(priority=-5))
    fill(store, "precious", range(14), MIB)
    fill(store, "cheap", range(100, 114), MIB)
    fill(store, "plain", range(200, 214), MIB)
    assert held(store, 100, MIB)  # used last
    fill(store, "new", range(300, 328), MIB)
    assert all(held(store, n, MIB) for n in (*range(14), *range(200, 214), *range(300, 328)))
    assert not all(store.contains(chunk(n)) for n in range(100, 114))
    store.set_policy("new", Policy(priority=5))
    store.pin("plain", True)
    with pytest.raises(OutOfSpace):
        fill(store, "cheap", range(400, 440), MIB)
    assert all(store.contains(chunk(n)) for n in (*range(14), *range(300, 328)))
    store.close()


def test_what_is_pinned_or_kept_is_not_evicted_by_hand(store: Store) -> None:
    fill(store, "a", range(3), MIB)
    store.pin("a", True)
    with pytest.raises(ConfigurationError, match="unpin it first"):
        store.evict("a")
    store.pin("a", False)
    store.keep("a", True)
    with pytest.raises(ConfigurationError, match="only copy"):
        store.evict("a")
    assert all(held(store, n, MIB) for n in range(3))
    assert store.evict("nobody") == 0
    store.close()


def test_evicting_by_hand_gives_the_disk_back(store: Store, tmp_path: Path) -> None:
    fill(store, "a", range(20), MIB)
    freed = store.evict("a")
    assert freed >= 20 * MIB
    assert store.usage().used_bytes == store.usage().spare_bytes == 0
    assert not list((tmp_path / "s" / "spares").iterdir())
    store.close()


def test_a_dataset_is_dropped_after_its_time(store: Store) -> None:
    """F22: by the monotonic clock of the running server; what is kept or pinned never."""
    for name in ("a", "kept", "pinned", "forever"):
        fill(store, name, range(len(name) * 100, len(name) * 100 + 2), MIB)
        store.set_policy(name, Policy(ttl_s=50.0 if name != "forever" else None, pinned=name == "pinned"))
    store.keep("kept", True)
    core = store._core
    used_s = core.space.namespaces["a"].used_s
    tidying.expire(core, used_s + 49)
    assert held(store, 100, MIB)
    used_s = core.space.namespaces["a"].used_s
    tidying.expire(core, used_s + 51)
    assert not store.contains(chunk(100))
    assert store.usage().expired_chunks == 2
    assert all(store.contains(chunk(n)) for n in (400, 600, 700))
    store.close()


# ---- promised room ----


def test_promised_room_is_there(store: Store) -> None:
    promises = [store.reserve("a", chunk(n), 4 * MIB) for n in range(15)]
    with pytest.raises(OutOfSpace, match="is full"):
        store.reserve("b", chunk(99), 4 * MIB)
    for n, one in enumerate(promises[:4]):
        store.put("a", chunk(n), 4 * MIB, payload(n, 4 * MIB), promised=one)
    for one in promises:
        one.release()
        one.release()
    assert store._core.space.promised_bytes == 0
    assert all(held(store, n, 4 * MIB) for n in range(4))
    store.reserve("b", chunk(99), 4 * MIB).release()
    store.close()


def test_a_promise_evicts_before_the_fetch(store: Store) -> None:
    fill(store, "old", range(62), MIB)
    promise = store.reserve("new", chunk(100), 4 * MIB)
    assert store.usage().evicted_chunks > 0
    promise.release()
    store.close()


def test_a_file_system_that_is_nearly_full_passes_through(tmp_path: Path) -> None:
    """F10, F11: what is to stay free stays free, though the capacity isn't reached."""

    class NearlyFull(DiskCalls):
        left = 1 << 40

        def free_bytes(self, path: str) -> tuple[int, int]:
            return self.left, 1 << 40

    disk = NearlyFull()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY, min_free_bytes=10 * MIB, disk=disk)
    store.keep("kept", True)
    fill(store, "kept", range(7), MIB)
    disk.left = 9 * MIB
    with pytest.raises(OutOfSpace, match="that are to stay free"):
        store.reserve("b", chunk(200), MIB)
    with pytest.raises(OutOfSpace, match="that are to stay free"):
        fill(store, "kept", range(7, 14), MIB)
    assert all(held(store, n, MIB) for n in range(7))
    disk.left = 1 << 40
    fill(store, "kept", range(7, 14), MIB)
    store.close()


def test_tidying_leaves_the_disk_air(tmp_path: Path) -> None:
    """What was used last isn't taken for it."""

    class Filling(DiskCalls):
        def free_bytes(self, path: str) -> tuple[int, int]:
            return 20 * MIB, 1 << 40

    store = Store(tmp_path / "s", capacity_bytes=CAPACITY, min_free_bytes=0, disk=Filling())
    fill(store, "old", range(7), MIB)
    fill(store, "new", range(100, 107), MIB)
    store._core.min_free_bytes = 24 * MIB
    store.tidy()
    assert not store.contains(chunk(0))
    assert store.usage().spare_bytes == 0
    assert all(held(store, n, MIB) for n in range(100, 107))
    store.close()


def test_what_readers_hold_is_not_paid_for_by_others(tmp_path: Path) -> None:
    """A file that was unlinked and is still looked at frees nothing: evicting more would not help."""

    class Full(DiskCalls):
        def free_bytes(self, path: str) -> tuple[int, int]:
            return 40 * MIB, 1 << 40

    store = Store(tmp_path / "s", capacity_bytes=CAPACITY, min_free_bytes=0, disk=Full())
    for number in range(6):
        fill(store, f"d{number}", range(10 * number, 10 * number + 3), MIB)
    views = [store.lookup(chunk(10 * number)) for number in range(6)]
    store.lookup(chunk(50))
    store._core.min_free_bytes = 41 * MIB
    for _ in range(5):
        store.tidy()
    gone = [number for number in range(6) if not store.contains(chunk(10 * number))]
    assert gone == [0]
    with pytest.raises(OutOfSpace, match="until readers let go"):
        store.reserve("new", chunk(99), MIB)
    assert [number for number in range(6) if not store.contains(chunk(10 * number))] == [0]
    views.clear()
    store.tidy()
    assert [number for number in range(6) if not store.contains(chunk(10 * number))] == [0, 1]
    store.close()


# ---- compaction ----


def test_room_of_the_dead_is_given_back(store: Store) -> None:
    fill(store, "a", range(7), MIB)
    for n in range(6):
        store.quarantine(chunk(n))
    dead = store.usage().dead_bytes
    assert dead >= 6 * MIB
    store.tidy()
    after = store.usage()
    assert after.dead_bytes == 0
    assert after.used_bytes + after.spare_bytes < 12 * MIB
    assert after.compacted_bytes >= MIB
    assert held(store, 6, MIB)
    assert not any(store.contains(chunk(n)) for n in range(6))
    store.close()


def test_a_compacted_store_is_found_again(store: Store, tmp_path: Path) -> None:
    fill(store, "a", range(14), MIB)
    for n in range(0, 14, 2):
        store.quarantine(chunk(n))
    fill(store, "a", range(20, 22), MIB)
    store.quarantine(chunk(1))
    store.tidy()
    assert store.usage().compacted_bytes
    store.close()
    (tmp_path / "s" / "clean").unlink()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY)
    assert sorted(n for n in range(30) if store.contains(chunk(n))) == [3, 5, 7, 9, 11, 13, 20, 21]
    assert all(held(store, n, MIB) for n in (3, 5, 7, 9, 11, 13, 20, 21))
    store.close()


def test_what_must_be_kept_is_not_moved(store: Store) -> None:
    """I2: its durability was promised where it lies."""
    fill(store, "a", range(7), MIB)
    for n in range(6):
        store.quarantine(chunk(n))
    store.keep("a", True)
    store.tidy()
    assert store.usage().compacted_bytes == 0
    assert held(store, 6, MIB)
    store.close()


def test_a_chunk_that_changes_while_it_is_moved_is_not_brought_back(tmp_path: Path) -> None:
    """I1: quarantined meanwhile, it stays away; also for a rebuilt index."""
    acts = []

    class Acting(DiskCalls):
        def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
            while acts and sum(memoryview(b).nbytes for b in buffers) > 500:
                acts.pop()()
            return super().pwritev(fd, buffers, offset)

    store = Store(tmp_path / "s", capacity_bytes=CAPACITY, disk=Acting())
    fill(store, "a", range(7), MIB)
    for n in range(5):
        store.quarantine(chunk(n))
    acts.append(lambda: store.quarantine(chunk(5)))
    store.tidy()
    assert not store.contains(chunk(5))
    assert held(store, 6, MIB)
    store.close()
    (tmp_path / "s" / "clean").unlink()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY)
    assert [n for n in range(7) if store.contains(chunk(n))] == [6]
    store.close()


def test_moving_does_not_launder_damage(store: Store, tmp_path: Path) -> None:
    """I1, F5: the checksums move along."""
    fill(store, "a", range(7), MIB)
    file = segment_files(tmp_path / "s")[0]
    flip_bit(file, find_payload(file, payload(6, MIB)) + 5000)
    for n in range(5):
        store.quarantine(chunk(n))
    store.tidy()
    assert store.usage().compacted_bytes
    assert not held(store, 6, MIB)
    assert not store.verify(chunk(6))
    assert held(store, 5, MIB)
    store.close()


# ---- the order of reading ----


def test_with_an_order_the_farthest_yields(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed soon is moved, what is needed last goes; a chunk that is needed later still isn't taken in."""
    monkeypatch.setattr(room, "SLACK_SEGMENTS", 1)
    soon, late = range(0, 63, 2), range(1, 63, 2)
    fill(store, "a", range(63), MIB)
    store.expect("a", [chunk(n) for n in (*soon, 100, 101, *late, 200)])
    with pytest.raises(OutOfSpace):
        store.reserve("a", chunk(300), MIB)
    for n in (100, 101):
        fill(store, "a", range(n, n + 1), MIB)
    assert all(held(store, n, MIB) for n in (*soon, 100, 101))
    assert not all(store.contains(chunk(n)) for n in late)
    usage = store.usage()
    assert usage.compacted_bytes > 0
    assert usage.used_bytes + usage.spare_bytes <= CAPACITY
    store.expect("a", None)
    with pytest.raises(OutOfSpace):
        fill(store, "a", range(300, 320), MIB)
    store.close()


def test_an_order_never_evicts_what_is_pinned(store: Store) -> None:
    """I6."""
    fill(store, "a", range(63), MIB)
    store.pin("a", True)
    store.expect("a", [chunk(n) for n in (100, *range(63))])
    with pytest.raises(OutOfSpace):
        fill(store, "a", range(100, 108), MIB)
    assert all(store.contains(chunk(n)) for n in range(63))
    store.close()


# ---- scrub ----


def test_a_scrub_goes_round_and_finds_what_nobody_read(store: Store, tmp_path: Path) -> None:
    """F5, F6, F8."""
    fill(store, "a", range(20), 300_000)
    store.keep("kept", True)
    fill(store, "kept", range(100, 103), 300_000)
    files = segment_files(tmp_path / "s")
    flip_bit(files[0], find_payload(files[0], payload(3, 300_000)) + 100_000)
    overwrite(files[0], find_payload(files[0], payload(7, 300_000)) - 64, bytes(64))
    flip_bit(files[-1], find_payload(files[-1], payload(101, 300_000)) + 7)
    damaged: list[str] = []
    steps = size = 0
    while True:
        step = store.scrub(1_000_000)
        damaged += step.damaged
        steps += 1
        size += step.bytes
        assert step.bytes < 1_500_000
        if step.finished:
            break
    assert steps > 5
    assert sorted(damaged) == ["a", "a", "kept"]
    assert not store.contains(chunk(3)) and not store.contains(chunk(7))
    assert store.contains(chunk(101)), "it may be the only copy"
    usage = store.usage()
    assert (usage.corrupt, usage.damaged_kept, usage.scrub_rounds) == (2, 1, 1)
    assert usage.scrubbed_bytes == size
    assert store.scrub(1 << 30).damaged == ("kept",)
    assert store.usage().damaged_kept == 1
    store.close()


def test_a_scrub_reads_a_rotten_disk_no_faster(store: Store, tmp_path: Path) -> None:
    fill(store, "a", range(6), MIB)
    [file] = segment_files(tmp_path / "s")
    for n in range(6):
        flip_bit(file, find_payload(file, payload(n, MIB)))
    step = store.scrub(1)
    assert (step.chunks, step.damaged, step.finished) == (1, ("a",), False)
    assert step.bytes >= MIB
    store.close()


def test_a_scrub_of_an_empty_store_ends(store: Store) -> None:
    assert store.scrub(1000) == (0, 0, (), True)
    store.close()


# ---- a bad disk ----


def test_three_errors_take_the_disk_out_of_service(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """F12: what can be fetched elsewhere is a miss, nothing is stored, what exists nowhere else is still read."""
    disk = FailingDisk()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY, disk=disk)
    fill(store, "a", range(3), MIB)
    store.keep("kept", True)
    fill(store, "kept", range(100, 103), MIB)
    disk.fail("pwritev", errno.EIO, times=2)
    for _ in range(2):
        with pytest.raises(OutOfSpace, match="Input/output error"):
            fill(store, "b", range(200, 201), MIB)
    assert store.health().errors == 2
    assert store.health().out_of_service == ""
    assert held(store, 0, MIB)
    disk.fail("populate", errno.EIO, times=1)
    store._core.known.clear()
    assert store.lookup(chunk(1)) is None
    with caplog.at_level(logging.ERROR):
        assert "3 disk errors" in store.health().out_of_service
    assert not any(held(store, n, MIB) for n in range(3))
    with pytest.raises(OutOfSpace, match="out of service"):
        fill(store, "b", range(200, 201), MIB)
    with pytest.raises(OutOfSpace, match="out of service"):
        store.reserve("b", chunk(200), MIB)
    assert all(held(store, n, MIB) for n in range(100, 103))
    assert store.usage().out_of_service
    store.close()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY)
    assert store.health().errors == 0
    assert held(store, 0, MIB)
    store.close()


def test_one_bad_place_is_one_error_however_often_it_is_asked_for(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY, disk=disk)
    store.keep("kept", True)
    fill(store, "kept", range(3), MIB)
    disk.fail("populate", errno.EIO)
    for _ in range(5):
        store._core.known.clear()
        assert store.lookup(chunk(0)) is None
    assert store.health().errors == 1
    assert store.lookup(chunk(1)) is None
    assert store.health().out_of_service == ""
    assert store.lookup(chunk(2)) is None
    assert "3 disk errors" in store.health().out_of_service
    disk.mend()
    store.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE, errno.EINTR, errno.EDQUOT])
def test_other_troubles_are_not_the_disks(tmp_path: Path, code: int) -> None:
    """F10, F14."""
    disk = FailingDisk()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY, disk=disk)
    disk.fail("create", code)
    for _ in range(5):
        with pytest.raises(OutOfSpace):
            fill(store, "a", range(1))
    disk.mend()
    fill(store, "a", range(1))
    assert store.health().errors == 0
    store.close()


def test_a_read_that_fails_for_want_of_something_else_costs_no_chunk(tmp_path: Path) -> None:
    disk = FailingDisk()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY, disk=disk)
    fill(store, "a", range(2))
    store._core.known.clear()
    disk.fail("populate", errno.ENOMEM)
    assert store.lookup(chunk(0)) is None
    disk.mend()
    assert held(store, 0)
    store.close()


def test_who_reads_a_chunk_here_is_not_ended_by_the_disk(tmp_path: Path) -> None:
    """F12: a known chunk whose page has gone and can't be read any more."""
    disk = FailingDisk()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY, disk=disk)
    fill(store, "a", range(2))
    store.keep("kept", True)
    fill(store, "kept", range(10, 11))
    assert all(held(store, n) for n in (0, 1, 10))
    disk.fail("populate", errno.EIO, times=2)
    assert not store.verify(chunk(0))
    assert store.read(chunk(10)) is None
    found = store.read(chunk(10))
    assert found is not None and bytes(found.payload) == payload(10)
    assert [store.contains(chunk(n)) for n in (0, 1, 10)] == [False, True, True]
    assert store.usage().corrupt == 1
    store.close()


def test_a_kept_segment_survives_its_header(store: Store, tmp_path: Path) -> None:
    """F6, I2: its name says number and nonce, its folder the namespace; one that isn't kept is removed."""
    store.keep("kept", True)
    fill(store, "kept", range(3), MIB)
    fill(store, "other", range(100, 103), MIB)
    store.sync("kept")
    store.close()
    for file in segment_files(tmp_path / "s"):
        overwrite(file, 0, bytes(64))
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY)
    assert all(held(store, n, MIB) for n in range(3))
    assert not any(store.contains(chunk(n)) for n in range(100, 103))
    assert [n.kept for n in store.namespaces()] == [True]
    store.close()
    store = Store(tmp_path / "s", capacity_bytes=CAPACITY)
    assert all(held(store, n, MIB) for n in range(3))
    store.close()
