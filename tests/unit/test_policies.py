"""What users may want of a namespace, over a real store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchcache_server.cache import policies as policies_module
from torchcache_server.cache.policies import Policies, PolicyChange
from torchcache_server.store import Policy, Store

from tests.unit.store_parts import CAPACITY, MIB, chunk, fill, held, payload
from torchcache.errors import ConfigurationError, OutOfSpace

SAVE = "save:s3/b/run/step-1@id"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store", capacity_bytes=CAPACITY)
    yield store
    store.close()


@pytest.fixture
def policies(store: Store) -> Policies:
    return Policies(store)


def test_only_what_is_given_changes(store: Store, policies: Policies) -> None:
    policies.change("d", PolicyChange(priority=3, quota_bytes=10**9))
    policies.change("d", PolicyChange(pinned=True, ttl_s=60.0))
    usage = policies.change("d", PolicyChange(priority=-1, ttl_s=0.0))
    assert usage is not None
    assert usage.policy == store.policy("d") == Policy(pinned=True, priority=-1, quota_bytes=10**9)


def test_whoever_looks_after_saves_is_told_of_their_pins(store: Store) -> None:
    told: list[tuple[str, bool]] = []
    policies = Policies(store, settle_pin=lambda name: told.append((name, store.policy(name).pinned)))
    fill(store, SAVE, range(1))
    policies.change(SAVE, PolicyChange(pinned=True))
    policies.change(SAVE, PolicyChange(pinned=False))
    policies.change("d", PolicyChange(pinned=True))
    policies.change(f"{SAVE} elsewhere", PolicyChange(pinned=True))
    assert told == [(SAVE, True), (SAVE, False)]


def test_a_policy_waits_for_its_dataset_over_a_restart(tmp_path: Path, store: Store) -> None:
    Policies(store).change("later", PolicyChange(pinned=True))
    store.close()
    with_data = Store(tmp_path / "store", capacity_bytes=CAPACITY)
    fill(with_data, "later", range(1))
    [usage] = with_data.namespaces()
    assert (usage.name, usage.policy.pinned, usage.chunks) == ("later", True, 1)
    with_data.close()


def test_what_is_as_before_is_not_remembered(store: Store, policies: Policies) -> None:
    """I5: names that hold nothing and want nothing leave nothing behind."""
    policies.change("d", PolicyChange(pinned=True, quota_bytes=5, priority=2, ttl_s=3.0))
    assert [usage.name for usage in store.namespaces()] == ["d"]
    policies.change("d", PolicyChange(pinned=False, quota_bytes=0, priority=0, ttl_s=0.0))
    assert policies.change("never", PolicyChange(pinned=False, quota_bytes=0)) is None
    assert store.namespaces() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (PolicyChange(priority=1001), "a priority of 1001"),
        (PolicyChange(priority=-(2**31)), "a priority of"),
        (PolicyChange(quota_bytes=-1), "a quota of -1 bytes"),
        (PolicyChange(ttl_s=-1.0), "a time to live of -1"),
        (PolicyChange(ttl_s=float("nan")), "a time to live of nan"),
    ],
)
def test_what_makes_no_sense_changes_nothing(
    store: Store, policies: Policies, change: PolicyChange, message: str
) -> None:
    policies.change("d", PolicyChange(priority=7))
    with pytest.raises(ConfigurationError, match=message):
        policies.change("d", change)
    assert store.policy("d") == Policy(priority=7)


@pytest.mark.parametrize(
    "change", [PolicyChange(priority=1), PolicyChange(quota_bytes=1), PolicyChange(ttl_s=1)]
)
def test_a_save_has_no_limits(store: Store, policies: Policies, change: PolicyChange) -> None:
    """I6: a checkpoint that waits for its upload must not run out of time, or of room that it has."""
    fill(store, SAVE, range(1))
    with pytest.raises(ConfigurationError, match="lives as long as its checkpoint: it can be pinned"):
        policies.change(SAVE, change)
    assert store.policy(SAVE) == Policy()


def test_a_save_is_pinned_where_it_is(store: Store, policies: Policies) -> None:
    assert policies.change(SAVE, PolicyChange(pinned=True)) is None
    assert store.namespaces() == [], "another server has it"
    fill(store, SAVE, range(1))
    usage = policies.change(SAVE, PolicyChange(pinned=True))
    assert usage is not None
    assert usage.policy.pinned
    store.drop(SAVE)
    assert store.policy(SAVE) == Policy(), "the pin ends with the save"


def test_a_save_that_has_borrowed_all_it_has_is_pinned_too(store: Store) -> None:
    """Not a byte lies in its own namespace."""
    told: list[str] = []
    policies = Policies(store, settle_pin=told.append, is_save=lambda name: name == SAVE)
    usage = policies.change(SAVE, PolicyChange(pinned=True))
    assert usage is not None
    assert (usage.policy.pinned, usage.chunks) == (True, 0)
    assert policies.change(f"{SAVE} elsewhere", PolicyChange(pinned=True)) is None
    assert policies.change(SAVE, PolicyChange(pinned=False)) is None
    assert store.namespaces() == []
    assert told == [SAVE, SAVE]


def test_objects_on_their_way_to_storage_have_no_policy(store: Store, policies: Policies) -> None:
    fill(store, "put:s3/b/k@id", range(1))
    with pytest.raises(ConfigurationError, match="on its way to storage"):
        policies.change("put:s3/b/k@id", PolicyChange(pinned=True))


def test_evict_frees_and_the_policy_stays(store: Store, policies: Policies) -> None:
    fill(store, "d", range(10))
    policies.change("d", PolicyChange(priority=2))
    used = store.usage().used_bytes
    assert policies.evict("d") == used - store.usage().used_bytes > 0
    assert not held(store, 0)
    assert store.policy("d") == Policy(priority=2)
    assert policies.evict("d") == policies.evict("unheard of") == 0


def test_a_quota_counts_what_is_on_its_way(store: Store, policies: Policies) -> None:
    """F10: fills that are under way together must not each take the same room."""
    quota = 5 * MIB
    policies.change("d", PolicyChange(quota_bytes=quota))
    with pytest.raises(OutOfSpace, match="quota"):
        promised = [store.reserve("d", chunk(n), 2 * MIB) for n in range(3)]
        for number, room in enumerate(promised):
            store.put("d", chunk(number), 2 * MIB, payload(number, 2 * MIB), promised=room)
    assert store.namespaces()[0].bytes <= quota


def test_time_to_live_begins_anew_with_every_use(
    store: Store, policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes into a dataset that was long idle, or is read there, is not dropped a second later."""
    now, later_s = time.monotonic(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now + later_s[0])
    policies.change("d", PolicyChange(ttl_s=60.0))

    def chunks_after(seconds: float) -> int:
        later_s[0] += seconds
        store.tidy()
        return store.usage().chunks

    fill(store, "d", range(1))
    assert chunks_after(59) == 1
    later_s[0] += 59
    fill(store, "d", range(1, 2))
    assert chunks_after(59) == 2, "writing is a use"
    assert held(store, 0)
    assert chunks_after(59) == 2, "and reading"
    assert chunks_after(2) == 0


