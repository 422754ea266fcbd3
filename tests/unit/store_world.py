"""A store in use, with a record of what it promised: for tests that make its disk fail at any call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from torchcache_server.store import Store, handing_out
from torchcache_server.store.policy import Policy
from torchcache_server.store.room import Promise

from tests.unit.handed_out_parts import opened, write_records
from tests.unit.store_parts import (
    SMALL_SEGMENT,
    chunk,
    crash_image,
    find_payload,
    flip_bit,
    held,
    payload,
    segment_files,
)
from tests.unit.store_sites import SiteDisk
from torchcache.errors import ConfigurationError, IntegrityError, TorchCacheError
from torchcache.model import ChunkId, ObjectId
from torchcache.records import folder_name

SIZE = 20_000  # three to a segment
CAPACITY = 8 * SMALL_SEGMENT


class World:
    """A store in use, and what it promised: `might` holds, for each fact, all that it may be after what was said."""

    def __init__(
        self, folder: Path, disk: SiteDisk, *, before: World | None = None, mend_after: int = 0
    ) -> None:
        """Opens the store. The disk is mended at the end of phase `mend_after`; `before` left what is in the folder."""
        self.folder = folder
        self.disk = disk
        self.mend_after = mend_after
        self.ever = set(before.ever) if before else set[int]()
        self.stored = dict(before.stored) if before else dict[int, str]()
        self.durable = set(before.durable) if before else set[int]()
        self.kept = dict(before.kept) if before else dict[str, set[bool]]()
        self.pinned = dict(before.pinned) if before else dict[str, set[bool]]()
        self.records = dict(before.records) if before else dict[bytes, set[bytes | None]]()
        self.store = self._open()

    # ---- what is done, and what is promised then ----

    def try_to(self, step: Callable[[], object]) -> bool:
        """Whether the step came to its end; nothing but our own errors may come out of it."""
        try:
            step()
        except TorchCacheError as error:
            assert error.message
            return False
        return True

    def put(self, name: str, numbers: Iterable[int]) -> bool:
        return all([self.put_one(name, n) for n in numbers])

    def put_many(self, name: str, numbers: Iterable[int]) -> None:
        rows = [(chunk(n), SIZE, payload(n, SIZE)) for n in numbers]
        self.ever.update(numbers)
        if self.try_to(lambda: self.store.put_many(name, rows)):
            self.stored.update(dict.fromkeys(numbers, name))
        else:
            assert not any(self.store.contains(chunk(n)) for n in numbers), "all or none"

    def put_one(self, name: str, n: int) -> bool:
        self.ever.add(n)
        before = self.stored.get(n)
        if not self.try_to(lambda: self.store.put(name, chunk(n), SIZE, payload(n, SIZE))):
            return False
        if self.stored.get(n) == before:  # else another thread was faster, and the chunk is where that put it
            self.stored[n] = name
        return True

    def keep(self, name: str, keep: bool) -> None:
        self._flag(self.kept, name, keep, self.store.keep)

    def pin(self, name: str, pinned: bool) -> None:
        self._flag(self.pinned, name, pinned, self.store.pin)

    def _flag(
        self, flags: dict[str, set[bool]], name: str, value: bool, call: Callable[[str, bool], None]
    ) -> None:
        before = flags.get(name, {False})
        flags[name] = {value} if self.try_to(lambda: call(name, value)) else before | {value}

    def sync(self, name: str) -> None:
        mine = {n for n, owner in self.stored.items() if owner == name}
        folder = str(self.folder / "segments" / folder_name(name))
        if self.try_to(lambda: self.store.sync(name)):
            lost = [path for path in self.disk.sync_failed if path.startswith(folder) and Path(path).exists()]
            assert not lost, f"sync succeeded, though fsync had failed for {lost}"
            if self.kept.get(name) == {True}:
                self.durable |= mine

    def drop(self, name: str) -> None:
        mine = {n for n, owner in self.stored.items() if owner == name}
        if self.try_to(lambda: self.store.drop(name)):
            self.kept[name] = self.pinned[name] = {False}
            assert not any(self.store.contains(chunk(n)) for n in mine)
        else:
            for flags in (self.kept, self.pinned):
                flags[name] = flags.get(name, set()) | {False}
        self.durable -= mine
        self.stored = {n: owner for n, owner in self.stored.items() if n not in mine}

    def record(self, key: bytes, value: bytes | None) -> None:
        store, before = self.store, self.records.get(key, {None})
        change = (
            (lambda: store.delete_record(key)) if value is None else (lambda: store.put_record(key, value))
        )
        self.records[key] = {value} if self.try_to(change) else before | {value}
        self.try_to(lambda: store.get_record(key) in self.records[key] or pytest.fail("another record"))

    def forget(self, number: int) -> None:
        self.try_to(lambda: self.store.quarantine(chunk(number)))
        self.stored.pop(number, None)

    def damage(self, number: int) -> None:
        """Spoils a record's header, and looks the chunk up."""
        for file in segment_files(self.folder):
            if payload(number, SIZE) in file.read_bytes():
                flip_bit(file, find_payload(file, payload(number, SIZE)) - 1)
        self.store._core.known = {}
        self.stored.pop(number, None)
        assert not held(self.store, number, SIZE)

    def put_promised(self, name: str, number: int) -> None:
        """As a fill does: room first, then the bytes."""
        self.ever.add(number)
        promises: list[Promise] = []
        if self.try_to(lambda: promises.append(self.store.reserve(name, chunk(number), SIZE))):
            data = payload(number, SIZE)
            if self.try_to(lambda: self.store.put(name, chunk(number), SIZE, data, promised=promises[0])):
                self.stored[number] = name
            promises[0].release()

    def write_by_client(self, name: str, numbers: Iterable[int]) -> None:
        """As a client of this host does, who is looked for meanwhile."""
        rows = [(chunk(n), SIZE, payload(n, SIZE)) for n in numbers]
        self.ever.update(numbers)

        def write() -> None:
            got = self.store.prepare_write(name, [(id, size, size) for id, size, _ in rows], timeout_s=60)
            assert got is not None
            with opened(self.folder, name, got) as fds:
                write_records(fds, got, rows)
                self._look_for_clients()
                self.store.commit_write(got.write_id)

        if self.try_to(write):
            self.stored.update(dict.fromkeys(numbers, name))
        else:
            assert not any(self.store.contains(chunk(n)) for n in numbers), "all or none"

    def lose_client(self, name: str, numbers: Iterable[int]) -> None:
        """A client gets files, and is never heard of again."""
        chunks = [(chunk(n), SIZE, SIZE) for n in numbers]
        self.try_to(lambda: self.store.prepare_write(name, chunks, timeout_s=60))
        self._look_for_clients()
        self.store._handing_out.expire(time.monotonic() + 61)  # if that couldn't be told

    def _look_for_clients(self) -> None:
        self.store._handing_out.expire(time.monotonic() + handing_out.OPENING_S)

    def put_long(self) -> None:
        """A chunk whose header is longer than a page, for a moment."""
        long = ChunkId(ObjectId("s3", "bucket/" + "key" * 2000, "v1"), 0)
        self.try_to(lambda: self.store.put("d", long, 5, b"bytes"))
        self.store._core.known = {}
        self.try_to(lambda: self.store.lookup(long))
        self.try_to(lambda: self.store.quarantine(long))

    def upkeep(self) -> None:
        self.try_to(self.store.tidy)
        self.try_to(lambda: self.store.scrub(1 << 20))

    # ---- what must hold ----

    def check(self) -> set[int]:
        """Returns the chunks that are there."""
        failed = self.disk.failed
        there = self._there()
        if self.disk.failed > failed:  # what can't be read just now may be all right
            with self.disk.healed():
                there = self._there()
        kept = {n for n, owner in self.stored.items() if self.kept.get(owner) == {True}}
        assert self.durable <= there, f"I2: {self.durable - there} were durable and are gone"
        assert kept <= there, f"I6: {kept - there} were kept and are gone"
        usage, namespaces = self.store.usage(), self.store.namespaces()
        assert self.store._core.space.promised_bytes == 0
        assert usage.used_bytes == sum(n.bytes for n in namespaces) <= CAPACITY, (usage, namespaces)
        assert usage.chunks == sum(n.chunks for n in namespaces) >= len(there), (usage, there)
        assert usage.chunks == len(there) or usage.out_of_service, (usage, there)
        flags = {n.name: (n.kept, n.pinned) for n in namespaces}
        for name in self.kept.keys() | self.pinned.keys():
            is_kept, is_pinned = flags.get(name, (False, False))
            assert is_kept in self.kept.get(name, {False}), f"{name} kept: {is_kept}"
            assert is_pinned in self.pinned.get(name, {False}), f"{name} pinned: {is_pinned}"
        for key, values in self.records.items():
            assert self.store.get_record(key) in values
        return there

    def _there(self) -> set[int]:
        return {n for n in self.ever if held(self.store, n, SIZE)}  # I1: fails for what passes and is wrong

    def next_phase(self) -> None:
        """Mends the disk if the faults were for the phase that ends here."""
        if self.disk.phase >= self.mend_after:
            self.disk.mend()
        self.disk.phase += 1

    def restart(self, *, killed: bool) -> None:
        """Stops the store in order, or as a kill does, and opens it again: all that could be read still can."""
        before = self.check()
        image = crash_image(self.folder, self.folder.with_name("image")) if killed else self.folder
        self.store.close()
        self.next_phase()
        self.folder = image
        if killed:  # and one segment's header is damaged, of what is kept
            flip_bit(sorted((image / "segments" / folder_name("a")).iterdir())[0], 20)
        failed = self.disk.failed
        self._start()
        self.next_phase()
        if self.disk.failed > failed and not before <= self._there():
            self.store.close()  # what could not be read was left out, and left alone
            self._start()
        assert not (lost := before - self.check()), f"{lost} were there before the restart"

    def _start(self) -> None:
        self.disk.restarted()
        self.store = self._open()

    def _open(self) -> Store:
        for _ in range(2):
            try:
                return self._opened()
            except (ConfigurationError, IntegrityError) as error:
                assert str(self.folder) in str(error)
        self.disk.mend()
        return self._opened()

    def _opened(self) -> Store:
        return Store(self.folder, capacity_bytes=CAPACITY, segment_bytes=SMALL_SEGMENT, disk=self.disk)


