"""Saves that take files over from an earlier one: what is lent, what is kept for how long, and what isn't believed."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from functools import partial

import pyarrow as pa
import pytest
from torchcache_server.cache import borrowing
from torchcache_server.cache.borrowing import LOAN_LEASES, MOST_READING
from torchcache_server.cache.save_records import decode_save, encode_save
from torchcache_server.cache.saves import SaveKey
from torchcache_server.store import Policy
from write_back_world import KEY, Bucket, Killed, Server, manifest_of, metadata_of, parts_of, soon

from torchcache.errors import (
    CheckpointError,
    ConfigurationError,
    DeadlineExceeded,
    NotCommitted,
    OutOfSpace,
    Overloaded,
    TorchCacheError,
)
from torchcache.model import ChunkId, ObjectId

NEXT = SaveKey("s3", "run/step-2")
THIRD = SaveKey("s3", "run/step-3")
LONG_S = 1000.0
FROZEN = "__0_0.distcp"
FRESH = "__1_0.distcp"
BYTES = parts_of("first")[FROZEN]


def files_of(save_id: str) -> list[tuple[str, int]]:
    """Of a save that borrows `FROZEN` and has a file of its own."""
    return [(FROZEN, len(BYTES)), (FRESH, len(parts_of(save_id)[FRESH]))]


def put_fresh(server: Server, save_id: str, key: SaveKey) -> None:
    namespace, data = key.namespace(save_id), parts_of(save_id)[FRESH]
    object = ObjectId(key.store, f"{key.path}/{FRESH}", f"save:{save_id}")
    server.store.put(namespace, ChunkId(object, 0), len(data), data)
    server.store.kept.add(namespace)


def borrow(
    server: Server,
    save_id: str,
    key: SaveKey = NEXT,
    *,
    base: tuple[SaveKey, str] = (KEY, "first"),
    names: tuple[str, ...] = (FROZEN,),
) -> list[str]:
    return server.write_back.lend(key, save_id, *base, frozenset(names), deadline=soon())


def save_borrowing(
    server: Server, save_id: str, key: SaveKey = NEXT, *, base: tuple[SaveKey, str] = (KEY, "first")
) -> None:
    server.reserve(save_id, key)
    assert borrow(server, save_id, key, base=base) == [FROZEN]
    put_fresh(server, save_id, key)
    server.commit(save_id, key, files=files_of(save_id), borrowed=[FROZEN])


def delete(server: Server, key: SaveKey) -> None:
    server.write_back.delete(key, "", deadline=soon(), wait_s=0.0)
    server.upload(key)


def frozen_is_here(server: Server) -> bool:
    chunk = ChunkId(ObjectId("s3", f"{KEY.path}/{FROZEN}", "save:first"), 0)
    return any(chunk in chunks for chunks in server.store.chunks.values())


@pytest.fixture
def server() -> Server:
    return Server(Bucket(), "a", lease_s=LONG_S)


# ---- the way of one ----


def test_a_borrowed_file_is_read_where_it_lies_and_uploaded_whole(server: Server) -> None:
    server.save("first")
    save_borrowing(server, "second")
    status = server.write_back.get(NEXT, deadline=soon())
    assert (status.state, status.borrowed) == ("committed", {FROZEN: (KEY.path, "first")})
    assert status.total_bytes == status.pending_bytes == sum(size for _, size in files_of("second"))
    server.upload(NEXT)
    assert server.bucket.objects[f"{NEXT.path}/{FROZEN}"] == BYTES
    assert server.bucket.objects[f"{NEXT.path}/{FRESH}"] == parts_of("second")[FRESH]
    assert server.state(NEXT) == "durable second"
    assert f"{KEY.path}/{FROZEN}" not in server.bucket.objects, "the other one's upload is its own"


def test_what_was_borrowed_may_be_borrowed_again(server: Server) -> None:
    """It is of the save that stored it: the one between may go."""
    server.save("first")
    save_borrowing(server, "second")
    save_borrowing(server, "third", THIRD, base=(NEXT, "second"))
    assert server.write_back.get(THIRD, deadline=soon()).borrowed == {FROZEN: (KEY.path, "first")}
    for key in (KEY, NEXT):
        server.upload(key)
        delete(server, key)
    assert server.namespaces == [KEY.namespace("first"), THIRD.namespace("third")]
    assert server.store.kept == set(server.namespaces)
    server.upload(THIRD)
    assert server.bucket.objects[f"{THIRD.path}/{FROZEN}"] == BYTES


def test_it_is_kept_as_long_as_one_save_needs_it_and_dropped_by_the_last(server: Server) -> None:
    """I6, I5"""
    server.save("first")
    server.upload()
    assert not server.store.kept
    save_borrowing(server, "second")
    assert server.store.kept == {KEY.namespace("first"), NEXT.namespace("second")}
    delete(server, KEY)
    assert frozen_is_here(server)
    assert KEY.namespace("first") in server.store.kept
    server.upload(NEXT)
    assert not server.store.kept, "both are in the under-store, or deleted"
    assert frozen_is_here(server)
    delete(server, NEXT)
    assert server.namespaces == []


def test_the_lender_may_go_last(server: Server) -> None:
    server.save("first")
    save_borrowing(server, "second")
    server.upload(NEXT)
    delete(server, NEXT)
    assert server.namespaces == [KEY.namespace("first")]
    assert server.store.kept == {KEY.namespace("first")}
    server.upload()
    delete(server, KEY)
    assert server.namespaces == []


def test_an_overwriting_save_may_borrow_from_what_it_replaces(server: Server) -> None:
    server.save("first")
    server.reserve("second", overwrite=True)
    assert borrow(server, "second", KEY) == [FROZEN]
    put_fresh(server, "second", KEY)
    server.commit("second", files=files_of("second"), borrowed=[FROZEN])
    server.upload()
    server.upload()
    assert server.state() == "durable second"
    assert server.bucket.objects[f"{KEY.path}/{FROZEN}"] == BYTES
    delete(server, KEY)
    assert server.namespaces == []


def damage(server: Server, name: str) -> None:
    """Every byte of a file of the first save."""
    chunks = server.store.chunks[KEY.namespace("first")]
    chunk = next(chunk for chunk in chunks if chunk.object.key.endswith(name))
    chunks[chunk] = chunks[chunk]._replace(payload=pa.py_buffer(b"?" * len(chunks[chunk].payload)))


def test_a_loan_holds_what_was_lent_and_no_more_of_its_lender(server: Server) -> None:
    """I5: what else the earlier save has may go, if storage has it."""
    server.save("first")
    save_borrowing(server, "second")
    for key in (KEY, NEXT):
        server.upload(key)
    server.reserve("third", THIRD)
    assert borrow(server, "third", THIRD, base=(NEXT, "second")) == [FROZEN]
    assert server.store.kept == {KEY.namespace("first")}
    assert borrow(server, "third", THIRD, base=(NEXT, "second"), names=(FRESH,)) == [FRESH]
    assert server.store.kept == {KEY.namespace("first"), NEXT.namespace("second")}
    server.write_back.abandon(THIRD, "third")
    assert not server.store.kept


@pytest.mark.parametrize("how", ["damaged", "absent", "late"])
def test_a_loan_of_nothing_ends_at_once(server: Server, how: str) -> None:
    """I5: also on a server that has no reservation which would end it."""
    server.save("first")
    server.upload()
    if how == "damaged":
        damage(server, FROZEN)
        assert borrow(server, "second") == []
    elif how == "absent":
        assert borrow(server, "second", names=("__9_9.distcp",)) == []
    else:
        with pytest.raises(DeadlineExceeded):
            server.write_back.lend(NEXT, "second", KEY, "first", [FROZEN], deadline=time.monotonic())
    assert not server.store.kept
    assert not server.write_back._slots.slot(NEXT).loans


def test_one_rank_that_is_lent_nothing_ends_no_loan_of_another(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether that is there already, or just being looked at."""
    server.save("first")
    server.upload()
    damage(server, FRESH)
    server.reserve("second", NEXT)
    read = server.store.read
    lent: list[list[str]] = []

    def meanwhile(chunk: ChunkId) -> object:
        if chunk.object.key.endswith(FROZEN) and not lent:
            lent.append([])
            lent[0] = borrow(server, "second", names=(FRESH,))
        return read(chunk)

    monkeypatch.setattr(server.store, "read", meanwhile)
    assert borrow(server, "second") == [FROZEN]
    assert lent == [[]]
    assert borrow(server, "second", names=(FRESH,)) == []
    assert server.store.kept == {KEY.namespace("first")}
    put_fresh(server, "second", NEXT)
    server.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])


