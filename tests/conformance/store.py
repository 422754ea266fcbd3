"""What every store must do, whatever it is built on: subclass `StoreContract` and say how to open one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from torchcache_server.store import Store, StoredChunk

from torchcache.errors import ConfigurationError, OutOfSpace, ServerUnavailable
from torchcache.model import CHUNK_BYTES, ChunkId, ObjectId, block_digests, chunk_digest

MIB = 1024 * 1024


def chunk(number: int, index: int = 0, version: str = "v1") -> ChunkId:
    return ChunkId(ObjectId("s3", f"bucket/key-{number}", version), index)


class StoreContract:
    """The contract of `Store`, by its public names alone."""

    capacity_bytes = 64 * MIB

    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[], Store]:
        """Opens the store of this test; called again after close, it opens the same one."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, open_store: Callable[[], Store]) -> Store:
        return open_store()

    @pytest.mark.parametrize("size", [0, 1, 63, 64, 16384, 16385, 114_660, CHUNK_BYTES])
    def test_gives_back_what_was_put(self, store: Store, size: int) -> None:
        data = bytes(i * 7 % 251 for i in range(256)) * (size // 256 + 1)
        data = data[:size]
        put = store.put("a", chunk(1), size + 5, data)
        for found in (put, store.lookup(chunk(1))):
            assert found is not None
            assert bytes(found.payload) == data
            assert found.object_size == size + 5
            assert found.digest == chunk_digest(data)
            assert found.block_digests == block_digests(data)
        assert store.verify(chunk(1))

    @pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, pa.py_buffer])
    def test_takes_any_buffer(self, store: Store, wrap: Callable[[bytes], bytes]) -> None:
        store.put("a", chunk(1), 3, wrap(b"abc"))
        found = store.lookup(chunk(1))
        assert found is not None
        assert bytes(found.payload) == b"abc"

    def test_payloads_are_read_only_views(self, store: Store) -> None:
        found = store.put("a", chunk(1), 3, b"abc")
        assert memoryview(found.payload).readonly
        assert found.payload.address % 64 == 0

    def test_pass_through_is_like_stored(self, store: Store) -> None:
        data = b"x" * 20_000
        assert StoredChunk.of(data, 7) == store.put("a", chunk(1), 7, data)

    @pytest.mark.parametrize(
        "other",
        [
            chunk(2),
            chunk(1, index=1),
            chunk(1, version="v2"),
            ChunkId(ObjectId("file", "bucket/key-1", "v1"), 0),
        ],
    )
    def test_identity_is_store_key_version_and_index(self, store: Store, other: ChunkId) -> None:
        store.put("a", chunk(1), 3, b"abc")
        assert store.lookup(other) is None
        assert not store.contains(other)
        assert not store.verify(other)

    def test_put_is_idempotent_across_namespaces(self, store: Store) -> None:
        store.put("a", chunk(1), 3, b"abc")
        again = store.put("b", chunk(1), 3, b"xyz")
        assert bytes(again.payload) == b"abc"
        assert store.usage().chunks == 1
        assert [n.name for n in store.namespaces()] == ["a"]

    def test_put_many_keeps_order_and_takes_duplicates(self, store: Store) -> None:
        store.put("a", chunk(3), 1, b"3")
        rows = [(chunk(n), 1, str(n).encode()) for n in (5, 3, 4, 5, 1)]
        assert [bytes(c.payload) for c in store.put_many("a", rows)] == [b"5", b"3", b"4", b"5", b"1"]
        assert store.usage().chunks == 4
        assert store.put_many("a", []) == []

    def test_put_many_stores_a_duplicate_once(self, store: Store) -> None:
        store.put_many("a", [(chunk(1), 3, b"abc")])
        once = store.usage().used_bytes
        store.put_many("b", [(chunk(2), 3, b"abc")] * 3)
        assert store.usage().used_bytes <= 2 * once
        assert store.usage().chunks == 2

    def test_lookup_many_answers_in_order_and_counts_each(self, store: Store) -> None:
        store.put("a", chunk(1), 3, b"abc")
        store.put("a", chunk(2), 2, b"de")
        found = store.lookup_many([chunk(2), chunk(3), chunk(1), chunk(2)])
        assert [None if f is None else bytes(f.payload) for f in found] == [b"de", None, b"abc", b"de"]
        assert (store.usage().hits, store.usage().misses) == (3, 1)
        assert store.lookup_many([]) == []

    def test_a_batch_larger_than_a_segment_goes_into_several(self, store: Store) -> None:
        data = b"y" * (MIB + 3)
        store.put_many("a", [(chunk(n), len(data), data) for n in range(30)])
        assert store.usage().segments >= 2
        assert all(store.verify(chunk(n)) for n in range(30))

    def test_counts_hits_and_misses_of_lookups_only(self, store: Store) -> None:
        store.put("a", chunk(1), 3, b"abc")
        store.lookup(chunk(1))
        store.lookup(chunk(2))
        store.lookup(chunk(2))
        store.contains(chunk(3))
        store.verify(chunk(4))
        usage = store.usage()
        assert (usage.hits, usage.misses) == (1, 2)

    def test_refuses_what_no_record_holds(self, store: Store) -> None:
        with pytest.raises(ConfigurationError, match="cut it at"):
            store.put("a", chunk(1), CHUNK_BYTES + 1, bytes(CHUNK_BYTES + 1))
        long = ChunkId(ObjectId("s3", "k" * 20_000, "v"), 0)
        with pytest.raises(ConfigurationError, match="name of object"):
            store.put("a", long, 1, b"x")
        assert store.usage().chunks == 0

    def test_refuses_a_namespace_that_no_header_holds(self, open_store: Callable[[], Store]) -> None:
        store = open_store()
        for call in (lambda n: store.put(n, chunk(1), 1, b"x"), lambda n: store.keep(n, True)):
            with pytest.raises(ConfigurationError, match="is too long"):
                call("n" * 20_000)
        longest = "n" * 16 * 1024
        store.put(longest, chunk(1), 1, b"x")
        store.keep(longest, True)
        store.close()
        store = open_store()
        assert [(n.name, n.chunks, n.kept) for n in store.namespaces()] == [(longest, 1, True)]

    def test_quarantine_forgets_and_counts(self, store: Store) -> None:
        store.put("a", chunk(1), 3, b"abc")
        store.quarantine(chunk(1))
        store.quarantine(chunk(1))
        store.quarantine(chunk(2))
        assert store.lookup(chunk(1)) is None
        assert store.usage().corrupt == 1
        assert bytes(store.put("a", chunk(1), 3, b"new").payload) == b"new"
        assert store.verify(chunk(1))

    def test_drop_removes_a_namespace_and_no_other(self, store: Store) -> None:
        view = store.put("a", chunk(1), 3, b"abc").payload
        store.put("b", chunk(2), 3, b"def")
        store.keep("a", True)
        before = store.usage().used_bytes
        freed = store.drop("a")
        assert freed > 0
        assert store.usage().used_bytes == before - freed
        assert store.lookup(chunk(1)) is None
        assert store.contains(chunk(2))
        assert [(n.name, n.kept) for n in store.namespaces()] == [("b", False)]
        assert bytes(view) == b"abc", "a view outlives its record"
        assert store.drop("a") == 0

    def test_namespaces_tell_what_they_hold(self, store: Store) -> None:
        store.put_many("a", [(chunk(n), 1000, bytes(1000)) for n in range(3)])
        store.pin("b", True)
        a, b = store.namespaces()
        assert (a.name, a.chunks, a.pinned, a.kept) == ("a", 3, False, False)
        assert a.bytes >= 3000
        assert (b.name, b.chunks, b.bytes, b.pinned, b.kept) == ("b", 0, 0, True, False)
        assert store.usage().used_bytes == a.bytes

    def test_names_never_become_paths(self, store: Store) -> None:
        for n, name in enumerate(["../../x", "/etc/passwd", "", "a/b", "x" * 5000, "é\0"]):
            store.put(name, chunk(n), 1, b"x")
            store.keep(name, True)
            assert store.contains(chunk(n))
        assert len(store.namespaces()) == 6

    # ---- room ----

    def fill(self, store: Store, namespace: str, first: int, mib: int) -> None:
        for n in range(first, first + mib):
            store.put(namespace, chunk(n), MIB, bytes([n % 256]) * MIB)

    def test_a_dataset_never_evicts_its_own(self, store: Store) -> None:
        with pytest.raises(OutOfSpace, match="is full"):
            self.fill(store, "a", 0, 80)
        resident = [n for n in range(80) if store.contains(chunk(n))]
        assert resident == list(range(len(resident))), "what came first stays"
        assert len(resident) >= 56
        assert store.usage().evicted_chunks == 0

    def test_the_dataset_used_longest_ago_yields(self, store: Store) -> None:
        self.fill(store, "a", 0, 20)
        self.fill(store, "b", 100, 20)
        self.fill(store, "c", 200, 18)
        assert store.lookup(chunk(0)) is not None  # now b is the oldest
        self.fill(store, "c", 300, 12)
        assert all(store.contains(chunk(n)) for n in range(20))
        assert not all(store.contains(chunk(100 + n)) for n in range(20))
        assert all(store.contains(chunk(300 + n)) for n in range(12))
        assert store.usage().evicted_chunks > 0
        assert store.usage().used_bytes <= self.capacity_bytes

    @pytest.mark.parametrize("flag", ["keep", "pin"])
    def test_kept_and_pinned_never_yield(self, store: Store, flag: str) -> None:
        protect = getattr(store, flag)
        self.fill(store, "a", 0, 30)
        protect("a", True)
        with pytest.raises(OutOfSpace, match="nothing may be evicted"):
            self.fill(store, "b", 100, 40)
        assert all(store.contains(chunk(n)) for n in range(30))
        protect("a", False)
        self.fill(store, "c", 200, 40)
        assert not all(store.contains(chunk(n)) for n in range(30))

    def test_a_view_outlives_eviction(self, store: Store) -> None:
        views = [store.put("a", chunk(n), MIB, bytes([n]) * MIB).payload for n in range(20)]
        self.fill(store, "b", 100, 60)
        assert not any(store.contains(chunk(n)) for n in range(8))
        assert all(bytes(v) == bytes([n]) * MIB for n, v in enumerate(views))

    def test_a_batch_that_does_not_fit_changes_nothing(self, store: Store) -> None:
        self.fill(store, "a", 0, 10)
        before = replace(store.usage(), free_bytes=0)
        data = bytes(MIB)
        with pytest.raises(OutOfSpace):
            store.put_many("b", [(chunk(100 + n), MIB, data) for n in range(80)])
        assert replace(store.usage(), free_bytes=0) == before
        assert store.contains(chunk(0))

    # ---- restart ----

    def test_survives_a_restart(self, open_store: Callable[[], Store]) -> None:
        store = open_store()
        identity = store.server_id
        store.put_many("a", [(chunk(n), 1000, bytes([n]) * 1000) for n in range(50)])
        store.pin("a", True)
        store.keep("b", True)
        store.put_record(b"r", b"value")
        store.quarantine(chunk(7))
        namespaces, used = store.namespaces(), store.usage()
        store.close()
        store = open_store()
        assert store.server_id == identity
        assert store.namespaces() == namespaces
        assert (store.usage().used_bytes, store.usage().chunks) == (used.used_bytes, 49)
        assert [n for n in range(50) if not store.verify(chunk(n))] == [7]
        assert store.get_record(b"r") == b"value"

    def test_goes_on_in_the_segment_it_left(self, open_store: Callable[[], Store]) -> None:
        for n in range(5):
            store = open_store()
            store.put("a", chunk(n), 3, b"abc")
            store.close()
        store = open_store()
        assert (store.usage().segments, store.usage().chunks) == (1, 5)

    def test_the_order_of_use_survives_a_restart(self, open_store: Callable[[], Store]) -> None:
        store = open_store()
        self.fill(store, "a", 0, 20)
        self.fill(store, "b", 100, 20)
        store.lookup(chunk(0))
        store.close()
        store = open_store()
        self.fill(store, "c", 200, 30)
        assert all(store.contains(chunk(n)) for n in range(20))
        assert not all(store.contains(chunk(100 + n)) for n in range(20))

    def test_closed_is_closed(self, store: Store) -> None:
        view = store.put("a", chunk(1), 3, b"abc").payload
        store.close()
        store.close()
        for call in (store.usage, lambda: store.lookup(chunk(1)), lambda: store.put("a", chunk(1), 1, b"x")):
            with pytest.raises(ServerUnavailable, match="is closed"):
                call()
        assert bytes(view) == b"abc"

    # ---- records ----

    def test_records(self, store: Store) -> None:
        assert store.get_record(b"save/1") is None
        for key in (b"save/2", b"save/1", b"other", b"save/../\0"):
            store.put_record(key, b"of " + key)
        store.put_record(b"save/1", b"")
        assert list(store.records(b"save/")) == [
            (b"save/../\0", b"of save/../\0"),
            (b"save/1", b""),
            (b"save/2", b"of save/2"),
        ]
        store.delete_record(b"save/1")
        store.delete_record(b"save/1")
        assert store.get_record(b"save/1") is None
        assert len(list(store.records(b""))) == 3

    # ---- threads ----

    def test_many_threads_put_and_read(self, store: Store) -> None:
        def work(thread: int) -> None:
            for n in range(40):
                number = n % 2 * 1000 + n * (1 + thread % 2)  # every other chunk is put by several threads
                data = number.to_bytes(4, "little") * 500
                assert bytes(store.put(f"ns{thread % 3}", chunk(number), 2000, data).payload) == data
                found = store.lookup(chunk(number))
                assert found is not None
                assert bytes(found.payload) == data

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(16)))
        assert store.usage().chunks == len({n % 2 * 1000 + n * f for n in range(40) for f in (1, 2)})

    def test_drop_and_evict_while_others_write_and_read(self, store: Store) -> None:
        stop = threading.Event()

        def churn(thread: int) -> None:
            n = 0
            while not stop.is_set():
                n += 1
                number = thread * 10_000 + n % 40
                data = bytes([thread, n % 40]) * (MIB // 4)
                try:
                    put = store.put(f"ns{thread}", chunk(number), len(data), data)
                except OutOfSpace:
                    store.drop(f"ns{thread}")
                    continue
                found = store.lookup(chunk(number))
                assert bytes(put.payload) == data
                assert found is None or bytes(found.payload) == data

        with ThreadPoolExecutor(4) as pool:
            work = [pool.submit(churn, t) for t in range(4)]
            for turn in range(60):
                store.drop(f"ns{turn % 4}")
                stop.wait(0.005)
            stop.set()
            for w in work:
                w.result()
        for name in range(4):
            store.drop(f"ns{name}")
        usage = store.usage()
        assert (usage.used_bytes, usage.chunks, usage.segments) == (0, 0, 0)
