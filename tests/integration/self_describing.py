"""Bytes that say what they are: key, generation and offset in every 64 of them, so that mixed or stale ones show."""

from __future__ import annotations

import numpy as np
import xxhash

RECORD_BYTES = 64
_WORDS = RECORD_BYTES // 8


def content(key: str, generation: int, size: int) -> bytes:
    """All `size` bytes of generation `generation` of `key`."""
    return part(key, generation, 0, size)


def part(key: str, generation: int, start: int, end: int) -> bytes:
    """Bytes [start, end) of `content`."""
    first, last = start // RECORD_BYTES, -(-end // RECORD_BYTES)
    records = np.empty((last - first, _WORDS), dtype="<u8")
    records[:, 0] = xxhash.xxh3_64_intdigest(key.encode())
    records[:, 1] = generation
    records[:, 2] = np.arange(first, last, dtype="<u8") * RECORD_BYTES
    # What is easily guessed would hide bytes that were swapped for others of their kind: the rest depends on all three.
    mixed = (records[:, 0] ^ (records[:, 1] << 40)) + records[:, 2] * np.uint64(0x9E3779B97F4A7C15)
    records[:, 3:] = mixed[:, None] * np.arange(1, _WORDS - 2, dtype="<u8")
    at = start - first * RECORD_BYTES
    return records.tobytes()[at : at + end - start]


def generation_of(data: bytes | memoryview, start: int) -> int | None:
    """The generation that bytes from offset `start` on claim to be of; None if they hold no whole record."""
    at = -start % RECORD_BYTES
    if len(data) < at + RECORD_BYTES:
        return None
    return int(np.frombuffer(data, dtype="<u8", count=_WORDS, offset=at)[1])


def difference(key: str, generation: int, start: int, data: bytes | memoryview) -> str:
    """What is wrong with `data` as the bytes from `start` on; empty if nothing is."""
    right = part(key, generation, start, start + len(data))
    if right == data:
        return ""
    wrong = np.flatnonzero(np.frombuffer(right, dtype="u1") != np.frombuffer(data, dtype="u1"))
    at = start + int(wrong[0])
    record = at - at % RECORD_BYTES - start
    there = bytes(data[max(0, record) : max(0, record) + RECORD_BYTES])
    words = np.frombuffer(there[: len(there) // 8 * 8], dtype="<u8").tolist()
    return f"{key} generation {generation}: {len(wrong)} wrong bytes, first at {at}, where there is {words}"
