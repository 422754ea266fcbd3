"""What the upload makes of trouble: an under-store that is away or refuses, shards that are damaged, others' writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torchcache_server.cache.saves import SaveKey
from torchcache_server.cache.slots import Slots
from write_back_world import (
    KEY,
    Bucket,
    Server,
    always_whole,
    assert_settled,
    manifest_of,
    metadata_of,
    parts_of,
    published,
    soon,
    stock_published,
)

from torchcache.errors import (
    AlreadyExists,
    ConfigurationError,
    IntegrityError,
    ServerUnavailable,
)
from torchcache.model import ChunkId, ObjectId

SHARD = f"{KEY.path}/__0_0.distcp"


def unreachable(call: str, key: str) -> None:
    raise ServerUnavailable("no route to the under-store")


def reachable(call: str, key: str) -> None:
    pass


def refused(call: str, key: str) -> None:
    raise ConfigurationError("403: no such key id")


@contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        yield server
    finally:
        server.write_back.close()


def test_saves_go_on_and_are_uploaded_when_the_under_store_comes_back() -> None:
    bucket = Bucket()
    always_whole(bucket)
    with running(Server(bucket, "a", threads=2)) as server:
        server.reserve("first")
        server.put("first")
        server.under_store.fail = unreachable
        assert server.commit("first") == "committed"
        assert server.write_back.drain(0.3) == ["s3://bucket/run/step-1"]
        assert server.state() == "committed first"
        assert server.write_back.pending_bytes == sum(len(data) for data in parts_of("first").values())
        assert server.store.kept == {KEY.namespace("first")}
        with pytest.raises(ServerUnavailable):
            server.reserve("other", SaveKey("s3", "run/step-2"))
        server.under_store.fail = reachable
        assert server.write_back.drain(60.0) == []
        assert server.state() == "durable first"
        assert server.write_back.pending_bytes == 0
        assert not server.store.kept
    assert_settled(bucket, "first")


def test_a_backlog_survives_the_stop_of_the_server() -> None:
    """F36"""
    bucket = Bucket()
    with running(Server(bucket, "a", threads=1)) as server:
        keys = [SaveKey("s3", f"run/step-{i}") for i in range(3)]
        for i, key in enumerate(keys):
            server.reserve(f"save {i}", key)
        server.under_store.fail = unreachable
        for i, key in enumerate(keys):
            server.put(f"save {i}", key)
            server.commit(f"save {i}", key)
        assert server.write_back.drain(0.1) == [f"s3://bucket/{key.path}" for key in keys]
        server.restart()
        assert server.write_back.drain(60.0) == []
        for i, key in enumerate(keys):
            assert published(bucket, key) == f"save {i}"


def test_what_the_under_store_refuses_is_kept_told_and_mended() -> None:
    bucket = Bucket()
    with running(Server(bucket, "a", threads=1)) as server:
        server.reserve("first")
        server.put("first")
        server.under_store.fail = refused
        server.commit("first")
        assert server.write_back.drain(60.0) == ["s3://bucket/run/step-1"]
        status = server.write_back.get(KEY, deadline=soon())
        assert status.state == "failed"
        assert isinstance(status.error, ConfigurationError)
        assert status.manifest == manifest_of("first")
        assert status.pending_bytes == status.total_bytes
        assert server.store.kept == {KEY.namespace("first")}
        with pytest.raises(AlreadyExists):
            server.reserve("second")
        server.under_store.fail = reachable
        server.write_back.retry_failed()
        wait_until_settled(server)
        assert_settled(bucket, "first")


def test_a_refused_upload_is_tried_again_after_a_restart() -> None:
    bucket = Bucket()
    server = Server(bucket, "a")
    server.save("first")
    server.under_store.fail = refused
    with pytest.raises(ConfigurationError):
        server.upload()
    server.restart()
    assert server.state() == "failed first"
    server.upload()
    assert_settled(bucket, "first")


def test_a_damaged_shard_is_never_published() -> None:
    """F5, F34"""
    bucket = Bucket()
    server = Server(bucket, "a")
    server.save("first")
    object = ObjectId("s3", SHARD, "save:first")
    chunks = server.store.chunks[KEY.namespace("first")]
    good = chunks[ChunkId(object, 0)]
    server.store.put(KEY.namespace("first"), ChunkId(object, 0), good.object_size, b"x" * good.object_size)
    bad = chunks[ChunkId(object, 0)]
    chunks[ChunkId(object, 0)] = type(bad)(bad.object_size, bad.payload, good.digest, b"")
    server.upload()
    status = server.write_back.get(KEY, deadline=soon())
    assert status.state == "failed"
    assert isinstance(status.error, IntegrityError)
    assert "__0_0.distcp" in str(status.error)
    assert SHARD not in bucket.objects
    assert KEY.claim_key not in bucket.objects
    server.save("second")  # a path that holds nothing one could load is free
    server.upload()
    assert_settled(bucket, "second")


def test_a_shard_that_vanished_from_the_store_fails_the_save() -> None:
    server = Server(Bucket(), "a")
    server.save("first")
    del server.store.chunks[KEY.namespace("first")]
    server.upload()
    with pytest.raises(IntegrityError, match="gone from the store"):
        raise server.write_back.get(KEY, deadline=soon()).error or AssertionError


def test_a_shard_that_another_tool_overwrote_is_uploaded_again_before_the_publication() -> None:
    bucket = Bucket()
    server = Server(bucket, "a")
    server.save("first")
    overwritten = []

    def fail(call: str, key: str) -> None:
        if call == "write" and key == KEY.metadata_key and not overwritten:
            overwritten.append(key)
            bucket.objects[SHARD] = b"another tool's"
            raise ServerUnavailable("and the network goes")

    server.under_store.fail = fail
    with pytest.raises(ServerUnavailable):
        server.upload()
    always_whole(bucket)
    server.upload()
    assert_settled(bucket, "first")


def test_metadata_equal_to_ours_is_withdrawn_before_the_first_shard() -> None:
    """Equal metadata of the checkpoint before would make a mixture of old and new shards readable."""
    bucket = Bucket()
    for name in parts_of("first"):
        bucket.objects[f"{KEY.path}/{name}"] = b"old"
    bucket.objects[KEY.metadata_key] = metadata_of("first")
    server = Server(bucket, "a")
    server.reserve("first", overwrite=True)
    server.put("first")
    server.commit("first")

    def watch() -> None:
        if any(bucket.objects[f"{KEY.path}/{name}"] != b"old" for name in parts_of("first")):
            stock_published(bucket)

    bucket.watch = watch
    server.upload()
    assert_settled(bucket, "first")


@pytest.mark.parametrize("name", [KEY.metadata_key, KEY.manifest_key])
def test_what_others_publish_at_the_path_meanwhile_stays(name: str) -> None:
    bucket = Bucket()
    server = Server(bucket, "a")
    server.save("first")
    bucket.objects[name] = b"another program's"
    server.upload()
    status = server.write_back.get(KEY, deadline=soon())
    assert (status.state, status.save_id) in (("failed", "first"), ("durable", ""))
    assert bucket.objects == {name: b"another program's"}


def test_an_error_nobody_foresaw_doesnt_end_the_upload() -> None:
    bucket = Bucket()
    met = threading.Event()
    with running(Server(bucket, "a", threads=1)) as server:
        server.reserve("first")
        server.put("first")

        def fail(call: str, key: str) -> None:
            if key == SHARD and not met.is_set():
                met.set()
                raise RuntimeError("a bug")

        server.under_store.fail = fail
        server.commit("first")
        assert server.write_back.drain(60.0) == []
        assert met.is_set()
        assert_settled(bucket, "first")


def wait_until_settled(server: Server) -> None:
    """Until every save is durable and its claim gone; the test's own time limit ends the wait."""
    slots: Slots = server.write_back._slots
    with slots.changed:
        slots.changed.wait_for(
            lambda: all(s.save and s.save.state == "durable" and not s.save.claimed for s in slots.all())
        )
