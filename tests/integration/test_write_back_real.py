"""Saves over the real store and real under-stores: POSIX, and S3 as SeaweedFS speaks it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest
from torchcache_server.cache.saves import SaveKey
from torchcache_server.understore import UnderStore, create
from write_back_parts import KEY, Server, assert_published, lies_there, shard, soon

from examples.seaweedfs import SeaweedFS
from torchcache.errors import AlreadyExists, NotCommitted, Overloaded
from torchcache.model import CHUNK_BYTES, ByteRange, ChunkId, ObjectId

CHILD = Path(__file__).with_name("write_back_child.py")


class SavesConformance:
    """What holds over any under-store. A subclass gives the fixture `under_store`."""

    @pytest.fixture
    def server(self, tmp_path: Path, under_store: UnderStore) -> Iterator[Server]:
        server = Server(tmp_path / "a", under_store)
        yield server
        server.close()

    def test_a_save_becomes_durable_and_leaves_nothing_else(
        self, server: Server, under_store: UnderStore
    ) -> None:
        with pytest.raises(NotCommitted):
            server.state()
        server.save("first")
        assert server.state() in ("committed first", "durable first")
        assert server.write_back.drain(60) == []
        assert server.state() == "durable first"
        assert_published(under_store, "first")
        assert [usage.kept for usage in server.store.namespaces()] == [False]
        assert [status.save_id for status in server.write_back.list("under", "run/", deadline=soon())] == [
            "first"
        ]

    def test_overwriting_over_and_over(self, server: Server, under_store: UnderStore) -> None:
        for number in range(4):
            server.save(f"save {number}", overwrite=True)
        assert server.write_back.drain(60) == []
        assert_published(under_store, "save 3")
        with pytest.raises(AlreadyExists, match="pass overwrite=True or another path"):
            server.save("one more")

    def test_a_stopped_server_goes_on_where_it_was(self, tmp_path: Path, under_store: UnderStore) -> None:
        """F36"""
        keys = [SaveKey("under", f"run/step-{i}") for i in range(4)]
        for _ in keys:
            server = Server(tmp_path / "a", under_store)
            for i, key in enumerate(keys):
                try:
                    server.save(f"save {i}", key)
                except AlreadyExists:
                    continue
                break
            server.close()
        server = Server(tmp_path / "a", under_store)
        assert server.write_back.drain(60) == []
        for i, key in enumerate(keys):
            assert_published(under_store, f"save {i}", key)
            assert server.state(key) == f"durable save {i}"
        server.close()

    def test_of_many_writers_in_two_servers_one_wins(self, tmp_path: Path, under_store: UnderStore) -> None:
        """F31"""
        with ExitStack() as stack:
            # A lease that a slow storage doesn't outlast: a pool that can't tell it of a commit commits alone.
            servers = [Server(tmp_path / name, under_store, lease_s=20.0) for name in ("a", "b")]
            for server in servers:
                stack.callback(server.close)
            start = threading.Barrier(6)

            def write(number: int) -> str | None:
                start.wait()
                try:
                    servers[number % 2].save(f"save {number}")
                except AlreadyExists:
                    return None
                return f"save {number}"

            with ThreadPoolExecutor(6) as threads:
                winners = [winner for winner in threads.map(write, range(6)) if winner]
            assert len(winners) == 1
            for server in servers:
                assert server.write_back.drain(60) == []
            assert_published(under_store, winners[0])
            assert [server.state() for server in servers] == [f"durable {winners[0]}"] * 2

    def test_a_path_reserved_by_a_server_that_died_is_taken_over(
        self, tmp_path: Path, under_store: UnderStore
    ) -> None:
        dead = Server(tmp_path / "a", under_store)
        dead.write_back.reserve(KEY, "first", writer="first", overwrite=False, deadline=soon())
        dead.put("first")
        dead.close()
        assert list(lies_there(under_store)) == [".torchcache.save.json"]
        with ExitStack() as stack:
            alive = Server(tmp_path / "b", under_store)
            stack.callback(alive.close)
            alive.save("second")
            assert alive.write_back.drain(60) == []
            back = Server(tmp_path / "a", under_store)
            stack.callback(back.close)
            assert back.store.namespaces() == []
            assert back.state() == "durable second"
        assert_published(under_store, "second")

    def test_an_object_is_published(self, server: Server, under_store: UnderStore) -> None:
        data = shard("published", CHUNK_BYTES + 7)
        object = ObjectId("under", "some/file", "save:w1")
        chunks = [
            (ChunkId(object, i), len(data), data[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]) for i in range(2)
        ]
        server.store.put_many("put:under/some/file@w1", chunks)
        info = None
        while info is None:
            info = server.write_back.publish(
                "under", "some/file", "w1", len(data), create_only=True, wait_s=0.05
            )
        assert bytes(under_store.read(info, ByteRange(0, len(data)), deadline=soon())) == data
        server.store.put_many(
            "put:under/some/file@w2", [(ChunkId(ObjectId("under", "some/file", "save:w2"), 0), 1, b"x")]
        )
        with pytest.raises(AlreadyExists):
            server.write_back.publish("under", "some/file", "w2", 1, create_only=True, wait_s=60)
        assert server.store.namespaces() == []


class TestPosix(SavesConformance):
    @pytest.fixture
    def under_store(self, tmp_path: Path) -> UnderStore:
        (tmp_path / "files").mkdir()
        return create("under", f"file://{tmp_path}/files")


class TestS3(SavesConformance):
    @pytest.fixture
    def under_store(self, s3: SeaweedFS) -> Iterator[UnderStore]:
        under_store = create("under", f"s3://{s3.make_bucket()}/prefix")
        yield under_store
        under_store.close()


def test_saves_wait_while_too_much_waits_for_its_upload(tmp_path: Path) -> None:
    """F35"""
    (tmp_path / "files").mkdir()
    in_the_way = tmp_path / "files" / KEY.path / "__0_0.distcp" / "in the way"
    in_the_way.mkdir(parents=True)
    under_store, other = create("under", f"file://{tmp_path}/files"), SaveKey("under", "run/step-2")
    with closing(Server(tmp_path / "a", under_store, lease_s=30.0, max_pending_bytes=1024)) as server:
        server.save("first")
        assert {state: n for state, n in server.write_back.counts().items() if n} == {"cached": 1}
        reserve = partial(server.write_back.reserve, other, "second", writer="w", overwrite=False)
        with pytest.raises(Overloaded, match="wait for their upload, 1024 may"):
            reserve(deadline=time.monotonic() + 0.05)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(reserve, deadline=soon())
            in_the_way.rmdir()
            in_the_way.parent.rmdir()
            server.write_back.retry_failed()
            assert waiting.result(60) == 30.0
        reserve(deadline=soon())  # one that is begun goes on, whatever waits meanwhile
        server.put("second", other)
        server.commit("second", other)
        assert server.write_back.drain(60) == []
        assert {state: n for state, n in server.write_back.counts().items() if n} == {"durable": 2}


def test_a_server_killed_again_and_again_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    """F2, F36, by SIGKILL: a process saves step after step over a real store, until it is shot; then the next one."""
    (tmp_path / "files").mkdir()
    uri = f"file://{tmp_path}/files"
    acknowledged: set[str] = set()
    for number in range(4):
        command = [sys.executable, str(CHILD), str(tmp_path / "store"), uri, f"round-{number}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(2 + 3 * number):
                acknowledged.add(child.stdout.readline().strip())
            child.kill()
            acknowledged |= {line.strip() for line in child.stdout if line.endswith("\n")}
    assert "" not in acknowledged
    with closing(Server(tmp_path / "store", create("under", uri))) as server:
        assert server.write_back.drain(60) == []
        for save_id in acknowledged:
            assert_published(server.under_store, save_id, SaveKey("under", save_id))
        for status in server.write_back.list("under", "", deadline=soon()):
            assert status.state == "durable"
            assert_published(server.under_store, status.save_id, status.key)
        assert not any(usage.kept for usage in server.store.namespaces())
