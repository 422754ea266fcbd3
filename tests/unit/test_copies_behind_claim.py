"""Copies and saves of which the claim tells nothing yet, since storage was away when they were committed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from torchcache_server.cache.claims import Claim
from write_back_world import (
    KEY,
    LEASE_S,
    Bucket,
    Server,
    assert_settled,
    manifest_of,
    metadata_of,
    parts_of,
    soon,
)

from torchcache.errors import Overloaded, TransientError


def away(*servers: Server) -> Callable[[], None]:
    """Storage goes away for these; the call that is returned brings it back."""

    def fail(call: str, key: str) -> None:
        raise TransientError("away")

    for server in servers:
        server.under_store.fail = fail

    def back() -> None:
        for server in servers:
            server.under_store.fail = lambda call, key: None

    return back


def prepare(
    at: Server, save_id: str, owner: Server, *, overwrite: bool = False, committed_unix_s: float = 0.0
) -> None:
    at.put(save_id)
    at.write_back.prepare_copy(
        KEY,
        save_id,
        [(name, len(data)) for name, data in parts_of(save_id).items()],
        metadata_of(save_id),
        manifest_of(save_id),
        replaceable=owner.write_back.replaceable(KEY) if not committed_unix_s else (),
        overwrite=overwrite,
        writer="writer",
        owner=owner.store.server_id,
        committed_unix_s=committed_unix_s,
        deadline=soon(),
    )


def commit(at: Server, save_id: str, copy_at: Server | None = None, *, overwrite: bool = False) -> None:
    """A save that is reserved already, with a copy that is told of the commit."""
    at.put(save_id)
    if copy_at is not None:
        prepare(copy_at, save_id, at, overwrite=overwrite)
    files = [(name, len(data)) for name, data in parts_of(save_id).items()]
    status = at.write_back.commit(
        KEY,
        save_id,
        files,
        metadata_of(save_id),
        manifest_of(save_id),
        replicas=1 if copy_at is None else 2,
        deadline=soon(),
    )
    if copy_at is not None:
        copy_at.write_back.confirm_copy(
            KEY, save_id, committed_unix_s=status.committed_unix_s, replicas=2, deadline=soon()
        )


def tidy_late(*servers: Server, times: int = 3) -> None:
    """Each looks, and looks again when who hasn't been heard of meanwhile is taken for dead."""
    for _ in range(times):
        for server in servers:
            server.write_back.tidy()
            server.clock_ahead_s += 4 * LEASE_S


def told(server: Server) -> tuple[str, bool]:
    """What a reader gets, and whether it is told that a later one is known."""
    status = server.write_back.get(KEY, deadline=soon(), check_claim=True)
    return status.save_id, status.superseded


def second_over_first() -> tuple[Bucket, Server, Server]:
    """A has the first save, not uploaded, and commits the second in its place while storage is away, with a copy at b;
    a's claim goes on saying that the first is what the path holds. Storage is back then."""
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("first")
    a.reserve("second", overwrite=True)
    back = away(a, b)
    commit(a, "second", b, overwrite=True)
    assert told(b) == ("second", False)
    back()
    claim = Claim.decode(bucket.objects[KEY.claim_key])
    assert (claim.save_id, claim.state) == ("first", "committed")
    return bucket, a, b


def test_a_copy_outlives_its_owner_whose_claim_still_names_the_save_before() -> None:
    bucket, _, b = second_over_first()
    assert told(b) == ("second", False)
    tidy_late(b)  # a is never heard of again
    b.upload()
    assert_settled(bucket, "second")


def test_who_has_the_later_save_does_not_call_it_replaced() -> None:
    bucket, a, b = second_over_first()
    assert told(a) == ("second", False)
    b.write_back.tidy()
    a.upload()
    b.write_back.tidy()
    assert_settled(bucket, "second")
    assert not b.write_back.holdings.all()


