"""Who looks after copies of checkpoints, where peers and holdings fail; and what a mended chunk is in a real store."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from torchcache_server.cache.holdings import Holdings, Waiting
from torchcache_server.cache.saves import Save, SaveKey
from torchcache_server.process import copy_keeper
from torchcache_server.process import peers as peers_module
from torchcache_server.process.copy_keeper import CopyKeeper
from torchcache_server.process.peers import Peers
from torchcache_server.store import Store
from write_back_world import KEY, Bucket, Server, soon

from tests.unit.store_parts import CAPACITY, MIB, FailingDisk, find_payload, flip_bit, payload, segment_files
from torchcache.errors import (
    ConfigurationError,
    DeadlineExceeded,
    IntegrityError,
    OutOfSpace,
    ServerUnavailable,
    TorchCacheError,
)
from torchcache.lanes.access import Access
from torchcache.model import ChunkId, ObjectInfo

GOOD = payload(1)


def save(name: str, *, error: TorchCacheError | None = None) -> Save:
    return Save(
        SaveKey("s3", f"run/{name}"),
        name,
        ((f"{name}.distcp", len(GOOD)),),
        b"metadata",
        b"manifest",
        overwrite=False,
        replaceable=(),
        state="failed" if error else "committed",
        committed_unix_s=1.0,
        error=error,
        replicas=2,
    )


class FakeHoldings:
    """Saves of which some are damaged; `fails` is raised by what mends one, or says whose it is."""

    def __init__(self, *names: str) -> None:
        self.saves = [save(name) for name in names]
        self.damaged: set[str] = set()
        self.damaged_chunks = 0
        self.reported: list[Save] = []
        self.fails: dict[str, TorchCacheError] = {}
        self.read: list[str] = []
        self.asked: list[str] = []

    def waiting(self) -> list[Waiting]:
        return [Waiting(one, len(GOOD)) for one in self.saves]

    def all(self) -> list[Save]:
        return self.saves

    def take_reported(self) -> list[Save]:
        reported, self.reported = self.reported, []
        return reported

    def is_wanted(self, save: Save) -> bool:
        return True

    def is_responsible(self, save: Save, *, deadline: float) -> bool:
        self.asked.append(save.save_id)
        if save.save_id in self.fails:
            raise self.fails[save.save_id]
        return True

    def chunks(self, object: ObjectInfo) -> Iterator[tuple[int, pa.Buffer]]:
        if object.id.version.removeprefix("save:") in self.damaged:
            raise IntegrityError("damaged")
        yield 0, pa.py_buffer(GOOD)

    def unsound(self, save: Save, check: Callable[[], None]) -> Iterator[tuple[str, int]]:
        check()
        self.read.append(save.save_id)
        if save.save_id in self.damaged:
            yield save.files[0][0], 0

    def mend(self, save: Save, name: str, index: int, payload: memoryview) -> None:
        if save.save_id in self.fails:
            raise self.fails[save.save_id]
        self.damaged.discard(save.save_id)


class FakePeers:
    def __init__(self, *servers: str) -> None:
        self.servers = list(servers)
        self.looks = 0
        self.sent: list[tuple[str, str]] = []
        self.error: TorchCacheError | None = None

    def look(self) -> None:
        self.looks += 1
        if self.error is not None:
            raise self.error

    def others(self, save: Save) -> list[str]:
        return self.servers

    def address(self, server: str) -> str:
        return server

    def holds(self, server: str, save: Save) -> bool:
        return (server, save.save_id) in self.sent

    def send(self, server: str, save: Save, chunks: Any, sent: Callable[[int], None]) -> None:
        for object in save.objects.values():
            sent(sum(len(data) for _, data in chunks(object)))
        self.sent.append((server, save.save_id))

    def fetch(self, save: Save, name: str, index: int) -> memoryview | None:
        return memoryview(GOOD)

    def close(self) -> None:
        pass


Made = Callable[[FakeHoldings, Any], CopyKeeper]


@pytest.fixture
def make() -> Iterator[Made]:
    """A keeper without a grace, whose rounds the test begins."""
    made: list[CopyKeeper] = []

    def make(holdings: FakeHoldings, peers: Any) -> CopyKeeper:
        some: Any = holdings
        keeper = CopyKeeper(some, peers, lease_s=3600.0, mended=lambda: None)
        keeper._grace_s = 0.0
        made.append(keeper)
        return keeper

    yield make
    for keeper in made:
        keeper.close()


# ---- copies ----


def test_an_error_of_one_save_does_not_end_the_round_for_others(make: Made) -> None:
    holdings, peers = FakeHoldings("one", "two"), FakePeers("b")
    holdings.fails["one"] = ConfigurationError("ExpiredToken")
    keeper = make(holdings, peers)
    keeper._round()
    keeper._round()
    assert peers.sent == [("b", "two")]


def test_who_is_refused_by_the_under_store_stays_responsible() -> None:
    a = Server(Bucket(), "a")
    a.save("one")
    (waiting,) = a.write_back.holdings.waiting()

    def fail(call: str, key: str) -> None:
        raise ConfigurationError("ExpiredToken")

    a.under_store.fail = fail
    assert waiting.save.key == KEY
    assert a.write_back.holdings.is_responsible(waiting.save, deadline=soon())


def test_own_damage_refuses_no_peer_and_is_mended_before_the_next_copy(make: Made) -> None:
    holdings, peers = FakeHoldings("one"), FakePeers("b", "c")
    holdings.damaged.add("one")
    keeper = make(holdings, peers)
    keeper._copy()
    assert not peers.sent and not keeper._refused
    keeper._copy()
    assert not peers.sent, "it is still damaged"
    keeper._mend()
    keeper._copy()
    assert peers.sent == [("b", "one")]
    assert keeper.counts().mended_chunks == 1


def test_a_peer_that_refuses_is_not_asked_again_soon(make: Made) -> None:
    class Full(FakePeers):
        def send(self, server: str, *arguments: Any) -> None:
            if server == "b":
                raise IntegrityError("b's disk is damaged")
            super().send(server, *arguments)

    holdings, peers = FakeHoldings("one"), Full("b", "c")
    keeper = make(holdings, peers)
    keeper._copy()
    assert set(keeper._refused) == {("one", "b")} and peers.sent == [("c", "one")]


def test_who_serves_is_asked_once_a_round(make: Made) -> None:
    holdings, peers = FakeHoldings("one", "two", "three"), FakePeers("b")
    holdings.damaged |= {"one", "two"}
    holdings.damaged_chunks = 2
    keeper = make(holdings, peers)
    keeper._round()
    assert peers.looks == 1 and keeper.counts().mended_chunks == 2
    peers.error = ServerUnavailable("none answers")
    keeper._round()
    assert peers.looks == 2


def test_a_silent_under_store_costs_a_round_its_time_once(
    make: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(FakeHoldings):
        def is_responsible(self, save: Save, *, deadline: float) -> bool:
            time.sleep(0.02)
            return super().is_responsible(save, deadline=deadline)

    monkeypatch.setattr(copy_keeper, "SILENT_S", 0.01)
    holdings, peers = Slow("one", "two", "three"), FakePeers("b")
    keeper = make(holdings, peers)
    keeper._round()
    assert holdings.asked == ["one"]
    assert peers.sent == [("b", "one"), ("b", "two"), ("b", "three")]
    keeper._round()
    assert holdings.asked == ["one", "one"]


def test_a_call_that_hangs_does_not_hold_up_the_end(make: Made) -> None:
    class Hanging(FakePeers):
        closed, entered = threading.Event(), threading.Event()

        def holds(self, server: str, save: Save) -> bool:
            self.entered.set()
            self.closed.wait(60.0)
            raise ServerUnavailable("closed")

        def close(self) -> None:
            self.closed.set()

    holdings, peers = FakeHoldings("one"), Hanging("b")
    some: Any = (holdings, peers)
    keeper = CopyKeeper(*some, lease_s=0.01, mended=lambda: None)
    keeper._grace_s = 0.0
    assert peers.entered.wait(30.0)
    began_s = time.monotonic()
    keeper.close()
    assert time.monotonic() - began_s < copy_keeper.CLOSE_S
    assert not keeper._thread.is_alive()


# ---- damage ----


def test_a_mend_that_fails_stops_no_other_and_is_tried_again_alone(make: Made) -> None:
    holdings, peers = FakeHoldings("one", "two", "three"), FakePeers()
    holdings.damaged |= {"one", "two"}
    holdings.damaged_chunks = 2
    holdings.fails["one"] = OutOfSpace("full")
    keeper = make(holdings, peers)
    keeper._mend()
    assert holdings.damaged == {"one"} and keeper.counts().mended_chunks == 1
    assert holdings.read == ["one", "two", "three"]
    keeper._mend()
    assert holdings.read == ["one", "two", "three", "one"]
    keeper._grace_s = 3600.0
    keeper._mend()
    keeper._mend()
    assert holdings.read == ["one", "two", "three", "one", "one"], "and not before the grace has passed"
    keeper._mend_again_s = 0.0
    del holdings.fails["one"]
    keeper._mend()
    assert not holdings.damaged and not keeper._unsound


def test_what_was_not_looked_through_for_want_of_servers_is_later(make: Made) -> None:
    holdings, peers = FakeHoldings("one", "two"), FakePeers()
    holdings.damaged |= {"one", "two"}
    holdings.damaged_chunks = 2
    peers.error = ServerUnavailable("none answers")
    keeper = make(holdings, peers)
    keeper._round()
    assert holdings.damaged == {"one", "two"}
    peers.error = None
    keeper._round()
    assert not holdings.damaged


def test_damage_that_comes_after_other_damage_has_gone_is_looked_for(make: Made) -> None:
    holdings, peers = FakeHoldings("one"), FakePeers()
    keeper = make(holdings, peers)
    for damaged_chunks, scans in ((1, 1), (1, 1), (0, 1), (1, 2)):
        holdings.damaged_chunks = damaged_chunks
        keeper._mend()
        assert len(holdings.read) == scans


# ---- a chunk in a real store ----


@pytest.fixture
def disk() -> FailingDisk:
    return FailingDisk()


@pytest.fixture
def store(tmp_path: Path, disk: FailingDisk) -> Iterator[Store]:
    store = Store(tmp_path, capacity_bytes=CAPACITY, disk=disk)
    yield store
    disk.mend()
    store.close()


SAVE = save("one")
(NAME,) = SAVE.objects
OBJECT = SAVE.objects[NAME]
CHUNK = ChunkId(OBJECT.id, 0)


def held(store: Store) -> Holdings:
    """With the only chunk of `SAVE` stored, and kept."""
    store.keep(SAVE.namespace, True)
    store.put(SAVE.namespace, CHUNK, OBJECT.size, pa.py_buffer(GOOD))
    nothing: Any = None
    return Holdings(store, nothing, nothing, under_store_of=nothing)


def unsound(holdings: Holdings) -> list[tuple[str, int]]:
    return list(holdings.unsound(SAVE, lambda: None))


def test_a_flipped_bit_is_mended(store: Store, tmp_path: Path) -> None:
    holdings = held(store)
    (file,) = segment_files(tmp_path)
    flip_bit(file, find_payload(file, GOOD) + 7)
    assert unsound(holdings)
    with pytest.raises(IntegrityError, match="another at another server"):
        holdings.mend(SAVE, NAME, 0, memoryview(payload(2)))
    holdings.mend(SAVE, NAME, 0, memoryview(GOOD))
    assert not unsound(holdings)


def test_a_damaged_header_is_mended_and_is_no_damage_any_more(store: Store, tmp_path: Path) -> None:
    holdings = held(store)
    (file,) = segment_files(tmp_path)
    flip_bit(file, find_payload(file, GOOD) - 1)
    store._core.known = {}
    assert unsound(holdings) and holdings.damaged_chunks == 1
    holdings.mend(SAVE, NAME, 0, memoryview(GOOD))
    assert not unsound(holdings) and holdings.damaged_chunks == 0


def test_a_payload_that_cannot_be_read_is_mended(store: Store, disk: FailingDisk) -> None:
    holdings = held(store)
    disk.fail("populate", errno.EIO)
    assert unsound(holdings)
    with pytest.raises(IntegrityError, match="can't be read here"):
        holdings.mend(SAVE, NAME, 0, memoryview(GOOD))  # no place of this disk can be read
    disk.mend()
    holdings.mend(SAVE, NAME, 0, memoryview(GOOD))
    assert not unsound(holdings)


def test_one_bad_place_is_left_for_another(store: Store, disk: FailingDisk) -> None:
    holdings = held(store)
    before = store.lookup(CHUNK)
    assert before is not None
    bad = before.payload.address
    real = type(disk).populate

    def populate(buffer: pa.Buffer, offset: int, size: int) -> None:
        if buffer.address + offset <= bad < buffer.address + offset + size:
            raise OSError(errno.EIO, "bad sector")
        real(disk, buffer, offset, size)

    disk.populate = populate  # type: ignore[method-assign]
    assert unsound(holdings)
    with pytest.raises(IntegrityError, match="another at another server"):
        holdings.mend(SAVE, NAME, 0, memoryview(payload(2)))  # the header tells, still
    holdings.mend(SAVE, NAME, 0, memoryview(GOOD))
    assert not unsound(holdings)


def test_bad_bytes_stay_until_there_is_room_for_good_ones(store: Store, tmp_path: Path) -> None:
    holdings = held(store)
    (file,) = segment_files(tmp_path)
    flip_bit(file, find_payload(file, GOOD) + 7)
    store.keep("full", True)
    with pytest.raises(OutOfSpace):
        for number in range(100, 300):
            store.put("full", ChunkId(save(str(number)).objects[f"{number}.distcp"].id, 0), MIB, bytes(MIB))
    room = store.usage()
    assert room.capacity_bytes - room.used_bytes < 2 * MIB
    with pytest.raises(OutOfSpace):
        for number in range(300, 3000):
            holdings._store.put(
                SAVE.namespace,
                ChunkId(save(str(number)).objects[f"{number}.distcp"].id, 0),
                4096,
                bytes(4096),
            )
    with pytest.raises(OutOfSpace):
        holdings.mend(SAVE, NAME, 0, memoryview(GOOD))
    assert store.contains(CHUNK)


# ---- the way to the others ----


class FakeSession:
    """Servers a (this one), b, c and d, in this order; c didn't say who it is, and d says nothing more."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refreshes = 0
        by_id = {
            id_: SimpleNamespace(server_id=id_, address=f"{id_}:1", lane=SimpleNamespace(read=self.read(id_)))
            for id_ in "abcd"
        }
        self.current = SimpleNamespace(by_id=by_id, missing=("c:1",), known=by_id.__getitem__)
        self.ordering = SimpleNamespace(order=lambda key, members: list(members.by_id))

    def refresh(self, seen: object, deadline: float) -> object:
        self.refreshes += 1
        return self.current

    def ask_member(self, member: Any, *_: object) -> None:
        self.asked.append(member.server_id)
        self.answer(member.server_id)

    def read(self, server: str) -> Callable[..., list[TorchCacheError]]:
        def read(*_: object, **__: object) -> list[TorchCacheError]:
            self.asked.append(server)
            self.answer(server)
            return [IntegrityError("none")]

        return read

    def answer(self, server: str) -> None:
        if server == "d":
            time.sleep(0.02)
            raise DeadlineExceeded("no word")

    def close(self) -> None:
        pass


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


@pytest.fixture
def peers(session: FakeSession, monkeypatch: pytest.MonkeyPatch) -> Peers:
    monkeypatch.setattr(peers_module, "SILENT_S", 0.01)
    peers = Peers("127.0.0.1:1", Access(token=None), server_id="a")
    some: Any = session
    peers._session = some
    peers.look()
    return peers


def test_who_is_silent_is_asked_nothing_more_until_the_next_look(session: FakeSession, peers: Peers) -> None:
    for name in ("one", "two"):
        for server in peers.others(save(name)):
            peers.holds(server, save(name))
    assert session.asked == ["b", "d", "b"]
    assert session.refreshes == 1
    peers.look()
    assert peers.others(SAVE) == ["b", "d"]


def test_a_chunk_is_asked_of_a_silent_one_once(session: FakeSession, peers: Peers) -> None:
    assert peers.fetch(SAVE, NAME, 0) is None
    assert peers.fetch(SAVE, NAME, 0) is None
    assert session.asked == ["b", "d", "b"]
