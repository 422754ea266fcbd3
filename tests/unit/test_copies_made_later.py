"""Copies of saves that were committed before: made again since another was lost, by who may be a moment behind."""

from __future__ import annotations

from contextlib import suppress

import pytest
from write_back_world import (
    KEY,
    LEASE_S,
    Bucket,
    Server,
    manifest_of,
    metadata_of,
    parts_of,
    published,
    soon,
)

from torchcache.errors import CheckpointError, IntegrityError, NotCommitted, TransientError


def copy_later(server: Server, save_id: str, *, committed_unix_s: float = 1.0) -> None:
    """As the server does it that is to upload the save."""
    server.put(save_id)
    server.write_back.prepare_copy(
        KEY,
        save_id,
        [(name, len(data)) for name, data in parts_of(save_id).items()],
        metadata_of(save_id),
        manifest_of(save_id),
        replaceable=(),
        overwrite=False,
        writer="writer",
        owner="a",
        committed_unix_s=committed_unix_s,
        deadline=soon(),
    )


def test_it_counts_by_the_claim_and_outlives_the_owner() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("one")
    copy_later(b, "one")
    status = b.write_back.get(KEY, deadline=soon(), check_claim=True)
    assert (status.save_id, status.committed_unix_s, status.uncertain) == ("one", 1.0, False)
    b.write_back.tidy()
    b.clock_ahead_s += 4 * LEASE_S  # a is never heard of again
    b.write_back.tidy()
    b.upload()
    assert published(bucket) == "one"


def test_it_does_not_bring_back_what_was_deleted_or_replaced_meanwhile() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("one")
    a.write_back.delete(KEY, "one", deadline=soon(), wait_s=0.0)
    a.upload()
    copy_later(b, "one")
    with pytest.raises(NotCommitted):
        b.write_back.get(KEY, deadline=soon())
    b.write_back.tidy()
    assert not b.write_back.holdings.all()
    a.save("two")
    a.upload()
    copy_later(b, "one")
    assert b.write_back.get(KEY, deadline=soon()).save_id == "two"
    b.write_back.tidy()
    assert not b.write_back.holdings.all()
    assert KEY.namespace("one") not in b.store.chunks


@pytest.mark.parametrize("comes_first", [True, False])
def test_it_does_not_bring_back_what_is_being_deleted(comes_first: bool) -> None:
    """The deletion was answered, and nothing of it done yet: who deletes needn't know the save's id."""
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("one")
    if comes_first:
        copy_later(b, "one")
    a.write_back.delete(KEY, "", deadline=soon(), wait_s=0.0)
    b.write_back.drop_copy(KEY, "", deadline=soon())
    if not comes_first:
        copy_later(b, "one")
    b.write_back.tidy()
    with suppress(NotCommitted):
        status = b.write_back.get(KEY, deadline=soon())
        raise AssertionError(status.save_id)
    a.upload()  # the deletion ends
    for _ in range(2):
        b.write_back.tidy()
        b.clock_ahead_s += 4 * LEASE_S
    b.upload()
    assert published(bucket) is None
    assert not b.write_back.holdings.all()


def test_while_storage_is_away_it_is_not_believed() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("one")
    copy_later(b, "one")

    def fail(call: str, key: str) -> None:
        raise TransientError("away")

    b.under_store.fail = fail
    with pytest.raises(TransientError):
        b.write_back.get(KEY, deadline=soon())
    assert a.write_back.holdings.is_responsible(a.write_back.holdings.waiting()[0].save, deadline=soon())


def test_who_has_it_damaged_does_not_say_that_it_has_it() -> None:
    a = Server(Bucket(), "a")
    a.reserve("one")
    a.put("one")
    files = [(name, len(data)) for name, data in parts_of("one").items()]
    a.write_back.commit(
        KEY, "one", files, metadata_of("one"), manifest_of("one"), replicas=2, deadline=soon()
    )
    copy_later(a, "one")
    chunks = a.store.chunks[KEY.namespace("one")]
    gone = chunks.pop(next(iter(chunks)))
    with pytest.raises(IntegrityError):
        a.upload()
    with pytest.raises(CheckpointError, match="damaged here"):
        a.write_back.prepare_copy(
            KEY,
            "one",
            files,
            b"",
            b"",
            replaceable=(),
            overwrite=False,
            writer="writer",
            owner="b",
            committed_unix_s=1.0,
            deadline=soon(),
        )
    assert gone is not None


def test_the_server_that_the_claim_names_is_responsible() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("one")
    (waiting,) = a.write_back.holdings.waiting()
    assert a.write_back.holdings.is_responsible(waiting.save, deadline=soon())
    copy_later(b, "one")
    b.write_back.tidy()
    b.clock_ahead_s += 4 * LEASE_S
    b.write_back.tidy()
    assert not a.write_back.holdings.is_responsible(waiting.save, deadline=soon())
    (taken,) = b.write_back.holdings.waiting()
    assert b.write_back.holdings.is_responsible(taken.save, deadline=soon())
