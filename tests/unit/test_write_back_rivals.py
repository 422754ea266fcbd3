"""Two writers of one path in one server, and one writer after another (F31)."""

from __future__ import annotations

import threading

import pytest
from torchcache_server.cache.claims import Claim
from torchcache_server.cache.reservations import LAPSED_AFTER_LEASES
from write_back_world import (
    KEY,
    LEASE_S,
    Bucket,
    Server,
    always_whole,
    assert_settled,
    published,
)

from torchcache.errors import AlreadyExists, CheckpointError, DeadlineExceeded, ServerUnavailable


def test_a_live_writer_keeps_its_path() -> None:
    server = Server(Bucket(), "a", lease_s=20.0)  # longer than a thread may be kept from renewing it
    server.reserve("first")
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.02):
            server.write_back.renew(KEY, "first")

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(
            AlreadyExists, match="another save of s3/run/step-1 is being written by writer of first"
        ):
            server.reserve("second", wait_s=60.0)
    finally:
        stop.set()
        thread.join()
    server.put("first")
    assert server.commit("first") == "committed"


def test_a_killed_writer_is_overtaken_when_its_lease_has_run_out() -> None:
    server = Server(Bucket(), "a")
    server.reserve("first")
    server.put("first")
    server.save("second")
    assert server.namespaces == [KEY.namespace("second")]
    server.upload()
    assert_settled(server.bucket, "second")


def test_who_was_overtaken_is_told_by_whom() -> None:
    """A zombie: its process was stopped for longer than its lease."""
    server = Server(Bucket(), "a")
    server.reserve("first")
    server.put("first")
    server.reserve("second")
    for call in (lambda: server.write_back.renew(KEY, "first"), lambda: server.commit("first")):
        with pytest.raises(AlreadyExists, match="writer of second took the path over"):
            call()
    server.put("second")
    server.commit("second")
    with pytest.raises(AlreadyExists, match="save second took the path over"):
        server.commit("first")
    server.upload()
    assert_settled(server.bucket, "second")


def test_what_a_zombie_puts_after_it_was_overtaken_is_swept() -> None:
    server = Server(Bucket(), "a")
    server.reserve("first")
    server.save("second")
    server.put("first")
    for ahead_s in (0.0, 500.0):
        server.clock_ahead_s = ahead_s
        server.write_back.tidy()
        assert KEY.namespace("first") in server.namespaces
    server.clock_ahead_s = 700.0
    server.write_back.tidy()
    assert server.namespaces == [KEY.namespace("second")]


def test_a_lease_that_ran_out_unwanted_can_still_commit() -> None:
    server = Server(Bucket(), "a")
    server.reserve("first")
    server.put("first")
    server.clock_ahead_s = LEASE_S * 2
    server.write_back.tidy()
    assert server.commit("first") == "committed"


def test_a_save_nobody_renews_is_swept_in_the_end() -> None:
    """F28: the writer was killed, and nobody wants its path."""
    bucket = Bucket()
    server = Server(bucket, "a")
    server.reserve("first")
    server.put("first")
    assert KEY.claim_key in bucket.objects
    server.clock_ahead_s = LEASE_S * (LAPSED_AFTER_LEASES + 1)
    server.write_back.tidy()
    assert KEY.claim_key not in bucket.objects
    assert server.namespaces == []
    assert not server.store.record
    with pytest.raises(CheckpointError, match="isn't known to the server any more"):
        server.commit("first")


def test_an_abandoned_save_frees_its_path_at_once() -> None:
    bucket = Bucket()
    server = Server(bucket, "a")
    server.reserve("first")
    server.put("first")
    server.write_back.abandon(KEY, "another")
    assert KEY.claim_key in bucket.objects
    server.write_back.abandon(KEY, "first")
    server.write_back.abandon(KEY, "first")
    assert not bucket.objects
    assert server.namespaces == []
    server.save("second")


