"""Two writers of one path in two servers, whose stores share nothing but the under-store (F31)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
from torchcache_server.cache.catalogue import HeldElsewhere
from torchcache_server.cache.claims import DEAD_AFTER_LEASES, Claim
from write_back_world import (
    KEY,
    Bucket,
    Killed,
    Server,
    always_whole,
    assert_settled,
    published,
    soon,
)

from torchcache.errors import AlreadyExists, DeadlineExceeded, NotCommitted, Overloaded, ServerUnavailable

LONG_S = 1000.0
"""A lease that doesn't run out by itself."""


def test_another_servers_live_writer_keeps_its_path() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a", lease_s=1.5), Server(bucket, "b", lease_s=1.5)
    a.reserve("first")
    stop = threading.Event()

    def look_after() -> None:
        while not stop.wait(0.05):
            a.write_back.renew(KEY, "first")
            a.write_back.tidy()

    thread = threading.Thread(target=look_after)
    thread.start()
    try:
        with pytest.raises(
            AlreadyExists, match="another save of s3/run/step-1 is being written by writer of first"
        ):
            b.reserve("second", overwrite=True, wait_s=60.0)
    finally:
        stop.set()
        thread.join()
    a.put("first")
    a.commit("first")
    a.upload()
    assert_settled(bucket, "first")


def test_another_servers_dead_writer_is_waited_for_over_several_calls() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a", lease_s=100.0), Server(bucket, "b", lease_s=1.0)
    a.reserve("first")
    with pytest.raises(DeadlineExceeded, match="reserved by writer of first"):
        b.reserve("second", wait_s=0.01)
    b.clock_ahead_s = DEAD_AFTER_LEASES * 100.0
    b.reserve("second", wait_s=60.0 + b.clock_ahead_s)
    a.put("first")
    with pytest.raises(AlreadyExists, match="writer of second took the path over"):
        a.commit("first")
    b.put("second")
    b.commit("second")
    b.upload()
    a.write_back.abandon(KEY, "first")
    a.write_back.tidy()
    assert_settled(bucket, "second")
    assert a.state() == b.state() == "durable second"


def test_an_overtaken_writer_that_gives_up_leaves_the_others_claim_alone() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.reserve("first")
    b.reserve("second")
    a.write_back.abandon(KEY, "first")
    a.write_back.tidy()
    claim = Claim.decode(bucket.objects[KEY.claim_key])
    assert (claim.server_id, claim.save_id) == ("b", "second")
    b.put("second")
    b.commit("second")
    b.upload()
    assert_settled(bucket, "second")


def test_another_servers_committed_save_is_there_to_stay() -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("first")
    with pytest.raises(
        AlreadyExists, match=r"server a has not uploaded yet.*pass overwrite=True or another path"
    ):
        b.reserve("second")
    with pytest.raises(NotCommitted):
        b.state()


def test_overwriting_another_servers_committed_save_ends_its_upload() -> None:
    bucket = Bucket()
    always_whole(bucket)
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("first")
    b.save("second", overwrite=True)
    a.upload()
    assert a.state() == "failed first"
    assert not a.store.kept
    with pytest.raises(AlreadyExists, match="superseded"):
        raise a.write_back.get(KEY, deadline=1e18).error or AssertionError
    b.upload()
    a.upload()
    assert_settled(bucket, "second")
    assert a.state() == "durable second"
    a.restart()
    a.upload()
    assert a.state() == "durable second"


def test_of_two_servers_at_any_interleaving_one_wins() -> None:
    """B runs whole, from reserve to durable, at each point of A's save; A goes on behind it and mends nothing."""
    outcomes = set()
    for at in range(1, 200):
        bucket = Bucket()
        always_whole(bucket)
        a, b = Server(bucket, "a"), Server(bucket, "b")
        won: list[str] = []

        def rival(b: Server = b, won: list[str] = won) -> None:
            try:
                b.save("second")
            except AlreadyExists:
                return
            won.append("second")
            b.upload()

        a.gate.trap_at, a.gate.trap = at, rival
        try:
            a.save("first")
            won.append("first")
            a.upload()
        except AlreadyExists:
            pass
        if a.gate.calls < at:
            break
        assert len(won) == 1, f"at {at}: {won}"
        a.write_back.abandon(KEY, "first")
        a.write_back.tidy()
        assert_settled(bucket, won[0])
        assert a.state() == f"durable {won[0]}"
        outcomes.update(won)
    assert outcomes == {"first", "second"}


