"""Granules of a payload, copied out of memory that a lane lends, and checked on the way."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from torchcache.checkpoint.landing import Granule, granules_of
from torchcache.checkpoint.layout import GRANULE_BYTES
from torchcache.checkpoint.manifest import Item, payload_digests
from torchcache.errors import NotResident
from torchcache.model import CHUNK_BYTES, ByteRange, ObjectId, ObjectInfo

START, LENGTH = 1000, 2 * GRANULE_BYTES + 5000
DATA = random.Random(0).randbytes(START + LENGTH)
PAYLOAD = memoryview(DATA)[START:]
FILE = ObjectInfo(ObjectId("s3", "run/__0_0.distcp", "save:1"), len(DATA))
ITEM = Item(
    name="w",
    offset=None,
    index=None,
    kind="bytes",
    dtype=None,
    shape=None,
    file="__0_0.distcp",
    start=0,
    length=len(DATA),
    payload_start=START,
    payload_length=LENGTH,
    frame_digest=0,
    digests=payload_digests(PAYLOAD),
)


def granules(part: ByteRange, into: bytearray) -> list[Granule]:
    found = granules_of(ITEM, part, memoryview(into), FILE)
    assert found is not None
    return list(found)


def lent(granule: Granule, data: bytes = DATA) -> list[memoryview]:
    return [memoryview(data)[e.offset : e.offset + e.length] for e in granule.extents]


def test_no_extent_lies_in_two_chunks_and_together_they_are_the_part() -> None:
    found = granules(ByteRange(0, LENGTH), bytearray(LENGTH))
    extents = [extent for granule in found for extent in granule.extents]
    assert all(e.offset // CHUNK_BYTES == (e.end - 1) // CHUNK_BYTES for e in extents)
    assert [e.offset for e in extents[1:]] == [e.end for e in extents[:-1]]
    assert (extents[0].offset, extents[-1].end) == (START, len(DATA))
    for granule in found:
        assert [len(target) for target in granule.targets] == [e.length for e in granule.extents]


@pytest.mark.parametrize("filled", ["none", "first", "all"])
def test_what_is_lent_is_copied_and_what_was_filled_stays(filled: str) -> None:
    into = bytearray(LENGTH)
    for granule in granules(ByteRange(0, LENGTH), into):
        outcomes = lent(granule)
        for number, target in enumerate(granule.targets):
            if filled == "all" or (filled == "first" and number == 0):
                target[:] = outcomes[number]
                outcomes[number] = target
        assert granule.land(outcomes)
    assert into == PAYLOAD


@pytest.mark.parametrize("part", [ByteRange(0, LENGTH), ByteRange(GRANULE_BYTES, LENGTH)])
def test_one_wrong_bit_is_found_wherever_it_is(part: ByteRange) -> None:
    chance = random.Random(1)
    for number, granule in enumerate(granules(part, bytearray(part.length))):
        first = granule.extents[0]
        for at in (first.offset, granule.extents[-1].end - 1, first.offset + chance.randrange(first.length)):
            damaged = bytearray(DATA)
            damaged[at] ^= 1 << chance.randrange(8)
            assert not granule.land(lent(granule, bytes(damaged))), (number, at)


@pytest.mark.parametrize("filled", ["first", "last", "all"])
def test_what_a_lane_filled_wrongly_is_found(filled: str) -> None:
    """Of a granule in two chunks: only this checksum stands between the lane's bytes and the tensor."""
    into = bytearray(LENGTH)
    granule = granules(ByteRange(0, LENGTH), into)[0]
    assert len(granule.extents) == 2
    for wrong in (0, -1):
        outcomes = lent(granule)
        for number, target in enumerate(granule.targets):
            if filled in ("all", ("first", "last")[number]):
                target[:] = outcomes[number]
                target[wrong] ^= 1
                outcomes[number] = target
        assert not granule.land(outcomes)


def test_a_lane_may_fail() -> None:
    first = granules(ByteRange(0, LENGTH), bytearray(LENGTH))[0]
    assert not first.land([NotResident("gone"), *lent(first)[1:]])


def test_parts_that_no_checksum_covers_are_left_to_the_lane() -> None:
    into = memoryview(bytearray(LENGTH))
    for part in (ByteRange(1, LENGTH), ByteRange(0, LENGTH - 1), ByteRange(0, 100)):
        assert granules_of(ITEM, part, into, FILE) is None
    assert granules_of(replace(ITEM, digests=()), ByteRange(0, LENGTH), into, FILE) is None
