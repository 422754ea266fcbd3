"""model.py: identities that differ differ in every form, and blocks cover what they must."""

from __future__ import annotations

import copy
import pickle

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from torchcache.model import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    ChunkId,
    Extent,
    ObjectId,
    ObjectInfo,
    block_cover,
    block_digests,
    chunk_digest,
    object_infos,
    whole,
)

texts = st.text(max_size=20)
ids = st.builds(ObjectId, texts, texts, texts)


@given(ids, ids)
def test_encodings_are_equal_only_for_equal_ids(a: ObjectId, b: ObjectId) -> None:
    assert (a.encoded == b.encoded) == (a == b)
    assert (a.digest == b.digest) == (a == b)


@given(ids)
def test_an_id_taken_from_its_encoding_is_the_same(id_: ObjectId) -> None:
    def again() -> ObjectId:
        return ObjectId.from_encoded(id_.encoded)

    assert again() == id_
    assert (again().store, again().key, again().version) == (id_.store, id_.key, id_.version)
    assert (again().digest, again().encoded, hash(again())) == (id_.digest, id_.encoded, hash(id_))
    assert (str(again()), repr(again())) == (str(id_), repr(id_))
    assert pickle.loads(pickle.dumps(again())) == copy.deepcopy(again()) == id_
    with pytest.raises(AttributeError):
        again().name  # type: ignore[attr-defined]  # noqa: B018


@given(st.lists(st.tuples(ids, st.integers(-1, 2**62)), max_size=5))
def test_many_at_a_time_are_as_one_by_one(objects: list[tuple[ObjectId, int]]) -> None:
    """Also an id that has known its digest from the beginning: it is its own, and pickles."""
    found = ObjectId.all_from_encoded(id_.encoded for id_, _ in objects)
    infos = object_infos(found, [size for _, size in objects])
    assert [type(info) for info in infos] == [ObjectInfo] * len(objects)
    assert infos == [ObjectInfo(id_, size) for id_, size in objects]
    assert pickle.loads(pickle.dumps(infos)) == infos
    assert [(info.id.digest, info.id.encoded) for info in infos] == [
        (o.digest, o.encoded) for o, _ in objects
    ]
    extents = whole(infos)
    assert [type(extent) for extent in extents] == [Extent] * len(objects)
    assert extents == [Extent(info) for info in infos]


def test_fields_do_not_run_into_each_other() -> None:
    assert ObjectId("a", "bc", "").encoded != ObjectId("ab", "c", "").encoded


@given(st.integers(0, 5 * CHUNK_BYTES))
def test_chunks_tile_the_object(size: int) -> None:
    info = ObjectInfo(ObjectId("s", "k", "v"), size)
    lengths = [ChunkId(info.id, i).length(size) for i in range(info.chunk_count)]
    assert sum(lengths) == size
    assert all(n == CHUNK_BYTES for n in lengths[:-1])
    assert ChunkId(info.id, info.chunk_count).length(size) == 0


@given(st.integers(1, CHUNK_BYTES), st.data())
def test_cover_is_the_least_aligned_range(length: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    cover = block_cover(start, end, length)
    assert cover.start <= start < end <= cover.end <= length
    assert cover.start % BLOCK_BYTES == 0
    assert cover.end % BLOCK_BYTES == 0 or cover.end == length
    assert start - cover.start < BLOCK_BYTES
    assert cover.end - end < BLOCK_BYTES


def test_an_empty_range_needs_no_block() -> None:
    assert block_cover(5, 5, 100).length == 0


@given(st.binary(max_size=3 * BLOCK_BYTES))
def test_digests_are_xxh3(payload: bytes) -> None:
    digests = block_digests(payload)
    blocks = [payload[i : i + BLOCK_BYTES] for i in range(0, len(payload), BLOCK_BYTES)]
    assert digests == b"".join(xxhash.xxh3_64(b).intdigest().to_bytes(8, "little") for b in blocks)
    assert chunk_digest(payload) == xxhash.xxh3_64(payload).intdigest()
