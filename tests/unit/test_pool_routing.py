"""Who is asked for what."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache.errors import (
    ConfigurationError,
    DeadlineExceeded,
    IntegrityError,
    NotResident,
    ObjectNotFound,
    Overloaded,
    ServerUnavailable,
    TorchCacheError,
)
from torchcache.model import STRIPE_BYTES, UNKNOWN_SIZE, Extent, ObjectId, ObjectInfo
from torchcache.placement import Placement, placement_key
from torchcache.pool.routing import Part, Step, advance, check_extents, next_step, placed, streams, stripes

FILE = ObjectId("s3", "bucket/key", "v1")
SAMPLE = ObjectId("samples", "d/1", "0")
SAVE = ObjectId("s3", "run/step-1/__0_0.distcp", "save:1")
SIZE = 5 * STRIPE_BYTES + 17


@given(st.integers(0, SIZE), st.integers(0, SIZE))
def test_stripes_tile_the_extent(one: int, other: int) -> None:
    start, end = sorted((one, other))
    parts = stripes(Extent(ObjectInfo(FILE, SIZE), start, end - start))
    assert parts[0].offset == start
    assert sum(part.length for part in parts) == end - start
    for part, following in pairwise(parts):
        assert part.end == following.offset
        assert following.offset % STRIPE_BYTES == 0
    for part in parts:
        assert part.length == 0 or part.offset // STRIPE_BYTES == (part.end - 1) // STRIPE_BYTES


@given(st.integers(1, 3), st.integers(0, SIZE), st.integers(0, SIZE), st.integers(1, 5))
def test_streams_tile_the_extent_and_share_what_a_server_has(
    servers: int, one: int, other: int, most: int
) -> None:
    members = [f"server-{n}" for n in range(servers)]
    start, end = sorted((one, other))
    extent = Extent(ObjectInfo(FILE, SIZE), start, end - start)
    runs = placed(extent, Placement(members).order)
    least = STRIPE_BYTES // 2
    cut = streams(runs, least, lambda _: most)
    assert cut[0][0].offset == start
    assert sum(part.length for part, _, _ in cut) == end - start
    for (part, _, _), (following, _, _) in pairwise(cut):
        assert part.end == following.offset
        assert following.offset % STRIPE_BYTES == 0
    for part, order, _ in cut:
        assert list(order) == Placement(members).order(placement_key(FILE, part.offset))
    for server in members:
        mine = [(part.length, stream) for part, order, stream in cut if order[0] == server]
        share = sum(length for length, _ in mine)
        used = {stream for _, stream in mine}
        assert used <= set(range(most))
        assert len(used) <= max(1, share // least)
        if share >= 2 * most * STRIPE_BYTES:
            assert len(used) == most


@pytest.mark.parametrize(
    "info", [ObjectInfo(SAMPLE, SIZE), ObjectInfo(SAVE, SIZE), ObjectInfo(SAMPLE, UNKNOWN_SIZE)]
)
def test_what_is_placed_whole_is_not_cut(info: ObjectInfo) -> None:
    extent = Extent(info)
    assert stripes(extent) == [extent]


@given(st.integers(1, 5), st.integers(0, SIZE), st.integers(0, SIZE))
def test_every_byte_is_asked_of_its_stripes_owner(servers: int, one: int, other: int) -> None:
    members = [f"server-{n}" for n in range(servers)]
    start, end = sorted((one, other))
    runs = placed(Extent(ObjectInfo(FILE, SIZE), start, end - start), Placement(members).order)
    assert sum(run.length for run, _ in runs) == end - start
    for run, order in runs:
        for at in {run.offset, max(run.offset, run.end - 1)}:
            assert list(order) == Placement(members).order(placement_key(FILE, at))
    for (_, before), (_, after) in pairwise(runs):
        assert list(before) != list(after)


def steps(part: Part, error: TorchCacheError) -> list[Step]:
    taken: list[Step] = []
    while len(taken) < 10:
        step = next_step(part, error)
        taken.append(step)
        if step in ("final", "wait"):
            break
        advance(part, step)
    return taken


@pytest.mark.parametrize(
    ("object", "error", "expected"),
    [
        (FILE, IntegrityError("bad"), ["suspect", "next", "suspect", "final"]),
        (FILE, ServerUnavailable("gone"), ["next", "wait"]),
        (FILE, Overloaded("busy"), ["wait"]),
        (FILE, DeadlineExceeded("slow"), ["wait"]),
        (FILE, ObjectNotFound("no"), ["final"]),
        (FILE, NotResident("not held"), ["final"]),
        (SAMPLE, NotResident("not held"), ["final"]),
        (SAVE, NotResident("not held"), ["next", "final"]),
    ],
)
def test_who_is_asked_next(object: ObjectId, error: TorchCacheError, expected: list[Step]) -> None:
    assert steps(Part(0, Extent(ObjectInfo(object, 5)), None, ("a", "b")), error) == expected


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, -2), (11, 0), (11, -1), (0, 11), (10, 1), (2**62, 2**62)]
)
def test_extents_outside_their_object_are_refused(offset: int, length: int) -> None:
    with pytest.raises(ConfigurationError, match="of an object of 10 bytes"):
        check_extents([Extent(ObjectInfo(FILE, 10)), Extent(ObjectInfo(FILE, 10), offset, length)])


@pytest.mark.parametrize(("offset", "length"), [(0, -1), (0, 0), (0, 10), (10, 0), (10, -1), (3, 4)])
def test_extents_within_it_are_not(offset: int, length: int) -> None:
    check_extents([Extent(ObjectInfo(FILE, 10)), Extent(ObjectInfo(FILE, 10), offset, length)])
