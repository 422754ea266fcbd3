"""Room: how large segments are, and where a batch's records go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.store.space import MIN_SEGMENT_BYTES, lay_out, segment_size

from torchcache.errors import ConfigurationError
from torchcache.records import MAX_RECORD_BYTES

MIB = 1024 * 1024


@given(
    st.lists(st.integers(1, 100), max_size=40),
    st.integers(0, 150),
    st.integers(0, 150),
    st.integers(0, 50),
)
def test_every_record_gets_a_place_of_its_own(sizes: list[int], tail: int, room: int, start: int) -> None:
    segment_bytes = 150 + start
    layout = lay_out(sizes, tail=tail, room_bytes=room, start=start, segment_bytes=segment_bytes)
    at = {0: tail} | {n: start for n in range(1, layout.new_segments + 1)}
    end = {0: tail + room} | {n: segment_bytes for n in range(1, layout.new_segments + 1)}
    covered: list[int] = []
    for run in layout.runs:
        assert run.offset == at[run.segment], "runs lie one behind the other"
        at[run.segment] += sum(sizes[run.first : run.last])
        assert at[run.segment] <= end[run.segment]
        covered += range(run.first, run.last)
    assert covered == list(range(len(sizes)))
    assert layout.bytes == sum(sizes) + layout.new_segments * start


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_no_segment_is_made_without_need(sizes: list[int]) -> None:
    layout = lay_out(sizes, tail=0, room_bytes=sum(sizes), start=10, segment_bytes=200)
    assert layout.new_segments == 0


@given(st.integers(MIN_SEGMENT_BYTES, 1 << 60))
def test_segments_fit_the_store(capacity: int) -> None:
    size = segment_size(capacity, None)
    assert size >= MAX_RECORD_BYTES
    assert size % 4096 == 0
    assert capacity / size <= 16384
    assert size <= max(16 * MAX_RECORD_BYTES, capacity // 16384 + 4096)


@pytest.mark.parametrize(
    ("capacity", "segment", "message"),
    [
        (MIN_SEGMENT_BYTES - 1, None, f"give at least {MIN_SEGMENT_BYTES} bytes"),
        (0, None, "less than one segment"),
        (1 << 30, MIN_SEGMENT_BYTES - 1, "too small for a chunk"),
        (8 * MIB, 16 * MIB, "raise the capacity or make segments smaller"),
    ],
)
def test_what_can_hold_no_chunk_is_refused(capacity: int, segment: int | None, message: str) -> None:
    """F39."""
    with pytest.raises(ConfigurationError, match=message):
        segment_size(capacity, segment)


def test_sixteen_full_chunks_where_the_store_is_large_enough() -> None:
    assert segment_size(100 << 30, None) == 16 * MAX_RECORD_BYTES
    assert segment_size(128 * MIB, None) == 16 * MIB
    assert segment_size(128 * MIB, 32 * MIB) == 32 * MIB
