"""The order of an upload, in every state a path can be seen in."""

from __future__ import annotations

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.cache.saves import ManifestKind, Save, SaveKey
from torchcache_server.cache.upload_attempt import Metadata
from torchcache_server.cache.upload_plan import (
    ConfirmShards,
    Finish,
    GiveUp,
    PublishManifest,
    PutMetadata,
    Seen,
    StandBy,
    TakeClaim,
    UploadShards,
    Withdraw,
    next_step,
)

NAMES = ("a", "b", "c")


def save(*, overwrite: bool, unbroken: bool = False) -> Save:
    return Save(
        SaveKey("s3", "run"),
        "id",
        tuple((name, 1) for name in NAMES),
        b"metadata",
        b"manifest",
        overwrite,
        (),
        "committed",
        0.0,
        unbroken=unbroken,
    )


SEEN = st.builds(
    Seen,
    claim=st.sampled_from(["ours", "vacant", "peer", "foreign"]),
    manifest=st.sampled_from(get_args(ManifestKind)),
    metadata=st.sampled_from(get_args(Metadata)),
    uploaded=st.frozensets(st.sampled_from(NAMES)),
    confirmed=st.booleans(),
    is_known=st.booleans(),
)


@given(SEEN, st.booleans())
def test_nothing_is_published_before_all_it_speaks_of(seen: Seen, overwrite: bool) -> None:
    step = next_step(save(overwrite=overwrite), seen)
    if isinstance(step, PublishManifest | PutMetadata):
        assert seen.claim == "ours"
        assert seen.uploaded == set(NAMES)
        assert seen.confirmed
        assert seen.manifest == "absent"
    if isinstance(step, PublishManifest):
        assert seen.metadata == "ours"
    if isinstance(step, PutMetadata):
        assert seen.metadata == "absent"


@given(SEEN, st.booleans())
def test_no_shard_goes_up_beside_metadata_or_a_manifest(seen: Seen, overwrite: bool) -> None:
    if isinstance(next_step(save(overwrite=overwrite), seen), UploadShards):
        assert seen.claim == "ours"
        assert seen.metadata == seen.manifest == "absent"


@given(SEEN, st.booleans(), st.booleans())
def test_nothing_of_others_is_withdrawn_unasked(seen: Seen, overwrite: bool, unbroken: bool) -> None:
    step = next_step(save(overwrite=overwrite, unbroken=unbroken), seen)
    if isinstance(step, Withdraw):
        assert seen.claim == "ours"
        if seen.manifest == "other":  # it can only be older
            assert overwrite
            assert unbroken
            assert seen.is_known
        assert overwrite or seen.metadata == "ours" or seen.manifest == "replaceable"


@given(SEEN, st.booleans())
def test_a_foreign_claim_ends_all_but_what_is_published_already(seen: Seen, unbroken: bool) -> None:
    step = next_step(save(overwrite=True, unbroken=unbroken), seen)
    may_be_later = seen.manifest == "other" and not (unbroken and seen.is_known)
    if seen.manifest == "ours":
        assert step == Finish()
    elif seen.claim == "foreign" or may_be_later:
        assert isinstance(step, GiveUp)
    elif seen.claim == "vacant":
        assert step == TakeClaim()
    elif seen.claim == "peer":
        assert step == StandBy()


@given(SEEN, st.booleans())
def test_undisturbed_it_ends_and_never_repeats_itself(seen: Seen, overwrite: bool) -> None:
    steps = []
    while not isinstance(step := next_step(save(overwrite=overwrite), seen), Finish | GiveUp | StandBy):
        assert step not in steps
        steps.append(step)
        seen = done(seen, step)
    if steps:
        assert steps[-1] == PublishManifest() or isinstance(step, GiveUp)


def done(seen: Seen, step: object) -> Seen:
    """What is seen once `step` is done."""
    claim, manifest, metadata = seen.claim, seen.manifest, seen.metadata
    uploaded, confirmed = seen.uploaded, seen.confirmed
    match step:
        case TakeClaim():
            claim = "ours"
        case Withdraw(what="manifest"):
            manifest = "absent"
        case Withdraw():
            metadata = "absent"
        case UploadShards(names):
            uploaded, confirmed = uploaded | set(names), False
        case ConfirmShards():
            confirmed = True
        case PutMetadata():
            metadata = "ours"
        case PublishManifest():
            manifest = "ours"
    return Seen(claim, manifest, metadata, uploaded, confirmed, seen.is_known)
