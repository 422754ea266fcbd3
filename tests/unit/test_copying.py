"""Copies in steps, and what lies there afterwards."""

from __future__ import annotations

import random

import pytest

from torchcache.lanes.copying import STEP_BYTES, copy, hashed_copy
from torchcache.model import chunk_digest

DATA = random.Random(5).randbytes(3 * STEP_BYTES + 7)


@pytest.mark.parametrize(
    "size", [0, 1, STEP_BYTES - 1, STEP_BYTES, STEP_BYTES + 1, 2 * STEP_BYTES, len(DATA)]
)
def test_a_copy_is_what_it_was_made_of_and_writes_no_byte_beyond(size: int) -> None:
    source = memoryview(DATA)[:size]
    for way in (copy, hashed_copy):
        memory = bytearray(size + 2)
        digest = way(source, memoryview(memory)[1:-1])
        assert memory == b"\0" + DATA[:size] + b"\0"
        assert digest in (None, chunk_digest(source))
    assert hashed_copy(source, memoryview(bytearray(size))) == chunk_digest(source)