def leave_old_store(folder: Path) -> None:
    """What an earlier version left, which is emptied."""
    for name in ("segments/one", "records", "flags"):
        (folder / name).mkdir(parents=True)
    (folder / "store.json").write_text('{"format": "torchcache store 0", "server_id": "old"}')
    (folder / "segments/one/1.segment").write_bytes(b"old")
    (folder / "records/one.record").write_bytes(b"old")


def first_life(world: World) -> None:
    """Of a store that is new: all sorts of chunks, kept and dropped; then it is stopped in order, and started again."""
    world.next_phase()
    world.put_many("m", range(90, 95))  # two segments at once
    world.drop("m")
    world.put("a", range(2))
    world.keep("a", True)
    world.put("a", range(2, 7))
    world.sync("a")
    for key, value in ((b"1", b"one"), (b"2", b"two"), (b"1", b"another"), (b"2", None)):
        world.record(key, value)
    world.put_long()
    world.keep("d", True)
    world.put("d", range(60, 64))
    world.sync("d")
    world.drop("d")
    world.put("b", range(20, 27))
    world.put("p", range(30, 32))
    world.pin("p", True)
    for n in (0, 20):
        world.try_to(lambda n=n: world.store.verify(chunk(n)))  # type: ignore[misc]
        world.try_to(lambda n=n: world.store.read(chunk(n)))  # type: ignore[misc]
    world.put("c", range(40, 47))
    world.disk.during = lambda: world.put("b", [50])  # another thread stores the same chunk meanwhile
    world.put("c", range(50, 55))  # b yields
    world.drop("b")
    world.write_by_client("h", range(130, 134))
    world.lose_client("h", range(140, 143))
    world.drop("h")
    world.damage(54)
    for n in (41, 42, 40, 43, 44):
        world.forget(n)
    world.upkeep()  # one chunk of c is moved
    world.put("a", range(7, 9))
    world.sync("a")
    world.drop("c")
    world.next_phase()
    world.restart(killed=False)
    _end(world)


