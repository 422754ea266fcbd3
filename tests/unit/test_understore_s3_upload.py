from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchcache_server.understore.s3_upload import PART_BYTES, part_bytes, regroup

from torchcache.errors import ConfigurationError


@given(st.binary(max_size=300), st.lists(st.integers(0, 300)), st.integers(1, 50))
def test_blocks_are_even_and_hold_the_pieces_bytes(data: bytes, cuts: list[int], block_bytes: int) -> None:
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [memoryview(data)[a:b] for a, b in itertools.pairwise(bounds)]
    blocks = list(regroup(pieces, len(data), block_bytes))
    assert b"".join(blocks) == data
    assert all(len(block) == block_bytes for block in blocks[:-1])
    assert all(0 < len(block) <= block_bytes for block in blocks)


@given(st.integers(0, 50), st.integers(0, 50).map(lambda n: n + 1), st.booleans())
def test_pieces_must_add_up(size: int, off_by: int, more: bool) -> None:
    given_bytes = size + off_by if more else max(0, size - off_by)
    said = size if more else given_bytes + off_by
    with pytest.raises(ConfigurationError, match=f"{given_bytes} bytes were given for an object of {said}"):
        list(regroup([memoryview(bytes(given_bytes))], said, 7))


def test_pieces_of_wider_items_are_taken_as_bytes() -> None:
    assert list(regroup([memoryview(b"\1\2\3\4").cast("H")], 4, 3)) == [b"\1\2\3", b"\4"]


@given(st.integers(0, 2**46))
def test_parts_suffice(size: int) -> None:
    each = part_bytes(size)
    assert each >= PART_BYTES
    assert -(-size // each) <= 10_000
