"""What a server keeps in memory of saves that have come and gone: nothing, however many there were."""

from __future__ import annotations

import gc
import logging
import threading
from collections import Counter

import pytest
from torchcache_server.cache.claim_book import FORGET_LEASES
from torchcache_server.cache.claims import DEAD_AFTER_LEASES, Sighting
from torchcache_server.cache.saves import SaveKey
from torchcache_server.cache.slot import Slot
from torchcache_server.store import NamespaceUsage
from write_back_world import LEASE_S, Bucket, Server, assert_settled, manifest_of, soon

from torchcache.errors import DeadlineExceeded, NotCommitted

PATHS = 20


def paths(shift: int) -> list[SaveKey]:
    return [SaveKey("s3", f"shift-{shift}/step-{n}") for n in range(PATHS)]


def objects(*kinds: type) -> Counter[str]:
    """How many of these there are."""
    gc.collect()
    return Counter(type(one).__name__ for one in gc.get_objects() if type(one) in kinds)


def a_shift(owner: Server, other: Server, shift: int) -> None:
    """Saves with a copy each, uploaded, read, and deleted; and then all is tidied, long after."""
    for number, key in enumerate(paths(shift)):
        save_id = f"{shift}-{number}"
        owner.reserve(save_id, key)
        for server in (owner, other):
            server.put(save_id, key)
        other.hold_copy(save_id, key, owner="a")
        owner.commit(save_id, key)
        assert other.write_back.get(key, deadline=soon()).save_id == save_id
        owner.upload(key)
        other.write_back.hold(key, save_id, "reader", "a reader that is killed")
    other.write_back.tidy()
    for key in paths(shift):
        other.write_back.drop_copy(key, "", deadline=soon())
        assert not owner.write_back.delete(key, "", deadline=soon(), wait_s=0.0)
        owner.upload(key)
        with pytest.raises(NotCommitted):
            owner.write_back.get(key, deadline=soon())
    for server in (owner, other):
        server.clock_ahead_s += 2 * FORGET_LEASES * LEASE_S
        server.write_back.tidy()


def test_what_has_come_and_gone_is_forgotten() -> None:
    """I5."""
    bucket = Bucket()
    owner, other = Server(bucket, "a"), Server(bucket, "b")
    a_shift(owner, other, 0)
    before = objects(Slot, Sighting)
    for shift in range(1, 4):
        a_shift(owner, other, shift)
    assert not objects(Slot, Sighting) - before  # fewer may be: an earlier test's


def test_a_save_that_was_evicted_is_forgotten() -> None:
    """I5."""
    server = Server(Bucket(), "a")
    for key in paths(0):
        server.save("one", key)
        server.upload(key)
        server.store.chunks.pop(key.namespace("one"))
    assert_forgets(server, paths(0))
    assert server.state(paths(0)[0]) == "durable one"


def assert_forgets(server: Server, keys: list[SaveKey]) -> None:
    """The janitor leaves it to the uploads to drop what is garbage: no other of them may be reading it."""
    waiting = server.write_back._uploads._due_s
    waiting.clear()
    for _ in range(2):  # what one round finds evicted, the next sees as garbage
        server.write_back.tidy()
    assert set(waiting) == set(keys)
    for key in keys:
        server.upload(key)
    server.write_back.tidy()
    assert server.write_back._slots.all() == []


def test_a_save_whose_deletion_came_too_late_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    """I5: another checkpoint lies there by now, which is left alone."""
    caplog.set_level(logging.CRITICAL)  # a record that is kept has the error, and that the slot
    bucket = Bucket()
    server = Server(bucket, "a")
    (key, *_) = paths(0)
    server.save("one", key)
    server.upload(key)
    assert not server.write_back.delete(key, "", deadline=soon(), wait_s=0.0)
    bucket.objects[key.manifest_key] = manifest_of("another")
    server.upload(key)
    assert server.write_back._slots.all()[0].deletion_error is not None
    assert_forgets(server, [key])
    assert server.namespaces == []


def test_a_save_that_somebody_removed_from_storage_is_forgotten() -> None:
    """I5."""
    bucket = Bucket()
    server = Server(bucket, "a")
    (key, *_) = paths(0)
    server.save("one", key)
    server.upload(key)
    bucket.objects.clear()
    with pytest.raises(NotCommitted):
        server.write_back.get(key, deadline=soon())
    assert_forgets(server, [key])
    assert server.namespaces == []


def test_a_save_that_becomes_durable_amid_the_janitors_look_is_not_taken_for_evicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(Bucket(), "a")
    (key, *_) = paths(0)
    listed = server.store.namespaces

    def meanwhile() -> list[NamespaceUsage]:
        found = listed()
        monkeypatch.setattr(server.store, "namespaces", listed)
        server.save("one", key)
        server.upload(key)
        return found

    monkeypatch.setattr(server.store, "namespaces", meanwhile)
    server.write_back._forget_evicted()
    server.upload(key)
    assert server.namespaces == [key.namespace("one")]


def test_a_path_that_somebody_has_in_hand_is_not_forgotten() -> None:
    """I2: two slots of one path would be two locks."""
    server = Server(Bucket(), "a")
    slots = server.write_back._slots
    slot = slots.slot(paths(0)[0])
    server.write_back.tidy()
    assert slots.find(slot.key) is slot
    del slot
    server.write_back.tidy()
    assert slots.all() == []


def test_a_save_whose_path_is_forgotten_time_and_again_goes_its_way() -> None:
    """I2: between any two calls."""
    bucket = Bucket()
    server = Server(bucket, "a")
    (key, *_) = paths(0)
    stop = threading.Event()

    def forget() -> None:
        while not stop.is_set():
            server.write_back._slots.forget_empty()

    thread = threading.Thread(target=forget)
    thread.start()
    try:
        for number in range(50):
            server.reserve(str(number), key, overwrite=True)
            server.put(str(number), key)
            server.commit(str(number), key)
            server.upload(key)
            assert server.state(key) == f"durable {number}"
    finally:
        stop.set()
        thread.join()
    assert_settled(bucket, "49", key)


def test_a_claim_is_remembered_while_somebody_waits_for_its_end() -> None:
    """F1: a client whose calls are short asks again and again; its patience counts from the first."""
    bucket = Bucket()
    dead, server = Server(bucket, "a", lease_s=60.0), Server(bucket, "b", lease_s=60.0)
    (key, *_) = paths(0)
    dead.reserve("lost", key)
    for _ in range(2 * DEAD_AFTER_LEASES):
        with pytest.raises(DeadlineExceeded):
            server.reserve("next", key, wait_s=0.0)
        server.write_back.tidy()
        server.clock_ahead_s += 30.0
    server.reserve("next", key, wait_s=0.0)
