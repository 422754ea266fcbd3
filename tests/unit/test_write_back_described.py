"""Saves whose metadata and manifest were too large for the commit's message, and so were put before it."""

from __future__ import annotations

import pytest
from torchcache_server.cache.write_back import SaveStatus
from write_back_world import KEY, Bucket, Server, assert_settled, manifest_of, metadata_of, parts_of, soon

from torchcache.errors import CheckpointError, ConfigurationError, IntegrityError
from torchcache.model import CHUNK_BYTES, ChunkId, ObjectId


def commit(server: Server, *, metadata: bytes = b"", manifest: bytes = b"") -> SaveStatus:
    files = [(name, len(data)) for name, data in parts_of("first").items()]
    return server.write_back.commit(KEY, "first", files, metadata, manifest, deadline=soon())


def put(server: Server, name: str, data: bytes, *, chunks: int | None = None) -> None:
    object = ObjectId(KEY.store, name, "save:first")
    pieces = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    for index, piece in enumerate(pieces[:chunks]):
        server.store.put(KEY.namespace("first"), ChunkId(object, index), len(data), piece)


def reserved() -> Server:
    server = Server(Bucket(), "a")
    server.reserve("first")
    server.put("first")
    return server


def test_what_was_put_before_is_committed_and_uploaded() -> None:
    server = reserved()
    put(server, KEY.metadata_key, metadata_of("first"))
    put(server, KEY.manifest_key, manifest_of("first"))
    assert commit(server).manifest == manifest_of("first")
    server.upload()
    assert_settled(server.bucket, "first")


def test_a_repeated_commit_finds_what_the_first_one_recorded_f30() -> None:
    server = reserved()
    put(server, KEY.metadata_key, metadata_of("first"))
    put(server, KEY.manifest_key, manifest_of("first"))
    first = commit(server)
    for name in (KEY.metadata_key, KEY.manifest_key):
        server.store.chunks[KEY.namespace("first")].pop(ChunkId(ObjectId(KEY.store, name, "save:first"), 0))
    assert commit(server).committed_unix_s == first.committed_unix_s
    server.upload()
    assert commit(server).state == "durable"


@pytest.mark.parametrize("there", [[], [KEY.metadata_key], [KEY.manifest_key]])
def test_what_was_neither_sent_nor_put_is_missed(there: list[str]) -> None:
    server = reserved()
    for name in there:
        put(server, name, b"x")
    with pytest.raises(CheckpointError, match="neither sent along nor put before"):
        commit(server)


def test_half_of_it_is_not_enough() -> None:
    server = reserved()
    with pytest.raises(ConfigurationError, match="without metadata and a manifest"):
        commit(server, manifest=b"{}")
    put(server, KEY.metadata_key, b"m" * (CHUNK_BYTES + 1), chunks=1)
    put(server, KEY.manifest_key, b"{}")
    with pytest.raises(IntegrityError, match="chunk 1 of"):
        commit(server)