def test_what_is_given_back_is_let_go_and_commits_nothing(server: Server) -> None:
    """I5: with the last of it the loan. What isn't lent, or of no save, is nobody's to give back."""
    server.save("first")
    server.upload()
    server.reserve("second", NEXT)
    assert sorted(borrow(server, "second", names=(FROZEN, FRESH))) == [FROZEN, FRESH]
    give_back = partial(server.write_back.take_back, NEXT, deadline=soon())
    give_back("second", ["__9_9.distcp"])
    give_back("third", [FROZEN])
    server.write_back.take_back(THIRD, "second", [FROZEN], deadline=soon())
    give_back("second", [FRESH])
    assert server.store.kept == {KEY.namespace("first")}
    give_back("second", [FROZEN])
    assert not server.store.kept
    put_fresh(server, "second", NEXT)
    with pytest.raises(CheckpointError, match="isn't lent"):
        server.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])
    assert borrow(server, "second") == [FROZEN]
    server.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])
    give_back("second", [FROZEN])
    delete(server, KEY)
    assert frozen_is_here(server)
    assert server.state(NEXT) == "committed second"


# ---- those that come to nothing ----


@pytest.mark.parametrize("deleted", [False, True])
def test_a_save_that_is_given_up_gives_back_what_was_lent(server: Server, deleted: bool) -> None:
    server.save("first")
    server.upload()
    server.reserve("second", NEXT)
    assert borrow(server, "second") == [FROZEN]
    assert server.store.kept >= {KEY.namespace("first")}
    if deleted:
        delete(server, KEY)
        assert frozen_is_here(server)
    server.write_back.abandon(NEXT, "second")
    assert server.namespaces == ([] if deleted else [KEY.namespace("first")])
    assert not server.store.kept