def test_an_overwriting_server_wins_over_a_zombie_at_any_point() -> None:
    """A, itself overwriting, sleeps at any point of its save; B overwrites; A wakes up and must not touch B's."""
    acknowledged = 0
    for at in range(1, 300):
        bucket = Bucket()
        a, b = Server(bucket, "a"), Server(bucket, "b")
        a.save("old")
        a.upload()
        always_whole(bucket)
        start = a.gate.calls
        granted: list[str] = []
        overtaken: list[str] = []

        def rival(b: Server = b, granted: list[str] = granted, overtaken: list[str] = overtaken) -> None:
            overtaken += granted
            b.save("second", overwrite=True)
            b.upload()
            assert published(b.bucket) == "second"

        a.gate.trap_at, a.gate.trap = start + at, rival
        try:
            a.reserve("first", overwrite=True)
            granted.append("first")
            a.put("first")
            a.commit("first")
            acknowledged += 1
        except AlreadyExists:
            pass
        a.upload()
        if a.gate.calls < start + at:
            break
        a.write_back.abandon(KEY, "first")
        a.write_back.tidy()
        b.write_back.tidy()
        last = published(bucket)
        assert last == "second" or not overtaken
        assert_settled(bucket, last)
        assert a.state() == b.state() == f"durable {last}"
    assert at > 60
    assert acknowledged > 20


def test_a_server_killed_at_any_point_leaves_the_path_to_another() -> None:
    for at in range(1, 300):
        bucket = Bucket()
        always_whole(bucket)
        a, b = Server(bucket, "a"), Server(bucket, "b")
        a.gate.trap_at, a.gate.trap = at, a.gate.kill
        acknowledged = False
        try:
            a.save("first")
            acknowledged = True
            a.upload()
            break
        except Killed:
            pass
        try:
            b.save("second")
        except AlreadyExists:
            b.save("second", overwrite=True)
        else:
            assert not acknowledged, "an acknowledged save was overtaken unasked"
        b.upload()
        b.write_back.tidy()
        assert_settled(bucket, "second")
        a.restart()
        a.upload()
        a.write_back.tidy()
        assert_settled(bucket, "second")
        assert a.state() == "durable second"
    assert at > 30


def test_a_committed_save_outlives_another_servers_writer_that_dies_at_any_step() -> None:
    """I2: who overwrites takes the claim long before it commits; until then nothing is in place of the old save."""
    for kill_at in range(1, calls_of_an_overwrite() + 1):
        bucket, a, b = over_another_servers()
        acknowledged = save_until_killed(b, kill_at)
        for _ in range(3):
            look_after(a)  # b is dead, and may or may not be taken for it
        b.restart(power_cut=True)
        for _ in range(3):
            look_after(b)
            look_after(a)
        left = published(bucket)
        assert left == "later" if acknowledged else left in ("old", "later"), f"killed at {kill_at}"
        assert_settled(bucket, left)
        assert a.state() == b.state() == f"durable {left}"


def look_after(server: Server) -> None:
    """What its threads do; and then so much time passes that who hasn't been heard of is taken for dead."""
    server.write_back.tidy()
    with suppress(Overloaded):
        server.upload()
    server.clock_ahead_s += (DEAD_AFTER_LEASES + 1) * LONG_S


def over_another_servers() -> tuple[Bucket, Server, Server]:
    """A bucket with a checkpoint, and server a with a later one that isn't uploaded; b is about to overwrite that."""
    bucket = Bucket()
    a, b = Server(bucket, "a", lease_s=LONG_S), Server(bucket, "b", lease_s=LONG_S)
    b.save("oldest")
    b.upload()
    a.save("old", overwrite=True)
    return bucket, a, b