@pytest.mark.parametrize("why", ["pinned", "kept"])
def test_what_must_stay_is_not_evicted(store: Store, policies: Policies, why: str) -> None:
    """I6."""
    fill(store, SAVE, range(3))
    if why == "kept":
        store.keep(SAVE, True)
    else:
        policies.change(SAVE, PolicyChange(pinned=True))
    with pytest.raises(ConfigurationError):
        policies.evict(SAVE)
    assert all(held(store, n) for n in range(3))


def test_policies_that_wait_are_bounded(
    store: Store, policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I5."""
    monkeypatch.setattr(policies_module, "MAX_WAITING", 3)
    for number in range(3):
        policies.change(f"later-{number}", PolicyChange(pinned=True))
    with pytest.raises(ConfigurationError, match="3 datasets that hold nothing have a policy"):
        policies.change("one more", PolicyChange(pinned=True))
    policies.change("later-0", PolicyChange(priority=1))
    fill(store, "there", range(1))
    policies.change("there", PolicyChange(pinned=True))
    policies.change("later-0", PolicyChange(pinned=False, priority=0))
    policies.change("one more", PolicyChange(pinned=True))


def test_changes_at_a_time_all_hold(store: Store, policies: Policies) -> None:
    """Each reads, then writes: none may undo another's."""
    for _ in range(20):
        changes = [PolicyChange(pinned=True), PolicyChange(priority=5), PolicyChange(quota_bytes=10**9)]
        threads = [threading.Thread(target=policies.change, args=("d", change)) for change in changes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.policy("d") == Policy(pinned=True, priority=5, quota_bytes=10**9)
        policies.change("d", PolicyChange(pinned=False, priority=0, quota_bytes=0))