def test_a_loan_without_a_reservation_ends_by_itself(server: Server) -> None:
    server.save("first")
    server.upload()
    assert borrow(server, "second") == [FROZEN]
    server.write_back.tidy()
    assert server.store.kept == {KEY.namespace("first")}
    server.clock_ahead_s += (LOAN_LEASES + 1) * LONG_S
    server.write_back.tidy()
    assert not server.store.kept
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp was to be borrowed .* isn't lent \(any more\)"):
        server.hold_copy("second", NEXT, owner="b", files=files_of("second"), borrowed=[FROZEN])


def test_a_loan_without_a_reservation_lasts_as_long_as_the_save_grows(server: Server) -> None:
    """It may take long to send what did change."""
    server.save("first")
    server.upload()
    assert borrow(server, "second") == [FROZEN]
    put_fresh(server, "second", NEXT)
    for kept in (True, False):
        server.clock_ahead_s += (LOAN_LEASES + 1) * LONG_S
        server.write_back.tidy()
        assert (KEY.namespace("first") in server.store.kept) == kept


def test_a_loan_of_a_living_reservation_does_not_end(server: Server) -> None:
    server.save("first")
    server.reserve("second", NEXT)
    borrow(server, "second")
    server.clock_ahead_s += (LOAN_LEASES + 1) * LONG_S
    server.write_back.renew(NEXT, "second")
    server.write_back.tidy()
    put_fresh(server, "second", NEXT)
    server.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])
    assert server.state(NEXT) == "committed second"


def test_kills_at_every_step_leave_one_state_or_the_other() -> None:
    """F30, F32, I2, I3: before the commit there is none, behind it all of it; nothing is left over."""
    outcomes = set()
    for power_cut in (False, True):
        for at in range(1, 1000):
            server = Server(Bucket(), "a", lease_s=LONG_S)
            server.save("first")
            server.upload()
            server.store.sync(KEY.namespace("first"))
            server.gate.trap_at, server.gate.trap = server.gate.calls + at, server.gate.kill
            try:
                save_borrowing(server, "second")
                delete(server, KEY)
            except Killed:
                pass
            else:
                break
            server.restart(power_cut=power_cut)
            try:
                state = server.state(NEXT)
            except NotCommitted:
                state = ""
            outcomes.add(state)
            if state:
                assert frozen_is_here(server)
                assert server.store.kept >= {KEY.namespace("first"), NEXT.namespace("second")}
                server.upload(NEXT)
                assert server.bucket.objects[f"{NEXT.path}/{FROZEN}"] == BYTES
                delete(server, NEXT)
            else:
                assert server.store.kept <= {KEY.namespace("first")}
            server.upload(KEY)
            try:
                delete(server, KEY)
            except NotCommitted:
                pass
            assert server.namespaces == [], f"killed at step {at}"
    assert outcomes == {"", "committed second"}


