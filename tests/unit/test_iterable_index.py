"""Indices of shards: what they say of each format, and what can't be one."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import shards
from torchcache.data import codec
from torchcache.data.formats import Format, Raw, format_of
from torchcache.data.iterable_index import ShardIndex, index_of
from torchcache.errors import ConfigurationError, IntegrityError
from torchcache.model import ObjectId, ObjectInfo


def indexed(kind: str, count: int = 40) -> tuple[ShardIndex, bytes]:
    name, _, packing = kind.partition(".")
    data = shards.packed(shards.WRITERS[name](range(count)), packing and f".{packing}")
    raw: Format = Raw(record_bytes=8, header_bytes=4)
    key = f"x.{kind}"
    info = ObjectInfo(ObjectId("s3", key, "v"), len(data))
    format_ = raw if name == "raw" else format_of(None, [key])
    return index_of(io.BytesIO(data), info, format_, key), data


@pytest.mark.parametrize("name", shards.WRITERS)
def test_what_an_index_says(name: str) -> None:
    index, data = indexed(name)
    assert index.count == 40
    expected = {"parquet": "blocks", "arrow": "blocks", "arrows": "stream"}.get(name, "records")
    assert index.access == expected
    again = ShardIndex.of_record(index.to_record(), len(data))
    assert again.count == 40
    for mine, theirs in ((index.starts, again.starts), (index.rows, again.rows)):
        assert (mine is None) == (theirs is None)
        assert mine is None or np.array_equal(mine, theirs)
    for packing in ("zst", "gz"):
        packed, _ = indexed(f"{name}.{packing}")
        assert (packed.count, packed.access) == (40, "stream")
    empty, _ = indexed(name, 0)
    assert empty.count == 0


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"count": 1, "starts": None},
        {"count": "1", "starts": None, "rows": None},
        {"count": -1, "starts": None, "rows": None},
        {"count": 2, "starts": np.array([0, 5], np.uint64), "rows": None},
        {"count": 1, "starts": np.array([5, 5], np.uint64), "rows": None},
        {"count": 1, "starts": np.array([0, 101], np.uint64), "rows": None},
        {"count": 1, "starts": np.array([0, 5], np.int64), "rows": None},
        {"count": 1, "starts": np.array([[0, 5]], np.uint64), "rows": None},
        {"count": 1, "starts": np.array([0, 5], np.uint64), "rows": np.array([1], np.uint64)},
        {"count": 3, "starts": None, "rows": np.array([1, 1], np.uint64)},
        {"count": 3, "starts": [0, 1, 2, 3], "rows": None},
    ],
)
def test_what_is_no_index(value: object) -> None:
    with pytest.raises(IntegrityError):
        ShardIndex.of_record(codec.encode(value), 100)


@given(data=st.data())
def test_damaged_indices(data: st.DataObject) -> None:
    """The pool's checksums find what happens on disk; what was written wrong is found here."""
    index, shard = indexed("tfrecord", 10)
    record = bytearray(index.to_record())
    for _ in range(data.draw(st.integers(1, 4))):
        record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = ShardIndex.of_record(memoryview(bytes(record)), len(shard))
    except (IntegrityError, ConfigurationError):
        return
    assert found.starts is not None or found.rows is not None or found.count >= 0
