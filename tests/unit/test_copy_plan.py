"""Copies: what the claim and the manifest at a path make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torchcache_server.cache.claims import DEAD_AFTER_LEASES, Claim, ClaimState, Displaced, Sighting, Take
from torchcache_server.cache.copy_plan import decide_takeover, is_left_open, judge
from torchcache_server.cache.save_records import copy_key, decode_copy, decode_save, encode_copy, encode_save
from torchcache_server.cache.saves import Copy, ManifestKind, Save, SaveKey, mark_of

KEY = SaveKey("s3", "run/step-1")
LEASE_S = 10.0
SEEN_S = 100.0
DEAD_S = SEEN_S + DEAD_AFTER_LEASES * LEASE_S
OLDER: tuple[ManifestKind, ...] = ("absent", "replaceable")
"""What may lie at a path where nobody has published since."""


def copy(save_id: str = "ours", *, confirmed: bool = False) -> Copy:
    save = Save(
        key=KEY,
        save_id=save_id,
        files=(("__0_0.distcp", 5),),
        metadata=b"metadata",
        manifest=b"manifest",
        overwrite=True,
        replaceable=("digest",),
        state="committed",
        committed_unix_s=50.0,
        writer="somebody",
        replicas=2,
    )
    return Copy(save, "owner", confirmed)


def sighting(state: ClaimState = "committed", save_id: str = "ours", server_id: str = "owner") -> Sighting:
    return Sighting(Claim(server_id, save_id, state, "somebody", LEASE_S), "v1", SEEN_S)


def test_a_save_that_the_under_store_has_needs_no_copy() -> None:
    for seen in (None, sighting(), sighting(save_id="another")):
        assert judge(copy(), seen, "ours") == "durable"


@pytest.mark.parametrize(
    ("state", "confirmed", "verdict"),
    [
        ("committed", False, "current"),
        ("committed", True, "current"),
        ("reserved", False, "open"),
        ("reserved", True, "current"),  # the owner could not tell the under-store
        ("released", False, "gone"),
        ("deleting", True, "gone"),
    ],
)
def test_a_claim_for_the_save(state: ClaimState, confirmed: bool, verdict: str) -> None:
    for there in OLDER:
        assert judge(copy(confirmed=confirmed), sighting(state), there) == verdict
    # What is published besides may be later where the claim doesn't say that this save is committed.
    over_another = "open" if state == "reserved" else verdict
    assert judge(copy(confirmed=confirmed), sighting(state), "other") == over_another


@pytest.mark.parametrize(
    ("state", "confirmed", "verdict"),
    [
        ("committed", True, "gone"),
        ("reserved", True, "current"),  # nothing is committed in its place yet
        ("reserved", False, "gone"),  # its writer was taken for dead
        ("released", True, "current"),  # that one was given up
        ("released", False, "gone"),
        ("deleting", True, "gone"),
    ],
)
def test_a_claim_for_another_save(state: ClaimState, confirmed: bool, verdict: str) -> None:
    seen = sighting(state, save_id="another")
    assert judge(copy(confirmed=confirmed), seen, "absent") == verdict
    assert judge(copy(confirmed=confirmed), seen, "replaceable") == verdict
    assert judge(copy(confirmed=confirmed), seen, "other") == "gone"


def test_without_a_claim_only_what_was_acknowledged_counts() -> None:
    for older in OLDER:
        assert judge(copy(confirmed=True), None, older) == "current"
        assert judge(copy(), None, older) == "gone"
    assert judge(copy(confirmed=True), None, "other") == "gone"


def test_an_upload_is_taken_over_from_who_is_silent() -> None:
    def decide(verdict: str, now_s: float, seen: Sighting | None) -> Take | None:
        return decide_takeover(copy(), verdict, seen, server_id="me", now_s=now_s)  # type: ignore[arg-type]

    assert decide("current", DEAD_S - 0.1, sighting()) is None
    assert decide("current", DEAD_S, sighting()) == Take("v1")
    assert decide("current", SEEN_S, None) == Take("")
    assert decide("current", SEEN_S, sighting(server_id="me")) == Take(
        "v1"
    )  # a stop came in the middle of it
    for verdict in ("open", "gone", "durable"):
        assert decide(verdict, DEAD_S * 9, sighting()) is None


def test_an_open_copy_waits_long_for_its_writer() -> None:
    assert not is_left_open(sighting(), now_s=DEAD_S + 59, patience_s=60)
    assert is_left_open(sighting(), now_s=DEAD_S + 60, patience_s=60)
    assert not is_left_open(None, now_s=DEAD_S * 9, patience_s=60)


def test_a_copys_record_tells_all_of_it() -> None:
    for confirmed in (False, True):
        original = copy(confirmed=confirmed)
        assert decode_copy(encode_copy(original)) == original
    assert copy_key(copy().save) != copy_key(copy("another").save)
    record = encode_copy(copy())
    for end in range(len(record)):
        with pytest.raises(ValueError):
            decode_copy(record[:end])


def test_a_saves_record_of_a_version_without_copies_is_read() -> None:
    record = encode_save(copy().save)
    older = record.replace(b', "replicas": 2', b"")
    length = len(record) - len(older)
    head = int.from_bytes(record[:4], "little") - length
    assert decode_save(head.to_bytes(4, "little") + older[4:]).replicas == 1


@pytest.mark.parametrize("confirmed", [False, True])
def test_a_claim_taken_from_a_committed_save_tells_of_that(confirmed: bool) -> None:
    """The writer that is to overwrite it hasn't committed: what it was taken from counts, and nothing older does."""
    claim = Claim(
        "other", "later", "reserved", "somebody", LEASE_S, over=Displaced("owner", "ours", "somebody")
    )
    seen = Sighting(claim, "v1", SEEN_S)
    for there in (*OLDER, "other"):
        assert judge(copy(confirmed=confirmed), seen, there) == "current"
        assert judge(copy("older", confirmed=confirmed), seen, there) == "gone"
    assert judge(copy("later"), seen, "absent") == "open"


@pytest.mark.parametrize("is_being_replaced", [False, True])
def test_a_claim_for_a_save_that_this_one_came_after_is_behind(is_being_replaced: bool) -> None:
    """Storage was away when this save was committed in its place."""
    seen = sighting(save_id="before")
    if is_being_replaced:
        over = Displaced("owner", "before", "somebody")
        claim = Claim("other", "later", "reserved", "somebody", LEASE_S, over=over)
        seen = Sighting(claim, "v1", SEEN_S)
    for confirmed in (True, False):
        later = copy(confirmed=confirmed)
        later = replace(later, save=replace(later.save, replaceable=("digest", mark_of("before"))))
        for there in OLDER:
            assert judge(later, seen, there) == ("current" if confirmed else "open")
        assert judge(later, seen, "other") == "open"
        assert judge(copy(confirmed=confirmed), seen, "absent") == "gone"