def calls_of_an_overwrite() -> int:
    _, _, b = over_another_servers()
    before = b.gate.calls
    b.save("later", overwrite=True)
    return b.gate.calls - before


def save_until_killed(server: Server, kill_at: int) -> bool:
    """Whether the commit was acknowledged before the kill."""
    server.gate.trap_at = server.gate.calls + kill_at
    server.gate.trap = server.gate.kill
    try:
        server.save("later", overwrite=True)
    except Killed:
        return False
    return True


@pytest.mark.parametrize("sees_it", ["in passing", "when it is asked to overwrite"])
def test_a_copy_learns_from_the_claim_that_it_counts(sees_it: str) -> None:
    """I2: the owner and the writer died behind the commit; nobody told the server with the copy."""
    bucket = Bucket()
    a, b, c = (Server(bucket, name, lease_s=LONG_S) for name in "abc")
    a.reserve("old")
    a.put("old")
    b.put("old")
    b.hold_copy("old", owner="a")
    a.commit("old")
    if sees_it == "in passing":
        b.write_back.tidy()
        c.reserve("later", overwrite=True)
    else:
        b.reserve("later", overwrite=True)
    b.restart()
    for _ in range(4):
        look_after(b)
    assert b.state() == "durable old"
    assert_settled(bucket, "old")


# ---- who is asked, and was asleep while another server was written to ----


def read(server: Server, meanwhile: Callable[[], None] = lambda: None, at: int = 0) -> str:
    """What a reader is given who asks this server first; `meanwhile` happens at its call number `at`."""
    server.gate.trap_at, server.gate.trap = server.gate.calls + at, meanwhile
    status = server.write_back.get(KEY, deadline=soon(), check_claim=True)
    return "another server's" if status.superseded else status.save_id + "?" * status.uncertain


def hold_confirmed_copy(server: Server, *, owner: str) -> None:
    server.put("first")
    server.hold_copy("first", owner=owner)
    server.write_back.confirm_copy(KEY, "first", committed_unix_s=1.0, replicas=2, deadline=soon())


@pytest.mark.parametrize("uploaded", [False, True])
def test_a_server_that_slept_gives_nobody_what_another_has_replaced(uploaded: bool) -> None:
    """Its own save is committed, and the claim that told of the later one is gone with that one's upload (I2)."""
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("first")
    if uploaded:
        a.upload()
    assert read(a) == "first"
    b.save("second", overwrite=True)
    assert read(a) == "another server's"
    b.upload()
    assert read(a) == "second"
    a.upload()
    assert read(a) == "second"


@pytest.mark.parametrize("here", ["nothing", "committed", "durable", "a copy"])
def test_what_was_committed_before_a_reader_asked_it_gets(here: str) -> None:
    """The later save is uploaded, and its claim goes, at any point of the answer (I2)."""
    for at in range(1, 50):
        bucket = Bucket()
        a, b, c = (Server(bucket, name) for name in "abc")
        (c if here == "a copy" else a).save("first")
        if here == "a copy":
            hold_confirmed_copy(a, owner="c")
        if here == "durable":
            a.upload()
        if here == "nothing":
            a.upload()
            a.write_back.delete(KEY, "first", deadline=soon(), wait_s=0.0)
            a.upload()
        b.save("second", overwrite=True)
        calls = a.gate.calls
        try:
            assert read(a, b.upload, at) in ("second", "another server's")
        except HeldElsewhere as error:
            assert (error.holder, error.save_id) == ("b", "second")
        if a.gate.calls - calls < at:
            break
    assert at > 2


def unreachable(call: str, key: str) -> None:
    raise ServerUnavailable("no way to storage")


