"""Checkpoints that are deleted: whole or gone for every reader, wherever the server stops, and nothing left behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from torchcache_server.cache.readers import READ_LEASES
from torchcache_server.cache.save_records import decode_deletion, encode_deletion
from torchcache_server.cache.saves import Deletion, SaveKey
from write_back_world import (
    KEY,
    LEASE_S,
    Bucket,
    Killed,
    Server,
    always_whole,
    assert_settled,
    metadata_of,
    published,
    soon,
)

from torchcache.errors import AlreadyExists, InUse, NotCommitted, ServerUnavailable


def delete(server: Server, save_id: str = "", key: SaveKey = KEY) -> bool:
    """As the server does it, but for its threads: whether all is gone."""
    try:
        return server.write_back.delete(key, save_id, deadline=soon(), wait_s=0.0)
    finally:
        server.upload(key)


def durable(server: Server) -> None:
    server.save("old")
    server.upload()


def pending(server: Server) -> None:
    server.save("old")


def half_uploaded(server: Server) -> None:
    server.save("old")
    server.upload_half()


def pending_over_durable(server: Server) -> None:
    server.save("older")
    server.upload()
    server.save("old", overwrite=True)


def evicted(server: Server) -> None:
    """Durable, and the pool has forgotten it."""
    server.save("old")
    server.upload()
    server.store.drop(KEY.namespace("old"))
    server.write_back.tidy()


STATES = [durable, pending, half_uploaded, pending_over_durable, evicted]


def assert_gone(server: Server) -> None:
    assert server.bucket.objects == {}
    assert server.namespaces == []
    assert server.store.record == {}
    with pytest.raises(NotCommitted):
        server.state()


@pytest.mark.parametrize("state", STATES)
def test_nothing_is_left(state: Callable[[Server], None]) -> None:
    server = Server(Bucket(), "a")
    state(server)
    always_whole(server.bucket)
    delete(server)
    assert_gone(server)
    server.save("new")  # and the path is free
    server.upload()
    assert_settled(server.bucket, "new")


@pytest.mark.parametrize("state", STATES)
def test_a_kill_at_any_step_leaves_it_whole_or_gone_and_the_next_start_ends_it(
    state: Callable[[Server], None],
) -> None:
    for kill_at in itertools.count(1):
        server = Server(Bucket(), "a")
        state(server)
        always_whole(server.bucket)
        server.gate.trap_at = server.gate.calls + kill_at
        server.gate.trap = server.gate.kill
        try:
            delete(server)
        except Killed:
            pass
        else:  # it was through before
            assert kill_at > 20
            break
        server.restart()
        noted = any(key.startswith(b"deletion/") for key in server.store.record)
        if noted:
            with pytest.raises(NotCommitted):
                server.state()
            server.upload()
        elif server.store.record or published(server.bucket):
            assert server.state().endswith("old")  # never asked, as far as it knows
            delete(server)
        assert_gone(server)


def test_it_is_gone_for_readers_before_its_files_are() -> None:
    server = Server(Bucket(), "a")
    durable(server)
    assert not server.write_back.delete(KEY, "old", deadline=soon(), wait_s=0.0)
    assert published(server.bucket) == "old"
    with pytest.raises(NotCommitted, match="is being deleted"):
        server.state()
    assert server.write_back.list("s3", "run/", deadline=soon()) == []
    server.restart()
    with pytest.raises(NotCommitted):
        server.state()
    server.upload()
    assert_gone(server)


def test_only_what_was_meant_is_deleted() -> None:
    server = Server(Bucket(), "a")
    durable(server)
    with pytest.raises(NotCommitted, match="holds save old, not older any more"):
        delete(server, "older")
    with pytest.raises(NotCommitted, match="no committed checkpoint"):
        delete(server, key=SaveKey("s3", "run/step-2"))
    assert_settled(server.bucket, "old")
    beside = {
        "run/step-1/notes.txt": b"mine",
        "run/step-1/__0_0.distcp.bak": b"mine",
        "run/step-10/a": b"mine",
    }
    server.bucket.objects |= beside
    delete(server, "old")
    assert server.bucket.objects == beside


def test_one_that_is_being_written_stays() -> None:
    server = Server(Bucket(), "a", lease_s=60.0)
    durable(server)
    server.reserve("new", overwrite=True)
    with pytest.raises(AlreadyExists, match="is being written by writer of new"):
        delete(server)
    assert_settled_but_claimed(server)


def assert_settled_but_claimed(server: Server) -> None:
    assert published(server.bucket) == "old"
    assert server.bucket.objects[KEY.metadata_key] == metadata_of("old")


def test_one_that_is_being_read_stays_until_its_reader_is_done_or_dead() -> None:
    server = Server(Bucket(), "a")
    durable(server)
    server.write_back.hold(KEY, "old", "r1", "host pid 7")
    server.write_back.hold(KEY, "old", "r2", "host pid 8")
    with pytest.raises(InUse, match="read by host pid 7 and 1 more"):
        delete(server)
    server.write_back.release(KEY, "r1")
    server.write_back.release(KEY, "r1")
    with pytest.raises(InUse, match="read by host pid 8: "):
        delete(server)
    server.clock_ahead_s = READ_LEASES * LEASE_S / 2
    server.write_back.hold(KEY, "old", "r2", "host pid 8")
    server.clock_ahead_s = READ_LEASES * LEASE_S
    with pytest.raises(InUse):
        delete(server)
    server.clock_ahead_s = 1000.0
    delete(server)
    assert_gone(server)


def test_nobody_begins_to_read_what_is_being_deleted() -> None:
    server = Server(Bucket(), "a")
    durable(server)
    server.write_back.delete(KEY, "old", deadline=soon(), wait_s=0.0)
    with pytest.raises(NotCommitted, match="being deleted"):
        server.write_back.hold(KEY, "old", "r1", "host pid 7")
    server.upload()
    assert server.write_back.hold(KEY, "another", "r1", "host pid 7") == READ_LEASES * LEASE_S


def test_readers_of_another_save_don_t_count() -> None:
    server = Server(Bucket(), "a")
    durable(server)
    server.write_back.hold(KEY, "older", "r1", "host pid 7")
    delete(server)
    assert_gone(server)


def test_another_server_s_checkpoint_that_came_in_between_stays() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    durable(a)
    a.write_back.delete(KEY, "old", deadline=soon(), wait_s=0.0)
    b.save("new", overwrite=True)
    b.upload()
    a.upload()
    assert_settled(bucket, "new")
    assert a.state() == "durable new"
    with pytest.raises(NotCommitted, match="holds save new"):
        delete(a, "old")


def test_a_path_that_another_server_is_writing_is_not_deleted() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    durable(a)
    b.save("new", overwrite=True)  # committed there, not uploaded yet
    a.write_back.delete(KEY, "old", deadline=soon(), wait_s=0.0)
    a.upload()
    with pytest.raises(AlreadyExists, match="not uploaded yet"):
        if not a.write_back._slots.slot(KEY).deletion_error:
            raise AssertionError
        raise a.write_back._slots.slot(KEY).deletion_error
    b.upload()
    assert_settled(bucket, "new")


@pytest.mark.parametrize("kill_at", range(1, 60, 3))
def test_what_a_lost_server_left_in_the_middle_another_one_ends(kill_at: int) -> None:
    """Its store is gone too: there is only the claim that names what is left."""
    bucket = Bucket()
    lost = Server(bucket, "lost")
    durable(lost)
    always_whole(bucket)
    lost.gate.trap_at = lost.gate.calls + kill_at
    lost.gate.trap = lost.gate.kill
    try:
        delete(lost)
    except Killed:
        pass
    else:
        assert bucket.objects == {}
        return
    heir = Server(bucket, "heir")
    heir.clock_ahead_s = 0.0
    try:
        heir.write_back.delete(KEY, "", deadline=soon(), wait_s=0.0)
    except NotCommitted:
        assert bucket.objects == {}
        return
    try:
        heir.upload()
    except Exception as error:
        assert "waits" in str(error)  # until the lost server is surely dead
        heir.clock_ahead_s = 1000.0
        heir.upload()
    assert_gone(heir)


def test_s3_that_is_away_holds_it_up_and_no_more() -> None:
    server = Server(Bucket(), "a")
    durable(server)
    server.write_back.delete(KEY, "", deadline=soon(), wait_s=0.0)

    def fail(call: str, key: str) -> None:
        if call == "delete":
            raise ServerUnavailable("S3 is away")

    server.under_store.fail = fail
    with pytest.raises(ServerUnavailable):
        server.upload()
    assert published(server.bucket) is None
    server.under_store.fail = lambda call, key: None
    server.upload()
    assert_gone(server)


def test_a_save_of_the_path_waits_for_the_deletion() -> None:
    server = Server(Bucket(), "a", threads=2)
    try:
        server.save("old")
        server.write_back.drain(5.0)
        assert server.write_back.delete(KEY, "old", deadline=soon(), wait_s=0.0) in (True, False)
        server.save("new")
        server.write_back.drain(5.0)
        assert_settled(server.bucket, "new")
    finally:
        server.write_back.close()


def test_the_record_of_a_deletion() -> None:
    deletion = Deletion(KEY, "old", ("a", "b"), ("digest",))
    assert decode_deletion(encode_deletion(deletion)) == deletion
    for record in (b"", b"{}", b"[]", b'{"key": ["a"], "save_id": 1, "files": [], "manifests": []}'):
        with pytest.raises(ValueError):
            decode_deletion(record)
