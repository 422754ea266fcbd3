"""Saves as values: names, records, what a manifest tells."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.cache.save_records import decode_save, encode_save
from torchcache_server.cache.saves import Save, SaveKey, status_of_manifest

from torchcache import errors
from torchcache.errors import ConfigurationError, TorchCacheError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ERROR = st.builds(
    lambda kind, message, object: kind(message, object=object),
    st.sampled_from([getattr(errors, name) for name in errors.__all__]),
    TEXT,
    st.none() | TEXT,
)
SAVE = st.builds(
    Save,
    key=st.builds(SaveKey, TEXT, TEXT, st.sampled_from(["", "__7"])),
    save_id=TEXT,
    files=st.lists(st.tuples(TEXT, st.integers(0, 2**50)), max_size=4).map(tuple),
    metadata=st.binary(max_size=300),
    manifest=st.binary(max_size=300),
    overwrite=st.booleans(),
    replaceable=st.lists(TEXT, max_size=3).map(tuple),
    state=st.sampled_from(["committed", "durable", "failed"]),
    committed_unix_s=st.floats(0, 1e10),
    writer=TEXT,
    durable_unix_s=st.floats(0, 1e10),
    manifest_version=TEXT,
    claimed=st.booleans(),
    error=st.none(),
)


@given(SAVE)
def test_a_record_gives_the_save_back(save: Save) -> None:
    assert decode_save(encode_save(save)) == save


@given(SAVE, ERROR)
def test_a_record_gives_the_error_back(save: Save, error: TorchCacheError) -> None:
    back = decode_save(encode_save(save.failed(error)))
    assert type(back.error) is type(error)
    assert str(back.error) == str(error)


@given(SAVE, st.data())
def test_a_torn_record_is_refused(save: Save, data: st.DataObject) -> None:
    record = encode_save(save)
    with pytest.raises(ValueError):
        decode_save(record[: data.draw(st.integers(0, len(record) - 1))])


@given(st.binary(max_size=200))
def test_a_strange_record_is_refused(record: bytes) -> None:
    with pytest.raises(ValueError):
        decode_save(record)


@given(st.builds(SaveKey, TEXT, TEXT, TEXT), st.builds(SaveKey, TEXT, TEXT, TEXT))
def test_digests_are_equal_only_for_equal_keys(a: SaveKey, b: SaveKey) -> None:
    assert (a.digest == b.digest) == (a == b)


@pytest.mark.parametrize("part", ["", "__0", "__12"])
def test_a_manifest_names_its_save(part: str) -> None:
    key = SaveKey("s3", "bucket/run/step-1", part)
    key.validate()
    assert SaveKey.of_manifest("s3", key.manifest_key) == key
    assert SaveKey.of_manifest("s3", key.claim_key) is None
    assert SaveKey.of_manifest("s3", key.metadata_key) is None


@pytest.mark.parametrize("part", ["0", "__", "__x", "__0/..", "_0", "__" + 10 * "1"])
def test_parts_are_ranks(part: str) -> None:
    with pytest.raises(ConfigurationError, match="__<rank>"):
        SaveKey("s3", "bucket/run", part).validate()


@given(TEXT)
def test_paths_are_names_between_slashes(path: str) -> None:
    key = SaveKey("s3", path)
    good = all(step not in ("", ".", "..") for step in path.split("/")) and "\0" not in path
    if good:
        key.validate()
    else:
        with pytest.raises(ConfigurationError):
            key.validate()


@given(
    st.binary(max_size=100) | st.recursive(st.none() | TEXT, st.lists).map(lambda v: json.dumps(v).encode())
)
def test_a_manifest_nobody_can_read_still_has_a_status(manifest: bytes) -> None:
    status = status_of_manifest(SaveKey("s3", "run"), manifest)
    assert (status.state, status.manifest, status.pending_bytes) == ("durable", manifest, 0)