def test_a_restart_finds_what_is_borrowed_by_the_record_alone(server: Server) -> None:
    server.save("first")
    server.upload()
    save_borrowing(server, "second")
    delete(server, KEY)
    server.restart(power_cut=True)
    assert server.store.kept == {KEY.namespace("first"), NEXT.namespace("second")}
    server.upload(NEXT)
    assert server.bucket.objects[f"{NEXT.path}/{FROZEN}"] == BYTES
    assert not server.store.kept


def test_a_record_with_borrowed_files_is_none_that_an_older_version_reads(server: Server) -> None:
    """It would take what is borrowed for nobody's, and drop it."""
    server.save("first")
    save_borrowing(server, "second")
    (record,) = (value for key, value in server.store.record.items() if key == b"save/" + NEXT.digest)
    assert b'"format": 2' in record
    save = decode_save(record)
    assert save.borrowed == {FROZEN: (KEY.path, "first")}
    assert decode_save(encode_save(save)) == save
    assert b'"format": 1' in encode_save(dataclasses.replace(save, borrowed={}))
    broken = record.replace(b'["run/step-1", "first"]', b'["run/step-1", 12345.0]')
    assert broken != record
    with pytest.raises(ValueError, match="not a save's record"):
        decode_save(broken)


def test_what_a_record_that_cannot_be_read_may_speak_of_stays_kept(server: Server) -> None:
    """I6: the lender's own record is damaged; that its borrower is uploaded says nothing about it."""
    server.save("first")
    save_borrowing(server, "second")
    server.store.record[b"save/" + KEY.digest] = b"no record"
    server.restart()
    assert server.store.kept == {KEY.namespace("first"), NEXT.namespace("second")}
    server.upload(NEXT)
    assert server.state(NEXT) == "durable second"
    assert server.store.kept == {KEY.namespace("first")}
    delete(server, NEXT)
    assert frozen_is_here(server)
    assert server.store.kept == {KEY.namespace("first")}


def test_what_is_borrowed_is_held_once(server: Server) -> None:
    """Saves wait for room by what can't be evicted, not by what is to be uploaded."""
    server.save("first")
    before = server.write_back._pending.held_bytes
    save_borrowing(server, "second")
    assert server.write_back._pending.held_bytes - before == len(parts_of("second")[FRESH])
    assert server.write_back.pending_bytes - before == sum(size for _, size in files_of("second"))


# ---- what isn't lent, and what isn't believed ----


@pytest.mark.parametrize(
    "base",
    [
        SaveKey("s3", "other/step-1"),
        SaveKey("s3", "run/step-1/deeper"),
        SaveKey("s3", "run/step-1", "__0"),
        SaveKey("s3", "run"),
    ],
)
def test_nothing_of_another_run_is_lent(server: Server, base: SaveKey) -> None:
    server.save("first", base)
    server.reserve("second", NEXT)
    with pytest.raises(ConfigurationError, match="isn't of the same run"):
        borrow(server, "second", base=(base, "first"))
    assert server.store.kept == {base.namespace("first")}


def test_only_who_knows_a_committed_save_borrows_from_it(server: Server) -> None:
    server.save("first")
    server.reserve("other", THIRD)
    server.put("other", THIRD)
    server.reserve("second", NEXT)
    assert borrow(server, "second", base=(KEY, "guessed")) == []
    assert borrow(server, "second", base=(SaveKey("s3", "run/step-9"), "first")) == []
    assert borrow(server, "second", base=(THIRD, "other")) == [], "that isn't committed"
    assert borrow(server, "second", names=("__9_9.distcp", ".metadata", "../step-1/" + FROZEN)) == []
    server.upload()
    server.write_back.delete(KEY, "", deadline=soon(), wait_s=0.0)
    assert borrow(server, "second") == [], "that is being deleted"


