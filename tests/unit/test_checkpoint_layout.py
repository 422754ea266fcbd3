"""Where items go in files, and which bytes a box of a tensor needs: pure, so by properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcache.checkpoint.layout import (
    ALIGNMENT_BYTES,
    GRANULE_BYTES,
    Box,
    align,
    assign_files,
    cut,
    file_name,
    granule_cover,
    granules,
    metadata_name,
    part_name,
)
from torchcache.model import ByteRange


def test_names_are_those_of_torch() -> None:
    assert file_name(3, 1) == "__3_1.distcp"
    assert metadata_name("") == ".metadata"
    assert metadata_name(part_name(2)) == "__2.metadata"


@given(st.integers(0, 1 << 40))
def test_align_is_the_next_multiple(offset: int) -> None:
    aligned = align(offset)
    assert aligned % ALIGNMENT_BYTES == 0
    assert 0 <= aligned - offset < ALIGNMENT_BYTES


@given(st.lists(st.integers(0, 1 << 31)), st.integers(1, 8))
def test_files_take_every_item_once_in_order(sizes: list[int], writers: int) -> None:
    runs = assign_files(sizes, writers=writers)
    assert [i for run in runs for i in run] == list(range(len(sizes)))
    assert all(len(run) for run in runs)
    # Held in memory while it is written: no file is larger than half a GiB unless one item alone is.
    assert all(sum(sizes[i] for i in run) <= 512 << 20 or len(run) == 1 for run in runs)


def test_small_checkpoints_are_one_file_and_large_ones_keep_the_writers_busy() -> None:
    assert assign_files([], writers=2) == []
    assert assign_files([1000] * 100, writers=2) == [range(100)]
    assert len(assign_files([10 << 20] * 100, writers=2)) >= 4


def test_large_files_fill_segments_and_what_is_left_over_is_no_file_of_its_own() -> None:
    runs = assign_files([8 << 20] * 104 + [5000], writers=2)
    assert [len(run) for run in runs] == [24, 24, 24, 24, 9], "three segments each, and one"
    assert [len(run) for run in assign_files([32 << 20] * 8 + [1000], writers=2)] == [2, 2, 2, 3]
    assert len(assign_files([511 << 20, 2 << 20], writers=1)) == 2, "no file is too large for it"


@given(st.integers(0, 5 * GRANULE_BYTES), st.data())
def test_a_cover_is_whole_granules(length: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, length))
    part = ByteRange(start, data.draw(st.integers(start, length)))
    cover = granule_cover(part, length)
    assert cover.start <= part.start and part.end <= cover.end <= length
    assert cover.start % GRANULE_BYTES == 0
    assert cover.end % GRANULE_BYTES == 0 or cover.end == length
    assert granules(length) == math.ceil(length / GRANULE_BYTES)


@given(st.integers(0, 9 * GRANULE_BYTES), st.data())
def test_cuts_join_to_the_whole_and_meet_at_granules(end: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, end))
    pieces = list(cut(ByteRange(start, end), 2 * GRANULE_BYTES))
    assert sum(p.length for p in pieces) == end - start
    assert all(0 < p.length <= 2 * GRANULE_BYTES for p in pieces)
    assert all(a.end == b.start and a.end % GRANULE_BYTES == 0 for a, b in itertools.pairwise(pieces))


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    lengths = tuple(draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True))
    return Box(shape, offsets, lengths)


@given(boxes(), st.sampled_from([1, 2, 8, 40_000]))
def test_reads_cover_a_box_from_its_first_byte_to_its_last(box: Box, item_bytes: int) -> None:
    numbers = np.arange(math.prod(box.shape)).reshape(box.shape)
    needed = numbers[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))].ravel()
    reads = box.reads(item_bytes)
    assert box.fits
    if not needed.size:
        assert reads == []
        return
    assert reads[0].start == int(needed[0]) * item_bytes == box.first * item_bytes
    assert reads[-1].end == (int(needed[-1]) + 1) * item_bytes
    read = {b for r in reads for b in range(r.start // item_bytes, r.end // item_bytes)}
    assert set(needed.tolist()) <= read
    assert sum(r.length for r in reads) == len(read) * item_bytes  # nothing twice
    # Only gaps too small to be worth a request are read along.
    extra = sorted(read - set(needed.tolist()))
    runs = np.split(np.array(extra), np.where(np.diff(extra) > 1)[0] + 1) if extra else []
    assert all(len(run) * item_bytes <= 64 * 1024 for run in runs)


def test_a_row_shard_needs_one_range_and_a_column_shard_only_its_columns() -> None:
    assert Box((8, 1024), (2, 0), (4, 1024)).reads(4) == [ByteRange(2 * 4096, 6 * 4096)]
    # Rows of 1 MiB, of which a half: the other half is not fetched.
    half = Box((3, 262_144), (0, 131_072), (3, 131_072)).reads(4)
    assert half == [ByteRange((i << 20) + (1 << 19), (i + 1) << 20) for i in range(3)]
    # Rows of 4 KiB: cheaper read along than asked for one by one.
    assert len(Box((1_000_000, 1024), (0, 512), (1_000_000, 512)).reads(4)) == 1


@pytest.mark.parametrize(
    "box",
    [Box((4,), (2,), (3,)), Box((4,), (-1,), (1,)), Box((4,), (0, 0), (1, 1)), Box((4,), (0,), (-1,))],
)
def test_a_box_outside_its_tensor_does_not_fit(box: Box) -> None:
    assert not box.fits
