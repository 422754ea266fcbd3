"""Checksums of payloads as their bytes pass: those of the bytes before they were sent, however they are sent."""

from __future__ import annotations

import random
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchcache.checkpoint import manifest, passing
from torchcache.checkpoint.manifest import payload_digests
from torchcache.checkpoint.passing import PassingDigests

GRANULE = 100


@pytest.fixture(autouse=True)
def small_granules() -> Iterator[None]:
    with (
        mock.patch.object(passing, "GRANULE_BYTES", GRANULE),
        mock.patch.object(manifest, "GRANULE_BYTES", GRANULE),
    ):
        yield


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_however_pieces_pass_the_checksums_are_the_payloads(data: st.DataObject) -> None:
    file = memoryview(random.Random(data.draw(st.integers(0, 9))).randbytes(900))
    cuts = sorted(data.draw(st.sets(st.integers(1, 899), max_size=4)))
    payloads = [(a, file[a:b]) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    digests = PassingDigests(payloads)
    for _ in range(data.draw(st.integers(0, 12))):
        at, size = data.draw(st.tuples(st.integers(0, 899), st.integers(1, 400)))
        digests(at, file[at : at + size])
    for start, payload in payloads:
        assert digests.of(start) == payload_digests(payload)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0], [0, 2, 1, 3], [1, 1, 3, 0, 2]])
def test_no_byte_is_hashed_after_it_was_sent(order: list[int]) -> None:
    """Of a tensor that changes the checksum may be of what was to be sent, never of what came later."""
    before = random.Random(1).randbytes(2 * GRANULE)
    memory = bytearray(before)
    digests = PassingDigests([(40, memoryview(memory))])
    for number in order:
        at = number * 50
        digests(40 + at, memoryview(memory)[at : at + 50])
        memory[at : at + 50] = bytes(50)
    assert digests.of(40) == payload_digests(memoryview(before))


def test_what_never_passed_is_hashed_when_it_is_asked_for() -> None:
    payload = memoryview(random.Random(2).randbytes(3 * GRANULE + 1))
    assert PassingDigests([(0, payload)]).of(0) == payload_digests(payload)