def test_a_file_that_was_not_lent_commits_nothing(server: Server) -> None:
    server.save("first")
    server.reserve("second", NEXT)
    put_fresh(server, "second", NEXT)
    for names in ((), (FRESH,)):
        assert borrow(server, "second", names=names) == list(names)
        with pytest.raises(CheckpointError, match="was to be borrowed from an earlier save, and isn't lent"):
            server.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])
    borrow(server, "second")
    with pytest.raises(CheckpointError, match="was written with 1089 bytes in all, not 7"):
        server.commit("second", NEXT, files=[(FROZEN, 7)], borrowed=[FROZEN])
    with pytest.raises(NotCommitted):
        server.state(NEXT)
    server.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])


def test_a_damaged_file_is_not_lent(server: Server) -> None:
    """F34: what is acknowledged was seen to be intact."""
    server.save("first")
    server.reserve("second", NEXT)
    damage(server, FROZEN)
    assert borrow(server, "second", names=(FROZEN, FRESH)) == [FRESH]
    chunks = server.store.chunks[KEY.namespace("first")]
    del chunks[next(chunk for chunk in chunks if chunk.object.key.endswith(FROZEN))]
    assert borrow(server, "second", names=(FROZEN,)) == []


def test_what_could_not_be_synced_is_not_acknowledged_by_who_borrowed_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F13: a failed fsync ends the durability of all that lies there."""
    server.save("first")
    server.reserve("second", NEXT)
    borrow(server, "second")
    put_fresh(server, "second", NEXT)
    sync = server.store.sync

    def fail(namespace: str) -> None:
        if namespace == KEY.namespace("first"):
            raise TorchCacheError("an fsync failed here")
        sync(namespace)

    monkeypatch.setattr(server.store, "sync", fail)
    with pytest.raises(TorchCacheError, match="an fsync failed here"):
        server.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])
    with pytest.raises(NotCommitted):
        server.state(NEXT)


def test_one_save_borrows_from_one(server: Server) -> None:
    server.save("first")
    server.save("other", THIRD)
    server.reserve("second", NEXT)
    assert borrow(server, "second") == [FROZEN]
    assert borrow(server, "second", base=(THIRD, "other")) == []
    assert borrow(server, "second", names=(FRESH,)) == [FRESH]
    assert borrow(server, "rival") == [], "the path is reserved for another"


def test_what_is_being_dropped_is_not_lent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drop that has begun can't be called back."""
    server.save("first")
    server.upload()
    lent: list[list[str]] = []
    drop = server.store.drop

    def meanwhile(namespace: str) -> int:
        lent.append(borrow(server, "second"))
        return drop(namespace)

    monkeypatch.setattr(server.store, "drop", meanwhile)
    slots = server.write_back._slots
    save = slots.slot(KEY).save
    assert save is not None
    # As if its own record had gone at this very moment: another thread may still have seen it.
    monkeypatch.setattr(borrowing.Borrowing, "_find", lambda self, key, save_id: save)
    slots.forget_save(slots.slot(KEY))
    slots.drop(slots.slot(KEY), KEY.namespace("first"))
    assert lent == [[]]
    assert server.namespaces == []


def test_a_disk_that_fails_lends_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.save("first")
    server.upload()
    server.reserve("second", NEXT)

    def fail(namespace: str, keep: bool) -> None:
        raise OutOfSpace("the disk can't")

    with monkeypatch.context() as patched:
        patched.setattr(server.store, "keep", fail)
        with pytest.raises(TorchCacheError, match="the disk can't"):
            borrow(server, "second")
    with pytest.raises(CheckpointError, match="isn't lent"):
        server.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])
    assert borrow(server, "second") == [FROZEN]


def test_a_loan_is_read_no_longer_than_its_caller_waits(server: Server) -> None:
    """I4"""
    server.save("first")
    server.reserve("second", NEXT)
    with pytest.raises(DeadlineExceeded, match="couldn't be read in time to be lent from"):
        server.write_back.lend(NEXT, "second", KEY, "first", [FROZEN], deadline=time.monotonic())
    put_fresh(server, "second", NEXT)
    with pytest.raises(CheckpointError, match="isn't lent"):
        server.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])
    assert borrow(server, "second") == [FROZEN]


