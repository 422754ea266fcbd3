"""The manifest: everything comes back, damage is refused, lies don't get through."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache.checkpoint.layout import GRANULE_BYTES
from torchcache.checkpoint.manifest import (
    Item,
    Manifest,
    Tensor,
    by_file,
    frame_digest,
    payload_digests,
)
from torchcache.checkpoint.plain import NotPlainError, decode_plain, encode_plain
from torchcache.errors import IntegrityError
from torchcache.model import ByteRange

PAYLOAD = bytes(range(256)) * 64


def item(**changes: Any) -> Item:
    made = Item(
        name="layer.weight",
        offset=(0, 2),
        index=1,
        kind="tensor",
        dtype="float32",
        shape=(64, 64),
        file="__0_0.distcp",
        start=64,
        length=len(PAYLOAD) + 1500,
        payload_start=704,
        payload_length=len(PAYLOAD),
        frame_digest=frame_digest(b"head", b"tail"),
        digests=payload_digests(memoryview(PAYLOAD)),
    )
    return replace(made, **changes)


def manifest(**changes: Any) -> Manifest:
    made = Manifest(
        save_id="ab" * 16,
        checkpoint="s3://bucket/run/step-1",
        created_unix_s=1700000000.123,
        torch="2.13.0",
        torchcache="0.1.0",
        dcp_version="1.0.0",
        files={"__0_0.distcp": 100_000, "__1_0.distcp": 0},
        tensors={
            "layer.weight": Tensor(
                dtype="float32",
                requires_grad=False,
                pin_memory=False,
                memory_format="contiguous_format",
                size=(64, 128),
                blocks=(((0, 0), (64, 64)), ((0, 64), (64, 64))),
            )
        },
        objects=("step", "ünï\udce9"),
        items=(item(), item(name="step", offset=None, index=None, kind="bytes", dtype=None, shape=None)),
        planner_data=encode_plain({"layer.weight": ("layer", "weight", 0)}),
    )
    return replace(made, **changes)


def test_everything_comes_back() -> None:
    assert Manifest.decode(manifest().encode(), where="x") == manifest()


def test_it_is_json_with_a_digest_of_its_body() -> None:
    outer = json.loads(manifest().encode())
    assert outer["format"] == "torchcache-checkpoint"
    assert outer["body"]["files"][0] == ["__0_0.distcp", 100_000]
    assert outer["body"]["save_id"] == "ab" * 16


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_damaged_byte_is_overlooked_f33(position: int, change: int) -> None:
    data = bytearray(manifest().encode())
    data[position % len(data)] ^= change
    with pytest.raises(IntegrityError, match="s3://b/step"):
        Manifest.decode(bytes(data), where="s3://b/step")


@given(st.integers(0, 3000))
def test_no_truncation_is_overlooked(length: int) -> None:
    data = manifest().encode()
    with pytest.raises(IntegrityError):
        Manifest.decode(data[: min(length, len(data) - 1)], where="x")


def lying(edit: str, value: Any) -> bytes:
    """A manifest with one value of its first item, or of its body, replaced, and a digest that fits."""
    body = json.loads(manifest().encode())["body"]
    if edit.startswith("item."):
        names = ["name", "offset", "index", "kind", "dtype", "shape", "file", "start", "length"]
        names += ["payload_start", "payload_length", "frame_digest", "digests"]
        body["items"][0][names.index(edit.removeprefix("item."))] = value
    else:
        body[edit] = value
    digest = hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()
    return json.dumps(
        {"format": "torchcache-checkpoint", "version": 1, "sha256": digest, "body": body}
    ).encode()


@pytest.mark.hostile("manifests")
@pytest.mark.parametrize(
    ("edit", "value"),
    [
        ("files", [["../../etc/passwd", 1]]),
        ("files", [["/etc/passwd", 1]]),
        ("files", [["a//b", 1]]),
        ("files", [["a\0b", 1]]),
        ("files", [["a", 1], ["a", 2]]),
        ("files", [["a", -1]]),
        ("files", [["a", 1 << 70]]),
        ("files", [["a", 1.5]]),
        ("files", None),
        ("tensors", {"w": ["float32"]}),
        ("items", [[]]),
        ("item.start", -1),
        ("item.start", 1 << 50),
        ("item.length", 1 << 50),
        ("item.payload_start", 18_000),
        ("item.payload_length", len(PAYLOAD) - 3),
        ("item.payload_length", True),
        ("item.digests", ""),
        ("item.digests", "00" * 16),
        ("item.digests", "zz" * 8),
        ("item.kind", "pickle"),
        ("item.dtype", None),
        ("item.shape", [7, 7]),
        ("item.shape", [-1]),
        ("item.file", 2),
        ("item.file", -1),
        ("item.frame_digest", "x"),
    ],
)
def test_a_manifest_that_lies_is_refused(edit: str, value: Any) -> None:
    with pytest.raises(IntegrityError, match="can't be used"):
        Manifest.decode(lying(edit, value), where="x")


@pytest.mark.hostile("manifests")
@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"{}", b'{"format": "torchcache-checkpoint", "version": 2}', b"\xff"]
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="manifest of the checkpoint s3://b/x can't be used"):
        Manifest.decode(data, where="s3://b/x")


def test_a_payload_is_verified_by_the_granules_a_part_covers() -> None:
    payload = bytearray(3 * GRANULE_BYTES + 5)
    one = item(payload_length=len(payload), digests=payload_digests(memoryview(payload)))
    assert len(one.digests) == 4
    one.verify(ByteRange(0, len(payload)), memoryview(payload))
    payload[GRANULE_BYTES] = 1
    with pytest.raises(IntegrityError, match=r"'layer\.weight' in file __0_0\.distcp does not match"):
        one.verify(ByteRange(0, len(payload)), memoryview(payload))
    # A part is checked where it covers a granule whole; the damaged one here is not.
    half = ByteRange(GRANULE_BYTES + 1, len(payload))
    one.verify(half, memoryview(payload)[half.start :])
    payload[-1] = 1
    with pytest.raises(IntegrityError):
        one.verify(half, memoryview(payload)[half.start :])


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(), inner)
    ),
    max_leaves=20,
)


@given(plain)
def test_plain_values_survive_json(value: Any) -> None:
    back = decode_plain(json.loads(json.dumps(encode_plain(value))))
    assert back == value
    assert repr(back) == repr(value)  # tuples are tuples again, True is not 1


@pytest.mark.parametrize("value", [object(), b"x", {1, 2}, OrderedDict(), [OrderedDict()]])
def test_what_has_no_plain_form_says_so(value: object) -> None:
    with pytest.raises(NotPlainError):
        encode_plain(value)


def test_items_are_grouped_by_file_in_order() -> None:
    items = [item(start=200), item(file="b", start=5), item(start=100)]
    assert [(name, [i.start for i in group]) for name, group in by_file(items)] == [
        ("__0_0.distcp", [100, 200]),
        ("b", [5]),
    ]