def test_a_late_copy_of_the_save_before_is_not_what_counts() -> None:
    bucket, a, b = second_over_first()
    prepare(b, "first", a, committed_unix_s=1.0)
    assert told(b) == ("second", False)
    tidy_late(b)
    b.upload()
    assert_settled(bucket, "second")
    tidy_late(b)
    assert not b.write_back.holdings.all()


def test_what_was_published_of_the_save_before_is_replaced() -> None:
    bucket, a, b = second_over_first()
    for name, data in parts_of("first").items():
        bucket.objects[f"{KEY.path}/{name}"] = data
    bucket.objects[KEY.metadata_key] = metadata_of("first")
    bucket.objects[KEY.manifest_key] = manifest_of("first")
    a.gate.dead = True
    tidy_late(b)
    b.upload()
    assert_settled(bucket, "second")


def test_a_copy_that_waits_for_its_commit_stays_while_the_save_before_is_uploaded() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("first")
    a.reserve("second", overwrite=True)
    prepare(b, "second", a, overwrite=True)
    b.write_back.tidy()
    assert [save.save_id for save in b.write_back.holdings.all()] == ["second"]
    commit(a, "second", b, overwrite=True)
    assert told(b) == ("second", False)


@pytest.mark.parametrize("gives_up", [True, False])
def test_another_writer_does_not_end_what_its_claim_cannot_name(gives_up: bool) -> None:
    bucket, a, b = second_over_first()
    c = Server(bucket, "c")
    c.reserve("third", overwrite=True)
    b.write_back.tidy()
    assert told(b)[0] == "second"
    if gives_up:
        c.write_back.abandon(KEY, "third")
        c.write_back.tidy()
        a.gate.dead = True
        tidy_late(b)
        b.upload()
        assert_settled(bucket, "second")
    else:
        c.put("third")
        c.commit("third")
        b.write_back.tidy()
        c.upload()
        assert_settled(bucket, "third")


def other_over_first(*, late: bool) -> tuple[Bucket, Server, Server, Callable[[], None]]:
    """A has the first save, not uploaded, with a copy at b, maybe a late one; b commits the third in its place while
    storage is away from both, so that the claim goes on saying that it is being written."""
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.reserve("first")
    commit(a, "first", None if late else b)
    if late:
        prepare(b, "first", a, committed_unix_s=1.0)
    b.reserve("third", overwrite=True)
    back = away(a, b)
    commit(b, "third")
    claim = Claim.decode(bucket.objects[KEY.claim_key])
    assert (claim.save_id, claim.state, claim.over is not None) == ("third", "reserved", True)
    return bucket, a, b, back


@pytest.mark.parametrize("restarts", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_a_copy_does_not_replace_the_save_that_was_committed_over_it(late: bool, restarts: bool) -> None:
    bucket, _, b, back = other_over_first(late=late)
    assert told(b) == ("third", False)
    back()
    if restarts:
        b.restart()
    assert told(b) == ("third", False)
    tidy_late(b)
    assert told(b) == ("third", False)
    b.upload()
    tidy_late(b)
    assert_settled(bucket, "third")
    assert told(b) == ("third", False)


@pytest.mark.parametrize("published", [True, False])
def test_who_took_the_claim_of_a_save_that_could_not_be_told_is_overwritten(published: bool) -> None:
    """Its owner, to which the other server was as dead while storage was away."""
    bucket, a, b, back = other_over_first(late=False)
    back()
    a.write_back.tidy()
    with pytest.raises(Overloaded):
        a.upload()
    a.clock_ahead_s += 4 * LEASE_S
    if published:
        a.upload()
    else:
        a.upload_half()
    b.write_back.tidy()
    assert told(b)[0] == "third"
    b.upload()
    if not published:
        with suppress(Overloaded):
            a.upload()
    b.write_back.tidy()
    b.upload()
    a.write_back.tidy()
    a.upload()
    assert_settled(bucket, "third")
    assert told(a)[0] == "third"