@pytest.mark.parametrize("uploaded", [False, True])
def test_a_server_that_cannot_know_of_a_later_save_says_so(uploaded: bool) -> None:
    """Another has committed in its pool alone: its claim still tells of a save that is being written."""
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    a.save("first")
    if uploaded:
        a.upload()
    b.reserve("second", overwrite=True)
    assert read(a) == "first?"
    b.put("second")
    b.under_store.fail = unreachable
    b.commit("second")
    b.under_store.fail = lambda call, key: None
    assert (read(a), read(b)) == ("first?", "second?")
    b.upload()
    assert (read(a), read(b)) == ("second", "second")


@pytest.mark.parametrize("here", ["committed", "durable", "a copy"])
@pytest.mark.parametrize("hidden", [KEY.claim_key, KEY.manifest_key])
def test_a_server_that_cannot_look_says_so(here: str, hidden: str) -> None:
    bucket = Bucket()
    a, b = Server(bucket, "a"), Server(bucket, "b")
    (b if here == "a copy" else a).save("first")
    if here == "a copy":
        hold_confirmed_copy(a, owner="b")
    elif here == "durable":
        a.upload()
    assert read(a) == "first"
    a.under_store.fail = lambda call, key: unreachable(call, key) if key == hidden else None
    assert read(a) == ("first" if here == "committed" and hidden == KEY.manifest_key else "first?")


# ---- an acknowledged save that another writer's reservation passes over ----


def test_a_reservation_that_is_given_up_leaves_what_it_was_to_overwrite() -> None:
    """Whoever is asked, from the reservation on until the save at the path is uploaded (I2)."""
    bucket = Bucket()
    a, b, c = (Server(bucket, name) for name in "abc")
    a.save("first")
    a.upload()
    b.save("second", overwrite=True)
    c.reserve("third", overwrite=True)
    for asked in (a, c):
        assert read(asked) == "another server's"
        assert asked.write_back.get(KEY, deadline=soon(), check_claim=True).later_save_id == "second"
    assert read(b) == "second?"
    c.write_back.abandon(KEY, "third")
    c.write_back.tidy()
    for asked in (a, c):
        assert read(asked) == "another server's"
    assert read(b) == "second"
    b.upload()
    for asked in (a, b, c):
        assert read(asked) == "second"
    assert_settled(bucket, "second")


def test_what_was_published_meanwhile_is_published_when_a_reservation_is_given_up() -> None:
    """The upload ends while another server's writer has the claim: neither leaves a claim behind."""
    for at in range(1, 100):
        bucket = Bucket()
        b, c = Server(bucket, "b"), Server(bucket, "c")
        b.save("second")
        b.gate.trap_at, b.gate.trap = b.gate.calls + at, lambda c=c: c.reserve("third", overwrite=True)  # type: ignore[misc]
        calls = b.gate.calls
        with suppress(Overloaded):
            b.upload()
        if b.gate.calls - calls < at:
            break
        c.write_back.abandon(KEY, "third")
        c.write_back.tidy()
        assert read(b) == "second"
        b.upload()
        assert_settled(bucket, "second")
        assert read(c) == "second"
    assert at > 10


@pytest.mark.parametrize("restarts", [False, True])
def test_an_acknowledged_save_replaces_what_was_being_published_as_it_was_reserved(restarts: bool) -> None:
    """The other server had seen that the claim was its own, and wrote its manifest when it was so no more (I2)."""
    for at in range(1, 100):
        bucket = Bucket()
        a, b = Server(bucket, "a"), Server(bucket, "b")
        a.save("first")
        a.gate.trap_at = a.gate.calls + at
        a.gate.trap = lambda b=b: b.save("second", overwrite=True)  # type: ignore[misc]
        calls = a.gate.calls
        with suppress(Overloaded):
            a.upload()
        if a.gate.calls - calls < at:
            break
        if restarts:
            b.restart()
        assert read(b) == "second"
        b.upload()
        assert read(b) == "second", f"at {at}"
        with suppress(Overloaded):
            a.upload()
        assert read(a) == "second", f"at {at}"
        assert_settled(bucket, "second")
    assert at > 10
