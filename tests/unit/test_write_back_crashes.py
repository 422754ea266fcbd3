"""A server killed between any two steps of a save, and what its restart makes of it (F2, F3, F30, F36; I2, I3)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torchcache_server.cache.claims import Claim
from torchcache_server.cache.orphans import ORPHAN_S
from write_back_world import (
    KEY,
    Bucket,
    Killed,
    Server,
    always_whole,
    assert_settled,
    metadata_of,
    parts_of,
    published,
)

from torchcache.errors import NotCommitted, OutOfSpace


def fresh(server: Server) -> None:
    """The path is empty."""


def over_durable(server: Server) -> None:
    server.save("old")
    server.upload()


def over_pending(server: Server) -> None:
    """The save before was committed, and not uploaded yet."""
    server.save("old")


def over_half_uploaded(server: Server) -> None:
    server.save("old")
    server.upload_half()


def over_stock(server: Server) -> None:
    """Another program's checkpoint."""
    server.bucket.objects[KEY.metadata_key] = b""
    for name in ("__0_0.distcp", "__1_0.distcp"):
        server.bucket.objects[f"{KEY.path}/{name}"] = b"of another program"
    server.bucket.objects[KEY.metadata_key] = b"another program's"
    server.bucket.watch = lambda: None


BEFORE = [fresh, over_durable, over_pending, over_half_uploaded, over_stock]


def calls_of_a_save(before: Callable[[Server], None]) -> int:
    server = Server(Bucket(), "a")
    before(server)
    start = server.gate.calls
    server.save("new", overwrite=True)
    server.upload()
    assert_settled(server.bucket, "new")
    return server.gate.calls - start


def save_until_killed(server: Server, kill_at: int) -> bool:
    """Whether the commit was acknowledged before the kill."""
    server.gate.trap_at = server.gate.calls + kill_at
    server.gate.trap = server.gate.kill
    acknowledged = False
    try:
        server.save("new", overwrite=True)
        acknowledged = True
        server.upload()
    except Killed:
        pass
    return acknowledged


@pytest.mark.parametrize("power_cut", [False, True])
@pytest.mark.parametrize("before", BEFORE)
def test_a_kill_at_any_point_loses_nothing_acknowledged(
    before: Callable[[Server], None], power_cut: bool
) -> None:
    for kill_at in range(1, calls_of_a_save(before) + 1):
        bucket = Bucket()
        server = Server(bucket, "a")
        before(server)
        if before is not over_stock:
            always_whole(bucket)
        untouched = bucket.objects.get(KEY.metadata_key)
        acknowledged = save_until_killed(server, kill_at)
        server.restart(power_cut=power_cut)

        try:
            state = server.state()
        except NotCommitted:
            state = "nothing"
        server.write_back.tidy()
        if acknowledged:
            assert state in ("committed new", "durable new"), f"killed at {kill_at}"
        if state == "committed new" and published(bucket) != "new":
            claim = Claim.decode(bucket.objects[KEY.claim_key])
            assert (claim.save_id, claim.state) == ("new", "committed")
        server.upload()
        server.write_back.tidy()
        if state.endswith(" new"):
            assert_settled(bucket, "new")
        elif state.endswith(" old"):
            assert_settled(bucket, "old")
        else:
            assert before in (fresh, over_stock)
            assert published(bucket) is None
            assert KEY.claim_key not in bucket.objects
            assert bucket.objects.get(KEY.metadata_key) == untouched
        left = state.partition(" ")[2]
        assert server.namespaces == ([KEY.namespace(left)] if left else [])
        assert not server.store.kept


@pytest.mark.parametrize("kill_again_at", range(1, 40, 3))
def test_a_kill_during_the_recovery_from_a_kill(kill_again_at: int) -> None:
    for kill_at in range(1, calls_of_a_save(over_pending) + 1, 3):
        bucket = Bucket()
        server = Server(bucket, "a")
        over_pending(server)
        always_whole(bucket)
        acknowledged = save_until_killed(server, kill_at)
        server.restart()
        server.gate.trap_at = kill_again_at
        server.gate.trap = server.gate.kill
        try:
            server.upload()
            server.write_back.tidy()
        except Killed:
            pass
        server.restart()
        server.upload()
        server.write_back.tidy()
        assert published(bucket) in (("new",) if acknowledged else ("new", "old"))
        assert_settled(bucket, published(bucket))