def test_few_calls_read_at_a_time(server: Server) -> None:
    """A thread less for each, of those that leases are renewed by."""
    server.save("first")
    server.reserve("second", NEXT)
    reading = server.write_back._borrowing._reading
    for _ in range(MOST_READING):
        assert reading.acquire(blocking=False)
    with pytest.raises(Overloaded, match="16 others borrow files here just now"):
        borrow(server, "second")
    reading.release()
    assert borrow(server, "second") == [FROZEN]
    assert borrow(server, "second", names=(FRESH,)) == [FRESH], "it was given back"


# ---- what several threads do at a time ----


def beside(work: Callable[[], object], others: list[threading.Thread]) -> None:
    """Runs `work` in another thread as far as it gets: to its end, or until it has to wait for this one."""
    others.append(threading.Thread(target=work))
    others[-1].start()
    others[-1].join(0.5)


def test_a_loan_does_not_end_amid_the_commit_that_needs_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I2: nobody else holds the bytes any more, and the loan's time is over."""
    server.save("first")
    server.upload()
    assert borrow(server, "second") == [FROZEN]
    delete(server, KEY)
    put_fresh(server, "second", NEXT)
    server.clock_ahead_s += (LOAN_LEASES + 1) * LONG_S
    others: list[threading.Thread] = []
    sync = server.store.sync

    def tidy() -> None:
        server.write_back._borrowing.tidy(server.write_back._slots.slot(NEXT), deadline=soon())

    def meanwhile(namespace: str) -> None:
        sync(namespace)
        if not others:
            beside(tidy, others)

    monkeypatch.setattr(server.store, "sync", meanwhile)
    server.hold_copy("second", NEXT, owner="b", files=files_of("second"), borrowed=[FROZEN])
    for other in others:
        other.join()
    assert others
    assert frozen_is_here(server)
    assert server.store.kept == {KEY.namespace("first"), NEXT.namespace("second")}


def test_nothing_is_given_back_amid_the_commit_that_needs_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I2: as a call may that was late; nobody else holds the bytes any more."""
    server.save("first")
    server.upload()
    server.reserve("second", NEXT)
    assert borrow(server, "second") == [FROZEN]
    delete(server, KEY)
    put_fresh(server, "second", NEXT)
    others: list[threading.Thread] = []
    sync = server.store.sync

    def meanwhile(namespace: str) -> None:
        sync(namespace)
        if not others:
            beside(lambda: server.write_back.take_back(NEXT, "second", [FROZEN], deadline=soon()), others)

    monkeypatch.setattr(server.store, "sync", meanwhile)
    server.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])
    others[0].join()
    assert frozen_is_here(server)
    assert server.store.kept == {KEY.namespace("first"), NEXT.namespace("second")}


def test_a_flag_is_not_set_by_what_a_save_was_a_moment_ago(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I5: it became durable, and its bytes may go; the end of a loan settles them at the same time."""
    server.save("first")
    slots = server.write_back._slots
    save = slots.slot(KEY).save
    assert save is not None

    class Entered(threading.Condition):
        def __enter__(self) -> bool:
            if threading.current_thread() is updating and not slots._keeping.locked():
                other = threading.Thread(target=slots.settle, args=[save.namespaces])
                other.start()
                other.join()
            return super().__enter__()

    updating = threading.Thread(
        target=slots.update_save, args=[slots.slot(KEY), save.durable("version", 1.0)]
    )
    monkeypatch.setattr(slots, "changed", Entered())
    updating.start()
    updating.join()
    assert not server.store.kept