def test_a_claim_of_which_nobody_knows_whether_it_was_written_is_looked_after() -> None:
    """The answer to the write was lost, and the writer gave up."""
    bucket = Bucket()
    server = Server(bucket, "a")

    def lose_the_answer() -> None:
        raise ServerUnavailable("the answer was lost")

    start = server.gate.calls
    server.reserve("probe")
    calls = server.gate.log[start:].index(f"have written {KEY.claim_key}") + 1
    server.write_back.abandon(KEY, "probe")
    server.gate.trap_at, server.gate.trap = server.gate.calls + calls, lose_the_answer
    with pytest.raises(ServerUnavailable):
        server.reserve("first")
    assert KEY.claim_key in bucket.objects
    server.write_back.tidy()
    assert not bucket.objects
    assert not server.store.record


def test_to_abandon_a_committed_save_changes_nothing() -> None:
    server = Server(Bucket(), "a")
    server.save("first")
    server.write_back.abandon(KEY, "first")
    assert server.state() == "committed first"


def test_calls_may_be_repeated() -> None:
    """F30: each answer may have been lost."""
    server = Server(Bucket(), "a")
    server.reserve("first")
    server.reserve("first")
    server.put("first")
    assert server.commit("first") == "committed"
    assert server.commit("first") == "committed"
    server.reserve("first")
    server.write_back.renew(KEY, "first")
    server.upload()
    assert server.commit("first") == "durable"
    assert_settled(server.bucket, "first")


def test_a_path_is_not_overwritten_unasked() -> None:
    server = Server(Bucket(), "a")
    server.save("first")
    with pytest.raises(AlreadyExists, match=r"not uploaded yet: pass overwrite=True or another path"):
        server.reserve("second")
    server.upload()
    with pytest.raises(AlreadyExists, match="pass overwrite=True or another path"):
        server.reserve("second")
    stock = Server(Bucket(), "a")
    stock.bucket.objects[KEY.metadata_key] = b"another program's"
    with pytest.raises(AlreadyExists, match=r"another program saved.*pass overwrite=True or another path"):
        stock.reserve("second")
    assert list(stock.bucket.objects) == [KEY.metadata_key]


def test_saves_to_the_same_path_one_after_the_other_never_wait_for_an_upload() -> None:
    """The last one is uploaded; the reader always has the newest committed one."""
    bucket = Bucket()
    always_whole(bucket)
    server = Server(bucket, "a")
    for number in range(5):
        server.save(f"save {number}", overwrite=True)
        assert server.state() == f"committed save {number}"
    server.upload()
    assert_settled(bucket, "save 4")
    assert server.namespaces == [KEY.namespace("save 4")]


def test_a_save_committed_while_its_predecessor_is_uploaded_at_any_point() -> None:
    calls = 0
    for at in range(1, 200):
        bucket = Bucket()
        server = Server(bucket, "a")
        server.save("old")
        always_whole(bucket)
        refused: list[DeadlineExceeded] = []

        def save(server: Server = server, refused: list[DeadlineExceeded] = refused) -> None:
            try:
                server.reserve("new", overwrite=True, wait_s=0.001)
            except DeadlineExceeded as error:  # just now the upload has the path to itself
                refused.append(error)
                return
            server.put("new")
            server.commit("new")

        start = server.gate.calls
        server.gate.trap_at, server.gate.trap = start + at, save
        server.upload()
        if server.gate.calls < start + at:
            break
        calls = at
        if refused:
            server.save("new", overwrite=True)
        assert server.state() == "committed new"
        server.upload()
        assert_settled(bucket, "new")
        assert server.namespaces == [KEY.namespace("new")]
    assert calls > 20


def test_a_save_reserved_while_its_predecessor_is_uploaded_inherits_the_claim() -> None:
    bucket = Bucket()
    server = Server(bucket, "a")
    server.save("old")
    server.reserve("new", overwrite=True)
    server.upload()
    claim = Claim.decode(bucket.objects[KEY.claim_key])
    assert (claim.save_id, claim.state) == ("new", "reserved")
    assert published(bucket) == "old"
    server.put("new")
    server.commit("new")
    server.upload()
    assert_settled(bucket, "new")