def test_what_a_dead_save_left_can_be_saved_over_without_overwrite() -> None:
    for kill_at in range(1, calls_of_a_save(fresh) + 1):
        bucket = Bucket()
        always_whole(bucket)
        server = Server(bucket, "a")
        save_until_killed(server, kill_at)
        server.restart()
        try:
            server.state()
        except NotCommitted:
            server.save("next")
            server.upload()
            assert_settled(bucket, "next")
            server.write_back.tidy()
            assert_settled(bucket, "next")


def test_a_restart_between_the_publication_and_its_record_is_no_second_publication() -> None:
    """F30: the manifest that is found is the save's own."""
    bucket = Bucket()
    server = Server(bucket, "a")
    server.save("new")
    gate = server.gate

    def fail(call: str, key: str) -> None:
        if call == "write" and key == KEY.manifest_key:
            gate.trap_at, gate.trap = gate.calls + 1, gate.kill  # behind the write

    server.under_store.fail = fail
    with pytest.raises(Killed):
        server.upload()
    assert published(bucket) == "new"
    server.restart()
    server.upload()
    writes = [what for what in server.gate.log if what.startswith("write")]
    assert writes == [f"write {KEY.claim_key}"]  # released
    assert server.state() == "durable new"


def test_shards_that_are_up_are_not_uploaded_again_after_a_restart() -> None:
    bucket = Bucket()
    server = Server(bucket, "a")
    server.save("new")

    def fail(call: str, key: str) -> None:
        if call == "write" and key == KEY.metadata_key:
            raise Killed

    server.under_store.fail = fail
    with pytest.raises(Killed):
        server.upload()
    server.restart()
    assert server.write_back.pending_bytes == 0
    server.upload()
    assert not any("write" in what and "distcp" in what for what in server.gate.log)
    assert_settled(bucket, "new")


def test_of_an_older_saves_progress_nothing_is_taken_over() -> None:
    server = Server(Bucket(), "a")
    server.save("old")
    server.write_back._slots.note_uploaded(
        slot := server.write_back._slots.slot(KEY),
        slot.save,
        "__0_0.distcp",
        "v1",  # type: ignore[arg-type]
    )
    server.save("new", overwrite=True)
    server.restart()
    assert server.write_back.pending_bytes == sum(len(data) for data in parts_of("new").values())


def test_what_only_the_pool_holds_is_kept_even_if_the_store_forgot_to() -> None:
    server = Server(Bucket(), "a")
    server.save("new")
    server.store.kept.clear()  # its note of that was damaged
    server.restart()
    assert server.store.kept == {KEY.namespace("new")}


def test_so_is_a_copy() -> None:
    server = Server(Bucket(), "b")
    server.put("theirs")
    server.hold_copy("theirs", owner="a")
    server.store.kept.clear()
    server.restart()
    assert server.store.kept == {KEY.namespace("theirs")}


def test_an_unreadable_record_keeps_every_byte() -> None:
    """F40: a record of another version is left alone, and so is what it may speak of."""
    server = Server(Bucket(), "a")
    server.save("new")
    record_key = next(key for key in server.store.record if key.startswith(b"save/"))
    server.store.record[record_key] = b"\x02\x00\x00\x00{}"
    server.restart()
    assert server.namespaces == [KEY.namespace("new")]
    with pytest.raises(NotCommitted):
        server.state()
    for _ in range(2):
        server.write_back.tidy()
        server.clock_ahead_s += 2 * ORPHAN_S
    server.write_back.tidy()
    assert server.namespaces == [KEY.namespace("new")], "nor are they swept as nobody's, later"


def test_a_commit_counts_though_the_end_of_its_lease_cannot_be_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full behind the save's record: a failure told now would be of a save that is there, and uploaded."""
    server = Server(Bucket(), "a")
    server.reserve("new")
    server.put("new")

    def full(_: bytes) -> None:
        raise OutOfSpace("the store's disk can't delete the record; see to the disk")

    monkeypatch.setattr(server.store, "delete_record", full)
    assert server.commit("new") == "committed"
    monkeypatch.undo()
    server.restart()
    assert server.state() == "committed new"
    server.upload()
    assert server.state() == "durable new"


def test_metadata_stays_the_old_ones_until_the_new_shards_go_up() -> None:
    """What is only reserved, or only committed to the pool, changes nothing in the under-store."""
    bucket = Bucket()
    server = Server(bucket, "a")
    over_durable(server)
    server.save("new", overwrite=True)
    assert published(bucket) == "old"
    assert bucket.objects[KEY.metadata_key] == metadata_of("old")
