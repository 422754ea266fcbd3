"""Records of saves that can't be read, though their checksums are good: another version's, or a bug's."""

from __future__ import annotations

import json

import pytest
from torchcache_server.cache.orphans import ORPHAN_S
from torchcache_server.cache.save_records import decode_lease, decode_uploaded, encode_lease, encode_uploaded
from torchcache_server.cache.saves import SaveKey
from write_back_world import KEY, Bucket, Server

OTHER = SaveKey("s3", "run/step-2")
SHAPES = [
    b"",
    b"\xff",
    b"{",
    b"3",
    b"[]",
    b"null",
    b"{}",
    b'"text"',
    b'{"key": ["s3", "run"], "save_ids": []}',
]
SHAPES += [b'{"key": [1, 2, 3], "save_ids": [4], "save_id": 5, "uploaded": {"a": 6}}', b"[" * 100]

RECORDS = {
    "save": b"save/" + OTHER.digest,
    "lease": b"lease/" + OTHER.digest,
    "uploaded": b"uploaded/" + OTHER.digest,
    "unknown kind": b"retention/" + OTHER.digest,
}


def server_with_saves() -> Server:
    """One save that is committed; the bytes of another, of which a record may or may not tell."""
    server = Server(Bucket(), "a")
    server.save("known")
    server.reserve("other", OTHER)
    server.put("other", OTHER)
    server.store.record.pop(b"lease/" + OTHER.digest)
    return server


def assert_nothing_is_dropped(server: Server) -> None:
    """At the start, nor later; what begins now goes its way."""
    here = [KEY.namespace("known"), OTHER.namespace("other")]
    server.restart()
    assert server.namespaces == here
    assert server.state() == "committed known"
    server.reserve("new", SaveKey("s3", "run/step-3"))
    server.put("new", SaveKey("s3", "run/step-3"))
    server.write_back.abandon(SaveKey("s3", "run/step-3"), "new")
    assert server.namespaces == here, "what was begun since is known, and dropped"
    server.store.put("put:s3/orphan@1", next(iter(server.store.chunks[here[0]])), 1, b"x")
    for _ in range(3):
        server.write_back.tidy()
        server.clock_ahead_s += 2 * ORPHAN_S
    assert server.namespaces == here, "an orphan that can be no save's is swept"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_that_cannot_be_read_drops_nothing(kind: str, shape: bytes) -> None:
    """F33, I2, I6."""
    server = server_with_saves()
    server.store.record[RECORDS[kind]] = shape
    assert_nothing_is_dropped(server)


def test_a_record_that_was_set_aside_drops_nothing() -> None:
    """F6, I2, I6: until the user has removed it."""
    server = server_with_saves()
    server.store.set_aside = ["0123.record"]
    assert_nothing_is_dropped(server)
    server.store.set_aside = []
    server.restart()
    assert server.namespaces == [KEY.namespace("known")]


def test_a_replaced_save_is_not_dropped_while_a_record_may_speak_of_it() -> None:
    """I6."""
    server = server_with_saves()
    server.store.set_aside = ["0123.record"]
    server.restart()
    server.save("newer", overwrite=True)
    server.upload()
    assert KEY.namespace("known") in server.namespaces
    assert server.state() == "durable newer"


def test_an_upload_whose_progress_is_unreadable_is_made_again() -> None:
    """F36."""
    server = server_with_saves()
    server.store.record[b"uploaded/" + KEY.digest] = b"{"
    server.restart()
    server.upload()
    assert server.state() == "durable known"


def test_leases_and_progress_come_back() -> None:
    assert decode_lease(encode_lease(KEY, {"a", "b"})) == (KEY, {"a", "b"})
    assert decode_uploaded(encode_uploaded("a", {"x": "1"})) == ("a", {"x": "1"})
    # As the first version wrote them.
    lease = {"key": ["s3", "run/step-1", ""], "save_ids": ["a"]}
    assert decode_lease(json.dumps(lease).encode()) == (KEY, {"a"})


@pytest.mark.parametrize("shape", SHAPES)
def test_strange_records_are_refused(shape: bytes) -> None:
    with pytest.raises(ValueError):
        decode_lease(shape)
    with pytest.raises(ValueError):
        decode_uploaded(shape)