def second_life(world: World) -> None:
    """Of a store that was stopped in order, by `first_half`: who yields to whom, and a kill."""
    world.next_phase()
    world.put("a", range(9, 12))
    world.put("c", range(70, 73))
    world.sync("a")
    world.put_promised("o", 100)
    world.put("o", range(101, 106))
    world.try_to(lambda: world.store.expect("o", [chunk(n) for n in (106, 107, *range(100, 106))]))
    world.put("o", range(106, 110))  # c yields, then what o needs later
    world.try_to(lambda: world.store.evict("o"))
    world.put("t", range(110, 113))
    world.try_to(lambda: world.store.set_policy("t", Policy(ttl_s=1e-9)))
    world.upkeep()
    world.put("f", range(120, 123))
    world.put("g", range(123, 124))
    world.disk.free_now = 0
    world.upkeep()
    world.disk.free_now = None
    world.sync("a")
    world.next_phase()
    world.restart(killed=True)
    _end(world)


def prepare(world: World) -> None:
    """What `second_life` finds."""
    world.put("a", range(7))
    world.keep("a", True)
    world.sync("a")
    world.record(b"1", b"one")
    world.put("b", range(20, 27))
    world.put("p", range(30, 32))
    world.pin("p", True)
    world.check()
    world.store.close()


def _end(world: World) -> None:
    assert world.put("e", range(80, 83)), "it works again"
    world.check()
    world.keep("a", False)
    world.pin("p", False)
    world.next_phase()
    for name in "abcdefghmopt":
        world.drop(name)
    assert world.store.usage().used_bytes == 0
    assert world.store.namespaces() == []
    world.store.close()
