"""What holds at the pool whatever the lane and the number of servers. A subclass says both."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.conformance.lane import RANGES, RANGES_SIZE, SIZES
from tests.conformance.pool_servers import PoolServers
from tests.integration.self_describing import content, part
from tests.unit.store_parts import descriptors
from torchcache.connecting import connect
from torchcache.errors import (
    ConfigurationError,
    DeadlineExceeded,
    IntegrityError,
    NotResident,
    ObjectChanged,
    ObjectNotFound,
    ServerUnavailable,
    TorchCacheError,
    TransientError,
)
from torchcache.model import BLOCK_BYTES, CHUNK_BYTES, STRIPE_BYTES, Extent, ObjectId, ObjectInfo
from torchcache.pool import Pool
from torchcache.save_names import save_namespace

CLOSES_S = 60.0
"""For gRPC to close the sockets of channels that were closed, on a machine under load."""


def read_in_child(pool: Pool, extents: list[Extent], namespace: str, done: Connection) -> None:
    try:
        views = pool.read(extents, namespace=namespace)
        done.send(([bytes(view) for view in views], sorted(set(pool.statistics().lanes.values()))))
    except BaseException as error:
        done.send(error)


class PoolContract:
    """The contract of `Pool.read`, `read_each` and `write`. The servers live as long as the class."""

    lane: str
    count: int

    @pytest.fixture(scope="class")
    @classmethod
    def servers(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolServers]:
        with PoolServers(tmp_path_factory.mktemp("pool"), cls.count) as servers:
            yield servers

    @pytest.fixture
    def pool(self, servers: PoolServers) -> Iterator[Pool]:
        pool = servers.connect(self.lane)
        yield pool
        pool.close()

    @pytest.fixture
    def own(self, tmp_path: Path) -> Iterator[PoolServers]:
        """Servers of the test's own, to be harmed."""
        with PoolServers(tmp_path, self.count) as servers:
            yield servers

    # ---- right bytes ----

    def test_the_lane_is_the_one_asked_for(self, servers: PoolServers, pool: Pool) -> None:
        info = servers.make("lane/1", 10)
        pool.read([Extent(info)], namespace=servers.namespace("lane"))
        assert pool.statistics().lanes == {server.address: self.lane for server in servers.servers}

    def test_every_size_cold_and_warm(self, servers: PoolServers, pool: Pool) -> None:
        infos = [servers.make(f"sizes/{size}", size) for size in SIZES]
        extents, namespace = [Extent(info) for info in infos], servers.namespace("sizes")
        for resident_only in (False, True):
            outcomes = pool.read_each(extents, namespace=namespace, resident_only=resident_only)
            for size, outcome in zip(SIZES, outcomes, strict=True):
                assert outcome == content(f"sizes/{size}", 0, size), (size, outcome)

    def test_ranges_in_views_and_in_buffers(self, servers: PoolServers, pool: Pool) -> None:
        """Of an object whose stripes lie with several servers, where there are several."""
        size = RANGES_SIZE + STRIPE_BYTES
        info, namespace = servers.make("ranges/1", size), servers.namespace("ranges")
        spans = [(start, size if length < 0 else start + length) for start, length in RANGES]
        spans += [(STRIPE_BYTES - 5, 2 * STRIPE_BYTES + 5), (2 * STRIPE_BYTES - 1, 2 * STRIPE_BYTES + 1)]
        extents = [Extent(info, start, end - start) for start, end in spans]
        right = [part("ranges/1", 0, start, end) for start, end in spans]
        for _ in range(2):
            assert pool.read(extents, namespace=namespace) == right
        memory = [bytearray(b"\xee" * (end - start + 7)) for start, end in spans]
        pool.read(extents, namespace=namespace, into=[memoryview(m) for m in memory])
        assert memory == [data + b"\xee" * 7 for data in right]

    def test_samples_of_every_size_known_and_unknown(self, servers: PoolServers, pool: Pool) -> None:
        """Many in one call, each twice, in any order."""
        ids = {size: ObjectId("samples", f"pool/{size}", "1") for size in SIZES}
        pool.write("samples:pool@1", [(id_, [content("s", 0, size)]) for size, id_ in ids.items()])
        order = [size for size in SIZES for _ in range(2)]
        random.Random(5).shuffle(order)
        for known in (True, False):
            extents = [Extent(ObjectInfo(ids[size], size if known else -1)) for size in order]
            assert pool.read(extents) == [content("s", 0, size) for size in order]

    def test_a_batch_of_many(self, servers: PoolServers, pool: Pool) -> None:
        """Cold ones, warm ones, duplicates and missing ones in one call, half of them into buffers."""
        sizes = [1000 + 617 * i for i in range(120)]
        infos = [servers.make(f"many/{i}", size) for i, size in enumerate(sizes)]
        namespace = servers.namespace("many")
        pool.read([Extent(info) for info in infos[::3]], namespace=namespace)
        servers.remove("many/1")
        order = [*range(120), *range(0, 120, 7)]
        into = [memoryview(bytearray(sizes[i])) for i in order]
        for buffers in (None, into):
            outcomes = pool.read_each([Extent(infos[i]) for i in order], namespace=namespace, into=buffers)
            for i, outcome in zip(order, outcomes, strict=True):
                if i == 1:
                    assert isinstance(outcome, ObjectNotFound)
                else:
                    assert outcome == content(f"many/{i}", 0, sizes[i])

    # ---- errors ----

    def test_what_is_not_there_is_said(self, servers: PoolServers, pool: Pool) -> None:
        sample = Extent(ObjectInfo(ObjectId("samples", "none", "1"), -1))
        cold, namespace = Extent(servers.make("cold/1", 1000)), servers.namespace("cold")
        outcomes = pool.read_each([sample, cold], namespace=namespace, resident_only=True)
        assert [type(outcome) for outcome in outcomes] == [NotResident, NotResident]
        with pytest.raises(NotResident, match="none"):
            pool.read([cold, sample], namespace=namespace)
        with pytest.raises(ConfigurationError):
            pool.read([Extent(ObjectInfo(ObjectId("elsewhere", "x", "1"), 5))])
        missing = ObjectInfo(ObjectId("file", "no/such/file", "5-5"), 5)
        assert isinstance(pool.read_each([Extent(missing)])[0], ObjectNotFound)

    def test_a_source_that_changed(self, servers: PoolServers, pool: Pool) -> None:
        """The version that was pinned, or ObjectChanged; each stripe for itself, and never a mixture."""
        size = STRIPE_BYTES + CHUNK_BYTES
        old, namespace = servers.make("changed/1", size), servers.namespace("changed")
        pool.read([Extent(old, 0, 10)], namespace=namespace)
        new = servers.make("changed/1", size, generation=1)
        spans = [(0, CHUNK_BYTES), (0, size), (STRIPE_BYTES, size)]
        outcomes = pool.read_each([Extent(old, a, b - a) for a, b in spans], namespace=namespace)
        assert outcomes[0] == part("changed/1", 0, 0, CHUNK_BYTES)
        assert [type(outcome) for outcome in outcomes[1:]] == [ObjectChanged, ObjectChanged]
        assert pool.read([Extent(new)], namespace=namespace) == [content("changed/1", 1, size)]

    @pytest.mark.usefixtures("no_hedges")
    @pytest.mark.parametrize("at", [0, 20_000, 2 * BLOCK_BYTES - 1, 99_992])
    def test_damage_on_disk_is_put_right_within_the_call(
        self, servers: PoolServers, pool: Pool, at: int
    ) -> None:
        """F5: whole, into a buffer, and as a range, among others that are well; and it stays right."""
        name, size = f"damage-{at}", 100_000
        keys = [f"{name}/{number}" for number in range(12)]
        right = [content(key, 0, size) for key in keys]
        extents = [Extent(servers.make(key, size)) for key in keys]
        extents[2] = Extent(extents[2].object, at - at % 100, 100)
        namespace = servers.namespace(name)
        for _ in range(2):
            pool.read(extents, namespace=namespace)
        before = sum(server.corrupt for server in pool.status())
        for number in range(3):
            servers.overwrite(namespace, right[number], at, random.Random(number).randbytes(8))
        into = [memoryview(bytearray(size)) for _ in keys]
        into[0] = memoryview(bytearray(size + 1))
        right[2] = right[2][at - at % 100 :][:100]
        for buffers in (into, None):
            assert pool.read(extents, namespace=namespace, into=buffers) == right
            assert sum(server.corrupt for server in pool.status()) == before + 3

    def test_damage_of_what_has_no_source(self, servers: PoolServers, pool: Pool) -> None:
        """A sample is one to compute again; a file of a save an IntegrityError, and it stays."""
        sample, save = ObjectId("samples", "broken", "1"), ObjectId("file", "run/x", "save:0123")
        places = {sample: "samples:broken@1", save: save_namespace("file", "run", "0123")}
        right = {id_: content(id_.key, 0, 90_000) for id_ in places}
        for id_, namespace in places.items():
            pool.write(namespace, [(id_, [right[id_]])], durable=id_.is_save)
        extents = [Extent(ObjectInfo(id_, 90_000)) for id_ in places]
        assert pool.read(extents) == list(right.values())
        for id_, namespace in places.items():
            servers.overwrite(namespace, right[id_], 50_000, b"\0\0\0\0")
        outcomes = pool.read_each(extents)
        assert [type(outcome) for outcome in outcomes] == [NotResident, IntegrityError]
        sound = pool.read([Extent(ObjectInfo(save, 90_000), 0, 2 * BLOCK_BYTES)])
        assert sound == [right[save][: 2 * BLOCK_BYTES]], "blocks that are sound are still to be had"

    def test_a_deadline_that_has_passed(self, servers: PoolServers, pool: Pool) -> None:
        info, namespace = servers.make("late/1", 1000), servers.namespace("late")
        pool.status()
        with pytest.raises(DeadlineExceeded):
            pool.read([Extent(info)], namespace=namespace, timeout_s=0.0)

    def test_a_wrong_token(self, servers: PoolServers) -> None:
        pool = servers.connect(self.lane, token="wrong" * 8)
        with pytest.raises(ConfigurationError, match="token"):
            pool.read([Extent(servers.make("token/1", 10))])

    def test_no_server(self) -> None:
        pool = connect("127.0.0.1:1", token="x" * 32, lane=self.lane)
        with pytest.raises(ServerUnavailable):
            pool.read([Extent(ObjectInfo(ObjectId("samples", "x", "1"), -1))], timeout_s=1.5)

    def test_bad_arguments(self, servers: PoolServers, pool: Pool) -> None:
        info, namespace = servers.make("bad/1", 1000), servers.namespace("bad")
        for extent in (Extent(info, 5, 996), Extent(info, -1, 5), Extent(info, 1001), Extent(info, 0, -2)):
            with pytest.raises(ConfigurationError):
                pool.read([extent], namespace=namespace)
        for into in ([memoryview(bytearray(999))], [memoryview(bytes(1000))], []):
            with pytest.raises(ConfigurationError):
                pool.read([Extent(info)], namespace=namespace, into=into)

    # ---- views ----

    def test_views_stay_what_they_were(self, own: PoolServers) -> None:
        """Over eviction, recycling of the files below, the end of the servers, and the closing of the pool."""
        pool = own.connect(self.lane)
        keys = [f"views/{i}" for i in range(12)]
        infos = [own.make(key, 3_000_000) for key in keys]
        namespace = own.namespace("views")
        pool.read([Extent(info) for info in infos], namespace=namespace)
        views = pool.read([Extent(info) for info in infos], namespace=namespace)
        views += pool.read([Extent(info, 70_000, 50_000) for info in infos], namespace=namespace)
        assert all(view.readonly for view in views)
        pool.evict(namespace)
        others = [own.make(f"others/{i}", 3_000_000) for i in range(12)]
        for _ in range(2):
            pool.read([Extent(info) for info in others], namespace=own.namespace("others"))
            pool.evict(own.namespace("others"))
        for server in own.servers:
            server.end(signal.SIGKILL)
        pool.close()
        right = [content(key, 0, 3_000_000) for key in keys]
        assert views == right + [data[70_000:120_000] for data in right]

    # ---- ends and beginnings ----

    def test_a_server_that_is_killed_and_comes_back(self, own: PoolServers) -> None:
        """With others its part is theirs meanwhile; alone it is waited for. What it held it holds again."""
        pool = own.connect(self.lane)
        infos = [own.make(f"killed/{i}", 200_000) for i in range(30)]
        right = [content(f"killed/{i}", 0, 200_000) for i in range(30)]
        extents, namespace = [Extent(info) for info in infos], own.namespace("killed")
        assert pool.read(extents, namespace=namespace) == right
        own.servers[0].end(signal.SIGKILL)
        outcomes = pool.read_each(extents, namespace=namespace, timeout_s=5.0 if self.count == 1 else 60.0)
        for outcome, data in zip(outcomes, right, strict=True):
            assert outcome == data or (self.count == 1 and isinstance(outcome, TransientError))
        own.servers[0].start()
        again = own.connect(self.lane)
        assert again.read(extents, namespace=namespace) == right
        again.close()
        pool.close()

    def test_readers_do_not_notice_evictions(self, servers: PoolServers, pool: Pool) -> None:
        """Threads read over and over what another one evicts."""
        infos = [servers.make(f"storm/{i}", 150_000) for i in range(20)]
        right = [content(f"storm/{i}", 0, 150_000) for i in range(20)]
        extents, namespace = [Extent(info) for info in infos], servers.namespace("storm")
        stop, wrong = threading.Event(), []

        def keep_reading() -> None:
            while not stop.is_set():
                for outcome, data in zip(pool.read_each(extents, namespace=namespace), right, strict=True):
                    if outcome != data:
                        wrong.append(outcome)

        readers = [threading.Thread(target=keep_reading) for _ in range(3)]
        for reader in readers:
            reader.start()
        try:
            for _ in range(15):
                pool.evict(namespace)
                pool.read(extents[:5], namespace=namespace)
        finally:
            stop.set()
            for reader in readers:
                reader.join()
        assert not wrong

    @pytest.mark.parametrize("start_method", ["fork", "spawn"])
    def test_a_child_uses_the_pool(self, servers: PoolServers, pool: Pool, start_method: str) -> None:
        """F29: made amid reads of other threads, on the same lane; and the parent goes on."""
        infos = [servers.make(f"child/{i}", 50_000) for i in range(10)]
        right = [content(f"child/{i}", 0, 50_000) for i in range(10)]
        extents, namespace = [Extent(info) for info in infos], servers.namespace("child")
        held = pool.read(extents, namespace=namespace)
        stop, wrong = threading.Event(), list[TorchCacheError | memoryview]()

        def keep_reading() -> None:
            while not stop.is_set():
                outcomes = pool.read_each(extents, namespace=namespace)
                wrong.extend(o for o, data in zip(outcomes, right, strict=True) if o != data)

        reader = threading.Thread(target=keep_reading)
        reader.start()
        context = multiprocessing.get_context(start_method)
        try:
            for _ in range(3 if start_method == "fork" else 1):
                receive, send = context.Pipe(duplex=False)
                child = context.Process(
                    target=read_in_child, args=(pool, extents, namespace, send), daemon=True
                )
                child.start()
                send.close()
                assert receive.poll(300), f"a child by {start_method} hangs"
                assert receive.recv() == (right, [self.lane])
                child.join(300)
                receive.close()
        finally:
            stop.set()
            reader.join()
        assert not wrong
        assert held == right

    def test_it_pickles(self, servers: PoolServers, pool: Pool) -> None:
        info, namespace = servers.make("pickle/1", 5000), servers.namespace("pickle")
        copy = pickle.loads(pickle.dumps(pool))
        assert copy.read([Extent(info)], namespace=namespace) == [content("pickle/1", 0, 5000)]
        assert set(copy.statistics().lanes.values()) == {self.lane}
        copy.close()

    def test_nothing_is_left_open(self, servers: PoolServers, pool: Pool) -> None:
        """I5: pools come and go, and descriptors and mappings are as before."""
        infos = [servers.make(f"leak/{i}", 20_000) for i in range(10)]
        namespace = servers.namespace("leak")

        def use() -> int:
            one = servers.connect(self.lane)
            for _ in range(10):
                one.read([Extent(info) for info in infos], namespace=namespace)
            one.close()
            return Path("/proc/self/maps").read_text().count(".segment")

        mapped = max(use() for _ in range(3))
        most = descriptors() + 2  # gRPC opens one now and then
        assert [use() for _ in range(20)][-1] <= mapped
        deadline = time.monotonic() + CLOSES_S
        while descriptors() > most and time.monotonic() < deadline:
            time.sleep(0.05)
        assert descriptors() <= most
