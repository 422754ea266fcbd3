"""Objects written through the pool."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from write_back_world import Bucket, Server

from torchcache.errors import (
    AlreadyExists,
    ConfigurationError,
    IntegrityError,
    NotResident,
    ServerUnavailable,
)
from torchcache.model import CHUNK_BYTES, ChunkId, ObjectId, ObjectInfo

DATA = bytes(range(256)) * (CHUNK_BYTES // 256) + b"the rest"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(Bucket(), "a", threads=2)
    yield server
    server.write_back.close()


def put(server: Server, write_id: str, data: bytes = DATA, key: str = "folder/file") -> None:
    object = ObjectId("s3", key, f"save:{write_id}")
    for index in range(ObjectInfo(object, len(data)).chunk_count):
        chunk = ChunkId(object, index)
        payload = data[chunk.offset : chunk.offset + CHUNK_BYTES]
        server.store.put(f"put:s3/{key}@{write_id}", chunk, len(data), payload)


def publish(
    server: Server, write_id: str, size: int = len(DATA), *, create_only: bool = False
) -> ObjectInfo | None:
    return server.write_back.publish(
        "s3", "folder/file", write_id, size, create_only=create_only, wait_s=30.0
    )


def test_an_object_is_published_once_and_its_bytes_leave_the_store(server: Server) -> None:
    put(server, "w1")
    info = publish(server, "w1")
    assert info is not None
    assert info.size == len(DATA)
    assert info.id == ObjectId("s3", "folder/file", server.bucket.version("folder/file"))
    assert server.bucket.objects["folder/file"] == DATA
    assert server.namespaces == []
    assert publish(server, "w1") == info
    assert [what for what in server.gate.log if what.startswith("write")] == ["write folder/file"]


def test_an_empty_object(server: Server) -> None:
    assert publish(server, "w1", 0) is not None
    assert server.bucket.objects["folder/file"] == b""


def test_to_create_is_not_to_overwrite(server: Server) -> None:
    server.bucket.objects["folder/file"] = b"old"
    put(server, "w1")
    for _ in range(2):
        with pytest.raises(AlreadyExists):
            publish(server, "w1", create_only=True)
    assert server.bucket.objects["folder/file"] == b"old"
    assert server.namespaces == []
    put(server, "w2")
    assert publish(server, "w2") is not None
    assert server.bucket.objects["folder/file"] == DATA


def test_what_was_not_put_is_not_published(server: Server) -> None:
    with pytest.raises(
        NotResident, match=r"s3://bucket/folder/file can't be published: chunk 0 of 2 isn't there"
    ):
        publish(server, "w1")
    put(server, "w1", DATA[:100])
    with pytest.raises(NotResident, match="was written with 100 bytes in all"):
        publish(server, "w1", 99)
    assert not server.bucket.objects


def test_an_upload_that_meets_a_dead_network_goes_on_when_it_is_back(server: Server) -> None:
    """The caller isn't held: it asks again."""
    tries = threading.Semaphore(0)

    def fail(call: str, key: str) -> None:
        tries.release()
        raise ServerUnavailable("no route")

    server.under_store.fail = fail
    put(server, "w1")
    assert (
        server.write_back.publish("s3", "folder/file", "w1", len(DATA), create_only=True, wait_s=0.0) is None
    )
    assert server.write_back.pending_bytes == len(DATA)
    for _ in range(3):
        tries.acquire()
    assert server.write_back.drain(0.05) == ["s3://bucket/folder/file"]
    server.under_store.fail = lambda call, key: None
    assert publish(server, "w1", create_only=True) is not None
    assert server.write_back.drain(5.0) == []
    assert server.write_back.pending_bytes == 0


def test_a_damaged_chunk_is_not_published(server: Server) -> None:
    put(server, "w1")
    chunks = server.store.chunks["put:s3/folder/file@w1"]
    chunk = next(iter(chunks))
    good = chunks[chunk]
    chunks[chunk] = type(good)(good.object_size, good.payload, good.digest + 1, b"")
    with pytest.raises(IntegrityError, match="damaged in the store"):
        publish(server, "w1")
    assert not server.bucket.objects


def test_nothing_of_a_write_survives_a_restart() -> None:
    server = Server(Bucket(), "a")
    put(server, "w1")
    server.restart()
    assert server.namespaces == []
    with pytest.raises(NotResident, match="If the server was restarted meanwhile: write it again"):
        publish(server, "w1")


@pytest.mark.parametrize(("key", "size"), [("", 1), ("folder/file", -1)])
def test_nonsense_is_refused(server: Server, key: str, size: int) -> None:
    with pytest.raises(ConfigurationError):
        server.write_back.publish("s3", key, "w1", size, create_only=False, wait_s=1.0)


def test_bytes_nobody_publishes_are_swept() -> None:
    server = Server(Bucket(), "a")
    put(server, "w1")
    server.write_back.tidy()
    server.clock_ahead_s = 500.0
    put(server, "w1", DATA * 2)  # it grows: somebody is at it
    server.write_back.tidy()
    server.clock_ahead_s = 700.0
    server.write_back.tidy()
    assert server.namespaces != []
    server.clock_ahead_s = 1200.0
    server.write_back.tidy()
    assert server.namespaces == []