def test_no_flag_is_left_of_what_was_dropped_meanwhile(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I5"""
    server.save("first")
    slots = server.write_back._slots
    keep = server.store.keep
    others: list[threading.Thread] = []

    def drop() -> None:
        slots.forget_save(slots.slot(KEY))
        slots.drop(slots.slot(KEY), KEY.namespace("first"))

    def meanwhile(namespace: str, kept: bool) -> None:
        if not others:
            beside(drop, others)
        keep(namespace, kept)

    monkeypatch.setattr(server.store, "keep", meanwhile)
    slots.settle([KEY.namespace("first")])
    others[0].join()
    assert server.namespaces == []
    assert not server.store.kept


# ---- pins ----


def test_who_pins_a_save_pins_what_it_has_borrowed(server: Server) -> None:
    """I6: also once all of it is durable, and over a restart; not any longer than that."""
    server.save("first")
    server.upload()
    save_borrowing(server, "second")
    server.upload(NEXT)
    pinned = NEXT.namespace("second")
    server.store.policies[pinned] = Policy(pinned=True)
    server.write_back.settle_pin(pinned)
    assert server.store.kept == {KEY.namespace("first")}
    delete(server, KEY)
    server.restart()
    assert server.store.kept == {KEY.namespace("first")}
    del server.store.policies[pinned]
    server.write_back.settle_pin(pinned)
    assert not server.store.kept
    server.store.policies[pinned] = Policy(pinned=True)
    server.write_back.settle_pin(pinned)
    delete(server, NEXT)
    assert server.namespaces == []
    assert not server.store.kept


# ---- copies ----


def test_what_is_lent_to_the_owner_of_a_save_ends_with_its_lease(server: Server) -> None:
    """Whoever drops a copy means a server that has one."""
    server.save("first")
    server.reserve("second", NEXT)
    assert borrow(server, "second") == [FROZEN]
    server.write_back.drop_copy(NEXT, "second", deadline=soon())
    put_fresh(server, "second", NEXT)
    server.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])
    assert server.state(NEXT) == "committed second"


def owner_and_copy() -> tuple[Server, Server]:
    """Two servers; the second has a copy of the save of the first."""
    bucket = Bucket()
    a, b = Server(bucket, "a", lease_s=LONG_S), Server(bucket, "b", lease_s=LONG_S)
    a.reserve("first")
    for server in (a, b):
        server.put("first")
    b.hold_copy("first", owner="a")
    a.commit("first")
    b.write_back.confirm_copy(KEY, "first", committed_unix_s=1.0, replicas=2, deadline=soon())
    return a, b


def copy_borrowing(a: Server, b: Server) -> None:
    a.reserve("second", NEXT)
    for server in (a, b):
        assert borrow(server, "second") == [FROZEN]
        put_fresh(server, "second", NEXT)
    b.hold_copy("second", NEXT, owner="a", files=files_of("second"), borrowed=[FROZEN])
    a.commit("second", NEXT, files=files_of("second"), borrowed=[FROZEN])
    b.write_back.confirm_copy(NEXT, "second", committed_unix_s=2.0, replicas=2, deadline=soon())


@pytest.mark.parametrize("durable", [False, True])
def test_a_server_with_a_copy_lends_too(durable: bool) -> None:
    """Also behind the upload of the save it had the copy of: until then it stays, and may be evicted."""
    a, b = owner_and_copy()
    if durable:
        a.upload()
        b.write_back.tidy()
        assert b.namespaces == [KEY.namespace("first")]
        assert not b.store.kept
    copy_borrowing(a, b)
    assert b.store.kept == {KEY.namespace("first"), NEXT.namespace("second")}
    assert b.write_back.get(NEXT, deadline=soon()).borrowed == {FROZEN: (KEY.path, "first")}
    b.restart(power_cut=False)
    assert b.store.kept == {KEY.namespace("first"), NEXT.namespace("second")}
    a.upload(NEXT)
    a.upload()
    b.write_back.tidy()
    assert not b.store.kept
    b.write_back.drop_copy(NEXT, "second", deadline=soon())
    b.write_back.drop_copy(KEY, "first", deadline=soon())
    assert b.namespaces == []


def test_a_copy_with_borrowed_files_is_uploaded_if_its_owner_is_lost() -> None:
    """F37"""
    a, b = owner_and_copy()
    a.upload()
    b.write_back.tidy()
    copy_borrowing(a, b)
    b.write_back.tidy()
    b.clock_ahead_s += 10 * LONG_S
    b.write_back.tidy()
    b.upload(NEXT)
    assert b.state(NEXT) == "durable second"
    assert b.bucket.objects[f"{NEXT.path}/{FROZEN}"] == BYTES
    assert b.bucket.objects[NEXT.metadata_key] == metadata_of("second")
    assert b.bucket.objects[NEXT.manifest_key] == manifest_of("second")


def test_of_a_run_one_copy_stays_to_be_lent_and_none_over_a_restart() -> None:
    """I5"""
    a, b = owner_and_copy()
    a.upload()
    b.write_back.tidy()
    a.reserve("other", THIRD)
    for server in (a, b):
        server.put("other", THIRD)
    b.hold_copy("other", THIRD, owner="a")
    a.commit("other", THIRD)
    a.upload(THIRD)
    b.write_back.tidy()
    assert b.namespaces == [THIRD.namespace("other")]
    b.restart()
    assert b.namespaces == []


def test_what_another_server_deleted_leaves_nothing_at_its_owner() -> None:
    """I5: a durable save any server can delete; the saves of a run lie where the first of them did."""
    a, b = owner_and_copy()
    a.upload()
    b.write_back.tidy()
    copy_borrowing(a, b)
    a.write_back.drop_copy(NEXT, "second", deadline=soon())
    assert NEXT.namespace("second") in a.namespaces, "it isn't durable yet"
    a.upload(NEXT)
    b.write_back.tidy()
    for key in (KEY, NEXT):
        delete(b, key)
        for server in (a, b):
            server.write_back.drop_copy(key, "", deadline=soon())
    assert a.namespaces == b.namespaces == []


def test_who_deletes_a_save_lets_go_of_the_copy_it_had_of_it() -> None:
    """I5: it wasn't needed any more, and stayed to be lent."""
    a, b = owner_and_copy()
    a.upload()
    b.write_back.tidy()
    assert b.namespaces == [KEY.namespace("first")]
    delete(b, KEY)
    assert b.namespaces == []


def test_what_is_deleted_elsewhere_may_have_to_give_its_claim_up_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """I5: else its owner would keep it, and not hear of the deletion again."""
    a, _ = owner_and_copy()
    a.upload()
    slots = a.write_back._slots
    save = slots.slot(KEY).save
    assert save is not None
    slots.update_save(slots.slot(KEY), dataclasses.replace(save, claimed=True))
    settling = threading.Thread(target=slots.update_save, args=[slots.slot(KEY), save])
    wait_for = slots.changed.wait_for

    def waiting(predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        settling.start()
        return wait_for(predicate, 60)

    monkeypatch.setattr(slots.changed, "wait_for", waiting)
    a.write_back.drop_copy(KEY, "", deadline=soon())
    settling.join()
    assert a.namespaces == []


def test_a_copy_that_eviction_took_is_not_lent() -> None:
    a, b = owner_and_copy()
    a.upload()
    b.write_back.tidy()
    b.store.drop(KEY.namespace("first"))
    b.write_back.tidy()
    assert borrow(b, "second") == []


# ---- by the under-store itself ----


def copies(server: Server) -> list[str]:
    return [what.removeprefix("copy ") for what in server.gate.log if what.startswith("copy ")]


def test_what_lies_in_the_under_store_already_is_copied_there(server: Server) -> None:
    server.save("first")
    server.upload()
    save_borrowing(server, "second")
    server.upload(NEXT)
    assert copies(server) == [f"{NEXT.path}/{FROZEN}"]
    assert server.state(NEXT) == "durable second"
    save_borrowing(server, "third", THIRD, base=(NEXT, "second"))
    delete(server, KEY)
    server.upload(THIRD)
    assert copies(server) == [f"{NEXT.path}/{FROZEN}", f"{THIRD.path}/{FROZEN}"], "of the one between"
    assert server.bucket.objects[f"{THIRD.path}/{FROZEN}"] == BYTES


@pytest.mark.parametrize("how", ["changed", "gone", "restart"])
def test_what_is_not_there_any_more_is_uploaded(server: Server, how: str) -> None:
    server.save("first")
    server.upload()
    save_borrowing(server, "second")
    shard = f"{KEY.path}/{FROZEN}"
    if how == "changed":
        server.bucket.objects[shard] = b"!" * len(BYTES)
    elif how == "gone":
        del server.bucket.objects[shard]
    else:
        server.restart()
    server.upload(NEXT)
    assert server.bucket.objects[f"{NEXT.path}/{FROZEN}"] == BYTES
    assert server.state(NEXT) == "durable second"
