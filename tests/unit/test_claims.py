"""Claims: who may take a path from whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.cache.claims import (
    DEAD_AFTER_LEASES,
    Claim,
    ClaimState,
    Displaced,
    Keep,
    Refuse,
    Sighting,
    Take,
    Wait,
    decide_hold,
    decide_reserve,
)
from torchcache_server.cache.saves import SaveKey

KEY = SaveKey("s3", "run/step-1")
LEASE_S = 10.0
SEEN_S = 100.0
DEAD_S = SEEN_S + DEAD_AFTER_LEASES * LEASE_S


def sighting(server_id: str = "other", state: ClaimState = "reserved", save_id: str = "s") -> Sighting:
    return Sighting(Claim(server_id, save_id, state, "somebody", LEASE_S), "v1", SEEN_S)


def decide(
    seen: Sighting | None,
    *,
    uploading: str = "",
    overwrite: bool = False,
    renewed: bool = False,
    now_s: float,
) -> Take | Keep | Wait | Refuse:
    return decide_reserve(
        seen,
        key=KEY,
        server_id="me",
        uploading=uploading,
        overwrite=overwrite,
        renewed=renewed,
        now_s=now_s,
    )


def test_what_nobody_claims_is_created() -> None:
    assert decide(None, now_s=0.0) == Take("")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("state", ["reserved", "released"])
def test_the_living_are_waited_for_and_the_dead_replaced(state: ClaimState, overwrite: bool) -> None:
    seen = sighting(state=state)
    assert decide(seen, overwrite=overwrite, now_s=DEAD_S - 0.1) == Wait(DEAD_S, "somebody")
    assert decide(seen, overwrite=overwrite, now_s=DEAD_S) == Take("v1")
    assert isinstance(decide(seen, overwrite=overwrite, renewed=True, now_s=DEAD_S), Refuse)


def test_a_writer_that_got_no_answer_goes_on_at_the_next_server() -> None:
    def decide_for(save_id: str, state: ClaimState = "reserved") -> Take | Keep | Wait | Refuse:
        return decide_reserve(
            sighting(state=state),
            key=KEY,
            server_id="me",
            overwrite=False,
            renewed=True,
            now_s=SEEN_S,
            save_id=save_id,
        )

    assert decide_for("s") == Take("v1")
    assert isinstance(decide_for("another"), Refuse)
    assert isinstance(decide_for("s", "committed"), Refuse)
    assert isinstance(decide_for("s", "deleting"), Refuse)


def test_committed_saves_yield_only_to_overwriting() -> None:
    seen = sighting(state="committed")
    assert isinstance(decide(seen, now_s=DEAD_S * 9), Refuse)
    assert decide(seen, overwrite=True, now_s=SEEN_S) == Take("v1")


@pytest.mark.parametrize("state", ["reserved", "released", "committed"])
def test_a_servers_own_claim_is_its_to_change(state: ClaimState) -> None:
    assert decide(sighting("me", state), now_s=SEEN_S) == Take("v1")
    assert decide(sighting("me", state), uploading="s", now_s=SEEN_S) == Keep()
    assert decide(sighting("me", state), uploading="another", now_s=SEEN_S) == Take("v1")


def over(save: Displaced, server_id: str = "other", save_id: str = "s") -> Sighting:
    claim = Claim(server_id, save_id, "reserved", "somebody", LEASE_S, over=save)
    assert Claim.decode(claim.encode()) == claim
    return Sighting(claim, "v1", SEEN_S)


def test_a_claim_says_from_which_committed_save_it_was_taken() -> None:
    save = Displaced("third", "acknowledged", "its writer")
    assert sighting().displaced is None
    assert sighting("third", "committed", "acknowledged").displaced == Displaced(
        "third", "acknowledged", "somebody"
    )
    assert over(save).displaced == save
    for odd in ('{"over": 5}', '{"over": {"server_id": 1}}', '{"over": null}'):
        assert Claim.decode(odd.encode()).over is None


def test_the_save_it_was_taken_from_yields_only_to_overwriting() -> None:
    theirs, mine = Displaced("third", "acknowledged", "w"), Displaced("me", "acknowledged", "w")
    assert isinstance(decide(over(theirs), now_s=DEAD_S), Refuse)
    assert decide(over(theirs), overwrite=True, now_s=DEAD_S) == Take("v1")
    assert decide(over(mine), now_s=DEAD_S) == Take("v1")


@pytest.mark.parametrize("server_id", ["other", "me"])
def test_an_older_save_does_not_pass_over_one_that_was_committed_since(server_id: str) -> None:
    def hold(seen: Sighting, save_id: str) -> Take | Keep | Wait | Refuse:
        return decide_hold(seen, key=KEY, server_id="me", save_id=save_id, committed=True, now_s=DEAD_S)

    seen = over(Displaced("me", "acknowledged", "w"), server_id)
    assert hold(seen, "acknowledged") == Take("v1")
    assert isinstance(hold(seen, "older"), Refuse)


def test_who_holds_a_path_goes_on_unless_another_took_it() -> None:
    def hold(seen: Sighting | None, now_s: float = SEEN_S) -> Take | Keep | Wait | Refuse:
        return decide_hold(seen, key=KEY, server_id="me", save_id="s", committed=False, now_s=now_s)

    assert hold(None) == Take("")
    assert hold(sighting("me", "reserved")) == Take("v1")
    assert hold(sighting("me", "committed")) == Keep()
    assert hold(sighting("me", "committed", save_id="the one before")) == Take("v1")
    for state in ("reserved", "released", "committed"):
        assert isinstance(hold(sighting(state=state, save_id="another"), DEAD_S * 9), Refuse)  # type: ignore[arg-type]


def test_another_server_that_uploads_the_same_save_is_waited_for_while_it_lives() -> None:
    def hold(state: ClaimState, now_s: float) -> Take | Keep | Wait | Refuse:
        return decide_hold(
            sighting(state=state, save_id="s"),
            key=KEY,
            server_id="me",
            save_id="s",
            committed=True,
            now_s=now_s,
        )

    assert hold("committed", DEAD_S - 0.1) == Wait(DEAD_S, "other")
    assert hold("committed", DEAD_S) == Take("v1")
    assert isinstance(hold("deleting", DEAD_S), Refuse)


def test_what_is_committed_yields_to_a_later_save_only_when_that_is_committed_too() -> None:
    def hold(state: ClaimState, now_s: float) -> Take | Keep | Wait | Refuse:
        return decide_hold(
            sighting(state=state, save_id="later"),
            key=KEY,
            server_id="me",
            save_id="s",
            committed=True,
            now_s=now_s,
        )

    being_written: list[ClaimState] = ["reserved", "released"]
    for state in being_written:
        assert hold(state, DEAD_S - 0.1) == Wait(DEAD_S, "other")
        assert hold(state, DEAD_S) == Take("v1")
    in_its_place: list[ClaimState] = ["committed", "deleting"]
    for state in in_its_place:
        assert isinstance(hold(state, DEAD_S * 9), Refuse)


@given(st.binary(max_size=300))
def test_any_bytes_are_somebodys_claim(data: bytes) -> None:
    claim = Claim.decode(data)
    assert claim.server_id == ""
    assert claim.state == "reserved"


@given(
    st.builds(
        Claim,
        server_id=st.text(max_size=20),
        save_id=st.text(max_size=20),
        state=st.sampled_from(["reserved", "committed", "released"]),
        writer=st.text(max_size=200),
        lease_s=st.floats(0.0, 3600.0),
    )
)
def test_a_claim_reads_as_it_was_written(claim: Claim) -> None:
    assert Claim.decode(claim.encode()) == claim


def test_no_two_writes_of_a_claim_are_equal() -> None:
    """Else a version would come back, and a conditional write with it."""
    assert len({Claim("me", "s", "reserved", "w", 1.0).encode() for _ in range(100)}) == 100
